"""Recoveries on several ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from minitransformer.training.divergence import NonFiniteTraining
from minitransformer.training.logging import Log, RunFiles
from minitransformer.training.loop import Trainer
from minitransformer.training.ranks import Ranks
from minitransformer.training.signals import StopRequest
from tests.ranks_for_tests import config_of, learner_of
from tests.runs_for_tests import metrics

BAD = range(9, 11)
ROLLBACK = {
    **{
        "on_spike": "rollback",
        "rollback_margin": 2,
        "rollback_window": 4,
        "rollback_patience": 2,
        "max_skipped_steps": 2,
    },
    **{"save_every": 3, "eval_every": 100, "keep_last": 3, "steps": 20},
}


def short_of_memory(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Losses of a run in which the last rank holds no more than one row."""
    learner = learner_of(config_of("decoder", folder, on_oom="halve", steps=8), ranks)

    def before(module: Any, arguments: Any) -> None:
        if ranks.rank == 1 and len(arguments[0]) > 1:
            raise torch.OutOfMemoryError("out of memory")

    learner.model.register_forward_pre_hook(before)
    losses = [learner.step(learner.next_batches()).loss.item() for _ in range(8)]
    return {"losses": losses, "halvings": learner.micro_batches.halvings}


def diverging(path: Path, folder: Path, ranks: Ranks, **choices: Any) -> dict[str, Any]:
    """What is left of a run whose loss is NaN for some of its data, for a row of the last rank alone."""
    config = config_of("decoder", folder, grad_accumulation=1, **{"log_every": 1, **choices})
    learner = learner_of(config, ranks)
    ranks.from_main(lambda: (path / "checkpoints").mkdir(parents=True))
    log = RunFiles(path, resume_at=0) if ranks.is_main else Log()
    loss_sum = learner.objective.loss_sum

    def spoilt(model: Any, batch: Any) -> Any:
        is_bad = learner.steps_done + learner.skipped_batches in BAD and ranks.rank == ranks.size - 1
        return loss_sum(model, batch) * (math.nan if is_bad else 1)

    learner.objective.loss_sum = spoilt  # type: ignore[method-assign]
    trainer = Trainer(path, learner, log, StopRequest(), lambda model, loader: "a sample")
    ended = ""
    try:
        trainer.train()
    except NonFiniteTraining as error:
        ended = str(error)
    sums = [weight.double().sum().item() for weight in learner.model.state_dict().values()]
    said = {"ended": ended, "rollbacks": trainer.progress.rollbacks, "step": trainer.progress.step, "weights": sums}
    return {**said, "rows": metrics(path) if ranks.is_main else []}


def measured(folder: Path, ranks: Ranks, parallel: str) -> dict[str, Any]:
    return {
        "memory": short_of_memory(folder, ranks),
        "rollback": diverging(folder / f"rollback-{ranks.size}", folder, ranks, **ROLLBACK),
        "box": diverging(folder / f"box-{ranks.size}", folder, ranks, steps=20, max_skipped_steps=2),
    }
