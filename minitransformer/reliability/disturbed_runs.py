"""Small runs of several kinds that are disturbed, continued, and compared with an uninterrupted one."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.reliability.launcher import KILLED, NOTHING, Commands, Ended, Strike
from minitransformer.reliability.state import State, differences, leaves_of, without_times
from minitransformer.runs import Run
from minitransformer.training.checkpoint import CHECKPOINTS, checkpoint_step, checkpoints_in, load_learner_state
from minitransformer.training.parallel import FSDP, Parallel

TEXT = "".join(f"Line {i}: the {'quick brown' if i % 3 else 'slow red'} fox counts {i * i}.\n" for i in range(200))
PARENT = "parent"
SHAPE = ("--tokenizer", "bytes", "--d-model", "16", "--num-layers", "2", "--num-heads", "2", "--context-length", "16")
STEPS = 8
COURSE = (
    *("--steps", str(STEPS), "--save-every", "2", "--eval-every", "4", "--log-every", "1", "--keep-last", "1"),
    # An odd number of rows is not divided evenly; a large ε keeps the rounding of sums over ranks small.
    *("--batch-size", "3", "--grad-accumulation", "2", "--dropout", "0.1", "--warmup-steps", "2", "--eps", "1e-4"),
    *("--device", "cpu", "--precision", "fp32", "--compile", "off", "--rank-timeout", "5"),
)
RELATIVE, ABSOLUTE = 1e-3, 1e-4
"""tolerance for sums over rows in another order"""
MOST_STRIKES, SOONER = 20, 0.8
EQUAL, NEAR, REFUSED, FAILED_CASE = "equal", "near", "refused", "failed"


class Broken(Exception):
    """What must not happen to a run, in words."""


class NoReference(UserError):
    """Not even a run without any fault succeeds; the command line exits with 1."""

    exit_code = 1


@dataclass(frozen=True)
class RunKind:
    """How a run begins, and on how many ranks it begins and is resumed."""

    name: str
    ranks: int = 1
    resumed_on: int = 1
    flags: tuple[str, ...] = ()
    fine_tuned: bool = False

    @property
    def begin(self) -> tuple[str, ...]:
        start = ("--init-from", PARENT) if self.fine_tuned else SHAPE
        return ("train", "--data", "my.txt", "--out", "run", *start, *COURSE, *self.flags)


def run_kinds() -> dict[str, RunKind]:
    """Every kind of run, by name."""
    several = [RunKind(name, 2, 2, ("--parallel", name)) for name in Parallel.registry]
    # From a checkpoint in parts to a whole model, and from a whole checkpoint.
    changed = [RunKind("2 to 1", 2, 1, ("--parallel", FSDP.name)), RunKind("1 to 2", 1, 2)]
    kinds = [RunKind("train"), RunKind("fine-tune", fine_tuned=True), *several, *changed]
    return {kind.name: kind for kind in kinds}


class Reference:
    """An uninterrupted run of `kind`, in `folder`."""

    def __init__(self, commands: Commands, kind: RunKind, folder: Path) -> None:
        self.commands, self.kind, self.folder = commands, kind, folder
        self.empty.mkdir(parents=True)
        (self.empty / "my.txt").write_text(TEXT)
        if kind.fine_tuned:
            parent = ("train", "--data", "my.txt", "--out", PARENT, *SHAPE, *COURSE)
            self._run(self.empty, *parent)
        shutil.copytree(self.empty, self.whole, symlinks=True)
        ended = self._run(self.whole, *kind.begin, ranks=kind.ranks)
        self.seconds, self.calls = ended.seconds, ended.calls
        begun, last = (self.whole / "run" / name for name in ("config.json", "metrics.jsonl"))
        self.training_share = max(0.0, last.stat().st_mtime - begun.stat().st_mtime) / ended.seconds
        """part of the time that is between the beginning of the run and its last record"""

    def _run(self, folder: Path, *words: str, ranks: int = 1) -> Ended:
        ended = self.commands(folder, *words, ranks=ranks, patience=300)
        if not ended.done:
            raise NoReference(f"without any fault, a run of kind {self.kind.name!r} fails: {last_line(ended)}")
        return ended

    @property
    def empty(self) -> Path:
        """The folder before the run."""
        return self.folder / "empty"

    @property
    def whole(self) -> Path:
        return self.folder / "whole"


class DisturbedRun:
    """A run in `folder` that is to be disturbed, by what `draw` says."""

    def __init__(self, reference: Reference, folder: Path, draw: random.Random) -> None:
        self.reference, self.folder, self.draw = reference, folder, draw
        self.kind, self.commands = reference.kind, reference.commands

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def saved(self) -> int:
        """The step of the last checkpoint; 0 for none."""
        return max(map(checkpoint_step, checkpoints_in(self.run / CHECKPOINTS)), default=0)

    def prepare(self) -> None:
        """Make the folder in which the run is to begin."""
        shutil.copytree(self.reference.empty, self.folder, symlinks=True, dirs_exist_ok=True)

    def begin_struck(self, strike: Callable[[float], Strike], *, before: int | None = None) -> None:
        """Begin the run, and again, until a strike comes before it has ended, or has saved step `before`.

        `strike` is given the time within which it should come, less each time.
        """
        seconds = self.reference.seconds
        for _ in range(MOST_STRIKES):
            self.prepare()
            ended = self.begin(strike(seconds))
            if not ended.done and (before is None or self.saved < before):
                return
            seconds *= SOONER
            for path in self.folder.iterdir():
                files.remove(path)
        raise Broken(f"it ended before each of {MOST_STRIKES} strikes")

    def begin_half(self) -> None:
        """Begin the run, and kill it at some time after its first checkpoint, and before its last."""
        first = self.run / "checkpoints/latest"
        share = self.reference.training_share / 2
        self.begin_struck(lambda seconds: Strike(after=self.draw.uniform(0, share * seconds), once=first), before=STEPS)

    def begin(self, strike: Strike = NOTHING) -> Ended:
        return self._checked(self.commands(self.folder, *self.kind.begin, ranks=self.kind.ranks, strike=strike))

    def resume(self) -> Ended:
        return self._checked(self.commands(self.folder, "train", "--resume", "run", ranks=self.kind.resumed_on))

    def _checked(self, ended: Ended) -> Ended:
        """`ended`, if every rank that was not killed is done or has refused to go on, in one sentence."""
        if None in ended.codes:
            raise Broken(f"rank {ended.codes.index(None)} hangs")
        if not (ended.in_one_sentence or set(ended.codes) <= {0, KILLED}):
            raise Broken(f"it ended with {ended.codes}: {last_line(ended)}")
        return ended

    def finish(self) -> str:
        """Do what the messages say: resume the run, or begin it where there is none; returns what it is then."""
        saved = self.saved > 0
        ended = self.resume()
        if saved and any(words in ended.output for words in ("checkpoint none yet", "is not a run folder")):
            raise Broken("the checkpoint that it had saved is lost")
        if not ended.done and "is not a run folder" in ended.output:
            ended = self.begin()
        if not ended.done and "has done its" not in ended.output:
            raise Broken(f"it cannot be continued: {last_line(ended)}")
        return self.compared()

    def compared(self, spared: str = "") -> str:
        """How the run compares with the uninterrupted one, without regard to the log called `spared`."""
        left = [path.name for ending in (files.PARTIAL, files.REPLACED) for path in self.run.rglob(f"*{ending}")]
        if left:
            raise Broken(f"{left[0]} is left over")
        mine, whole = (_final_state(folder / "run", spared) for folder in (self.folder, self.reference.whole))
        if not (found := differences(whole, mine)):
            return EQUAL
        if self.kind.ranks != self.kind.resumed_on and _near(whole, mine):
            return NEAR
        raise Broken(f"it differs from the uninterrupted run: {found[0].part}, {found[0]}")


def last_line(ended: Ended) -> str:
    return next((line for line in reversed(ended.output.splitlines()) if line.strip()), "no output")


def _final_state(path: Path, spared: str) -> State:
    """All that a run has come to: weights, trainer state, and records of metrics."""
    run = Run.open(path)
    models = {name: run.load_model(name) for name in ("latest", "best")}
    state = {f"weights of {name}": dict(model.state_dict()) for name, model in models.items()}
    state["trainer state"] = dict(leaves_of(load_learner_state(run.checkpoint("latest"), models["latest"])))
    if spared != "metrics.jsonl":
        lines = (path / "metrics.jsonl").read_text().splitlines()
        rows = [without_times(json.loads(line)) for line in lines]
        state["records"] = {f"{name} of record {i}": value for i, row in enumerate(rows) for name, value in row.items()}
    return state


def _near(whole: State, mine: State) -> bool:
    """Whether both states have the same entries, equal up to the rounding of sums in another order."""
    names = [{(part, name) for part in state for name in state[part]} for state in (whole, mine)]
    return names[0] == names[1] and all(_close(whole[part][name], mine[part][name]) for part, name in names[0])


def _close(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.shape == right.shape and torch.allclose(left, right, rtol=RELATIVE, atol=ABSOLUTE)
    if isinstance(left, float) and isinstance(right, float):
        return math.isclose(left, right, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return bool(left == right)
