"""Training on several ranks: the same numbers as in one process, whatever is trained, and however rows are divided."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitransformer.architecture.dropout import Dropout, rows_from
from minitransformer.text.batches import IGNORE, Batch
from minitransformer.training.learner import Learner
from minitransformer.training.objectives import Objective
from minitransformer.training.parallel import Parallel
from minitransformer.training.ranks import ONE_PROCESS, Ranks
from tests.ranks_for_tests import CASES, TENSOR, config_of, learner_of, on_ranks, write_texts
from tests.shared_for_tests import measured_once

pytestmark = pytest.mark.unchecked_shapes


class Alone(Ranks):
    """One of `size` ranks, whose collective operations see it alone."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


@given(count=st.integers(0, 40), size=st.integers(1, 9))
def test_every_row_belongs_to_one_rank_and_ranks_differ_by_one_row_at_most(count: int, size: int) -> None:
    shares = [Alone(rank, size).share(count) for rank in range(size)]
    assert [row for share in shares for row in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(rows=st.integers(1, 9), cuts=st.sets(st.integers(1, 8)), first=st.integers(0, 1000), p=st.floats(0.1, 0.9))
def test_what_dropout_drops_in_a_row_depends_on_the_row_alone(rows: int, cuts: set[int], first: int, p: float) -> None:
    dropout, x = Dropout(p).train(), torch.ones(rows, 3, 7)
    parts = []
    for start, end in pairwise([0, *sorted(cut for cut in cuts if cut < rows), rows]):
        torch.manual_seed(7)
        with rows_from(first + start):
            parts.append(dropout(x[start:end]))
    torch.manual_seed(7)
    with rows_from(first):
        assert torch.equal(torch.cat(parts), dropout(x))


def test_a_rank_without_rows_has_a_batch_without_targets() -> None:
    batch = Batch(torch.arange(6).view(2, 3), torch.arange(6).view(2, 3))
    empty = batch.rows(1, 1)
    assert empty.num_rows == 1
    assert empty.num_targets == 0
    assert bool((empty.targets == IGNORE).all())


@pytest.mark.parametrize("name", ["decoder", "masked", "recurrent", "experts"])
def test_micro_batches_with_dropout_are_one_batch_in_parts(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MINITRANSFORMER_DATA", str(tmp_path / "prepared"))
    write_texts(tmp_path)
    learner: Learner = learner_of(config_of(name, tmp_path, expert_balance=0.0), ONE_PROCESS)
    [batch, *_] = learner.next_batches()
    whole = learner._add_gradients([batch])
    gradients = [p.grad.clone() for p in learner.model.parameters() if p.grad is not None]
    learner.model.zero_grad()
    parts = learner._add_gradients(batch.split(2))
    torch.testing.assert_close(parts, whole)
    for parameter, gradient in zip(
        [p for p in learner.model.parameters() if p.grad is not None], gradients, strict=True
    ):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_every_objective_is_among_the_cases_on_several_ranks() -> None:
    assert {case.get("objective", "causal") for case in CASES.values()} == set(Objective.registry)


ON_4 = {"five rows", "fewer rows than ranks", "experts", "two rows"}
"""cases that differ most between 2 and 4 ranks: rows that they do not divide, and operations over all"""


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: Any) -> dict[str, Any]:
    def measure(folder: Path) -> dict[str, Any]:
        write_texts(folder)
        return on_ranks(1, folder, *CASES, *TENSOR)

    measured: dict[str, Any] = measured_once(tmp_path_factory, "one-process", measure)
    return measured


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "count"), [*((name, 2) for name in Parallel.registry), ("tensor", 2), ("fsdp", 4), ("tensor", 4)]
)
def test_losses_over_50_steps_are_those_of_one_process(
    parallel: str, count: int, one_process: dict[str, Any], tmp_path: Path
) -> None:
    write_texts(tmp_path)
    names = {
        name: case for name, case in (TENSOR if parallel == "tensor" else CASES).items() if count == 2 or name in ON_4
    }
    together = on_ranks(count, tmp_path, *names, parallel=parallel)
    for name, case in names.items():
        # In bfloat16, another order of the same additions gives another rounding.
        rel = 1e-3 if case.get("precision") == "bf16" else 1e-5
        assert together[name]["losses"] == pytest.approx(one_process[name]["losses"], rel=rel), name
        # The norm of a gradient is the noisier, the fewer rows it is of, and products in parts round otherwise.
        rel_of_norm = max(rel, 1e-4)
        assert together[name]["grad_norms"] == pytest.approx(one_process[name]["grad_norms"], rel=rel_of_norm), name
        assert together[name]["validation"] == pytest.approx(one_process[name]["validation"], rel=rel), name
        assert together[name]["tokens"] == one_process[name]["tokens"]
