"""What `metrics.jsonl` and the terminal say of a run: every row once, whatever happened, and no NaN averaged away."""

import json
import math
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitransformer.training.checkpoint import choose_checkpoint
from minitransformer.training.logging import Terminal
from tests.runs_for_tests import configured, metrics, trainer_for

pytestmark = pytest.mark.unchecked_shapes


@settings(max_examples=10)
@given(torn=st.integers(0, 200), more=st.sampled_from([0, 1, 2]), log_every=st.sampled_from([1, 2, 4]))
def test_rows_after_the_checkpoint_and_a_torn_one_are_written_again_and_none_twice(
    text, tmp_path_factory, torn, more, log_every
):
    folder, config = tmp_path_factory.mktemp("runs"), configured(log_every=log_every)
    trained = tmp_path_factory.getbasetemp() / f"logged-{log_every}"
    if not trained.exists():
        trainer_for(trained / "whole", text, config).train()
        trainer_for(trained / "run", text, config).train(until=7)
    shutil.copytree(trained, folder, symlinks=True, dirs_exist_ok=True)
    path = folder / "run/metrics.jsonl"
    lines = (folder / "whole/metrics.jsonl").read_text().splitlines(keepends=True)
    later = [line for line in lines if json.loads(line)["step"] > 7]
    with path.open("a") as file:
        file.write("".join(later[:more]) + later[more][:torn].rstrip("\n"))
    again = trainer_for(folder / "run", text, config, resume_at=7)
    again.restore(choose_checkpoint(folder / "run/checkpoints"))
    again.train()
    assert metrics(folder / "run") == metrics(folder / "whole")


def skip(trainer, *steps):
    loss_sum = trainer.learner.objective.loss_sum
    trainer.learner.objective.loss_sum = lambda model, batch: (
        loss_sum(model, batch) * (math.nan if trainer.learner.steps_done in steps and model.training else 1)
    )
    return trainer


def test_a_row_says_how_many_of_its_steps_had_no_finite_loss(text, tmp_path, capsys):
    trainer = skip(trainer_for(tmp_path / "run", text, configured(log_every=2)), 1, 2, 3)
    terminal = Terminal(steps=12, done=0)
    record = trainer.log.record
    trainer.log.record = lambda numbers: (record(numbers), terminal.record(numbers))
    trainer.train()
    rows = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert [row["skipped_steps"] for row in rows] == [1, 2, 0, 0, 0, 0]
    assert [row["loss"] is None for row in rows] == [False, True, False, False, False, False]
    assert rows[1]["grad_norm"] is None
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert f"step 2 loss {rows[0]['loss']:.4f} (1 step skipped) lr" in said[0]
    assert "step 4 loss none finite (2 steps skipped) lr" in said[1]
    assert "skipped" not in said[2]
