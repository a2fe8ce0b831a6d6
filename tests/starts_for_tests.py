"""Ways to start commands that a campaign should find fault with, or that say what a rank has been told."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from minitransformer.commands import start
from minitransformer.training import checkpoint
from minitransformer.training.learner import Learner


def without_moments(name: str, arguments: Sequence[str]) -> int:
    """Commands that do not restore a moment of the optimizer."""
    load = Learner.load_state_dict

    def forget(self: Learner, state: dict[str, object]) -> None:
        load(self, state)
        for moments in self.optimizers[0].state.values():
            for moment in moments.values():
                moment.zero_()

    Learner.load_state_dict = forget  # type: ignore[method-assign]
    return start(name, arguments)


def with_another_weight_on_rank_1(name: str, arguments: Sequence[str]) -> int:
    """Commands that restore one weight of one rank wrongly."""
    load = Learner.load_state_dict

    def restored(self: Learner, state: dict[str, object]) -> None:
        load(self, state)
        if os.environ["RANK"] == "1":
            next(self.model.parameters()).data.view(-1)[3] += 1

    Learner.load_state_dict = restored  # type: ignore[method-assign]
    return start(name, arguments)


def without_checksums(name: str, arguments: Sequence[str]) -> int:
    """Commands that notice no damage."""
    checkpoint.damage = lambda path: None
    return start(name, arguments)


def with_traceback(name: str, arguments: Sequence[str]) -> int:
    """Commands of which those that resume a run fail."""
    if "--resume" in arguments:
        raise RuntimeError("this should not happen")
    return start(name, arguments)


def one_of(name: str, arguments: Sequence[str]) -> int:
    """Small programs, to be killed and stopped."""
    rank = int(os.environ.get("RANK", "0"))
    if name == "say":
        print(rank, os.environ.get("WORLD_SIZE", "alone"), *arguments, Path.cwd().name)
    if name == "write":
        for number in range(int(arguments[0])):
            Path(f"{rank}-{number}").mkdir()
    if name == "fail" and rank == int(arguments[0]):
        print("error: it cannot be")
        return 2
    if name in ("wait", "fail"):
        Path(f"waiting-{rank}").mkdir()
        time.sleep(60)
    return 0
