"""Recoveries on several ranks: all ranks decide alike, and end as one process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitransformer.training.black_box import BlackBox
from minitransformer.training.replay import replay
from tests.ranks_for_tests import on_ranks, write_texts
from tests.runs_for_tests import cpu

pytestmark = [pytest.mark.slow, pytest.mark.unchecked_shapes]


def test_ranks_recover_as_one_process_does(tmp_path: Path) -> None:
    write_texts(tmp_path)
    alone, together = (on_ranks(n, tmp_path, module="tests.recovery_on_ranks_for_tests") for n in (1, 2))
    # One rank alone is short of memory: both halve their 3 rows of 6, until it has 1.
    assert (alone["memory"]["halvings"], together["memory"]["halvings"]) == (0, 2)
    assert together["memory"]["losses"] == pytest.approx(alone["memory"]["losses"], rel=1e-5)
    # The loss is not finite on one rank alone.
    for run in (alone, together):
        assert (run["rollback"]["rollbacks"], run["rollback"]["step"], run["rollback"]["ended"]) == (1, 20, "")
        assert [row for row in run["rollback"]["rows"] if "rollback" in row] == [
            {"step": 6, "rollback": 1, "rolled_back_from": 11, "skipped_batches": 5}
        ]
        assert run["box"]["step"] == 11
        assert "black-box` shows where" in run["box"]["ended"]
    losses = [[row["loss"] for row in run["rollback"]["rows"] if "loss" in row] for run in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    boxes = [BlackBox.open(tmp_path / f"box-{count}/black-box") for count in (1, 2)]
    assert boxes[1].machine_in_words.startswith("2 ranks, each ")
    # The test has spoilt the loss, and not what a box holds.
    replays = [replay(box, cpu("fp32")) for box in boxes]
    assert replays[1].loss == pytest.approx(replays[0].loss, rel=1e-5)
    assert not any(done.is_exact for done in replays)
