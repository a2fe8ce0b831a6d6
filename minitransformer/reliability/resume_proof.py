"""Whether a run resumes exactly, by trial: it is trained without a stop and with one, and compared after every step."""

from __future__ import annotations

import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitransformer.amounts import size
from minitransformer.errors import StorageError, UserError
from minitransformer.models.model import count_parameters
from minitransformer.reliability.state import LOSSES, Difference, State, differences, state_of, without_times
from minitransformer.runs import Run
from minitransformer.runs.begin import begin_run, check_possible
from minitransformer.runs.layout import TARGET_TOKENIZER, TOKENIZER
from minitransformer.runs.resume import changed_settings, check_can_resume, check_same_text, checkpoint_to_resume
from minitransformer.runs.teaching import with_teacher
from minitransformer.runs.trainer import build_trainer
from minitransformer.settings import with_settings
from minitransformer.training.checkpoint import CHECKPOINTS, checkpoint_step
from minitransformer.training.config import RunConfig, with_vocabulary
from minitransformer.training.logging import Log
from minitransformer.training.loop import Trainer
from minitransformer.training.ranks import Ranks
from minitransformer.training.run_machine import SETTINGS, machine_again, machine_for
from minitransformer.training.signals import StopRequest

BEFORE, ON, AFTER = "before the stop", "on resuming", "after resuming"
NO_RESUME = "the two runs differ without any resuming: training itself is not deterministic on this machine"
NOT_RESTORED = "what is restored from disk is not what was saved"
NOT_SAVED = "what was restored is equal, so this step depends on something that no checkpoint holds"
STORED = "data", "weights", "optimizer state", "precision state", "learner"
"""parts of the state that are equal after a step and after resuming from its checkpoint"""
REASONS = {BEFORE: NO_RESUME, ON: NOT_RESTORED, AFTER: NOT_SAVED}


@dataclass(frozen=True)
class FirstDifference:
    """The first step after which the two trainings differ, on which rank, and in what."""

    step: int
    when: str
    rank: int
    parts: list[Difference]

    @property
    def order(self) -> tuple[int, bool, int]:
        return self.step, self.when == AFTER, self.rank


@dataclass(frozen=True)
class ResumeProof:
    """What was compared after each step from `first` + 1 to `last`, with a stop after step `stop`."""

    first: int
    stop: int
    last: int
    compared: dict[str, int]
    """tensors and numbers in each part of the state, on the main rank"""
    difference: FirstDifference | None


class Recorder(Log):
    """Keeps the losses of every step, and the state after it, in `folder`."""

    trainer: Trainer
    difference: FirstDifference | None = None

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.compared: dict[str, int] = {}

    def begin(self, trainer: Trainer) -> None:
        """Record `trainer`, from its present state on."""
        self.trainer = trainer
        self.note(trainer.progress.step, "step", state_of(trainer))

    def record(self, numbers: dict[str, Any]) -> None:
        kinds = {"loss": "step", "validation_loss": "validation"}
        kind = next((kinds[name] for name in kinds if name in numbers), "probe")
        state = {LOSSES: without_times(numbers)}
        self.note(numbers["step"], kind, {**state, **state_of(self.trainer)} if kind == "step" else state)

    def note(self, step: int, kind: str, state: State) -> None:
        if kind == "step":
            self.compared = {part: len(numbers) for part, numbers in state.items()}
        torch.save(state, self.path(step, kind))

    def path(self, step: int, kind: str) -> Path:
        return self.folder / f"rank-{self.trainer.ranks.rank}-{kind}-{step}.pt"


class ComparingRecorder(Recorder):
    """Compares a training with the recorded one, up to the first difference."""

    when = BEFORE

    def resume(self, trainer: Trainer) -> None:
        """Compare `trainer`, which was restored from disk."""
        self.when = ON
        self.begin(trainer)
        self.when = AFTER

    def note(self, step: int, kind: str, state: State) -> None:
        if self.difference is not None:
            return
        path = self.path(step, kind)
        whole: State = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        if self.when == ON:  # a checkpoint is made later than the record of its step: its progress knows the validation
            whole, state = ({part: each.get(part, {}) for part in STORED} for each in (whole, state))
        if found := differences(whole, state):
            self.difference = FirstDifference(step, self.when, self.trainer.ranks.rank, found)


def new_run(config: RunConfig, path: Path, ranks: Ranks) -> Run:
    """A run of `config` that is to begin, in a new folder."""
    ranks.from_main(lambda: check_possible(config, path, ranks))
    prepared = ranks.first_on_node(config.prepare)
    config = with_teacher(replace(config, model=with_vocabulary(config.model, prepared)), prepared)
    machine = ranks.from_main(lambda: machine_for(config))
    return ranks.main_first(lambda: begin_run(path, config, prepared, machine.resolved), lambda: Run.open(path))


def changed_run(run: Run, config: RunConfig, ranks: Ranks) -> Run:
    """`run` with another configuration, as it would be resumed; its folder is not changed.

    Raises `UserError` if it cannot be.
    """
    check_can_resume(run)
    changed_settings(run.config, config)
    anew = [name for name in SETTINGS if getattr(run.config.training, name) != getattr(config.training, name)]
    machine, _ = ranks.from_main(lambda: machine_again(run.machine, config, anew))
    return replace(run, config=config, machine=machine.resolved)


def prove_resume(run: Run, ranks: Ranks, steps: int, folder: Path) -> ResumeProof:
    """Train copies of `run` in `folder` for `steps` steps: one without a stop, and one resumed after half of them.

    They begin at its latest checkpoint, if it has one. Its own folder is not changed, and its configuration need not
    be the one there. Raises `StorageError` if the disk is too full.
    """
    checkpoint = checkpoint_to_resume(run, with_settings(run.config, {"steps": sys.maxsize, "patience": None}), None)
    first = 0 if checkpoint is None else checkpoint_step(checkpoint)
    stop, last = first + steps // 2, first + steps
    # One step more, as the last one has a validation over the whole split.
    longest = max(run.config.training.steps, last + 1)
    run = replace(run, config=with_settings(run.config, {"steps": longest, "log_every": 1, "patience": None}))
    ranks.from_main(lambda: _check_room(folder, run.config, steps))
    whole, parts = folder / "whole", folder / "parts"
    for copy in (whole, parts):
        ranks.from_main(partial(_copy, run, checkpoint, copy))
    recorder, comparison = Recorder(folder), ComparingRecorder(folder)
    _train(whole, recorder, recorder.begin, ranks, last)
    _train(parts, comparison, comparison.begin, ranks, stop)
    _scramble_generators()
    _train(parts, comparison, comparison.resume, ranks, last)
    found = [each for each in ranks.all(comparison.difference) if each is not None]
    return ResumeProof(first, stop, last, recorder.compared, min(found, key=lambda each: each.order, default=None))


def _check_room(folder: Path, config: RunConfig, steps: int) -> None:
    """For the state after each step, and the checkpoints of two runs and those that are being written."""
    copies = steps + 1 + 2 * (config.training.keep_last + 2)
    needed, free = copies * 3 * 4 * count_parameters(config.model), shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"comparing {steps} steps takes {size(needed)} and {folder} has {size(free)} free: "
            "free some, give fewer --steps, or choose a --folder on another disk"
        )


def _copy(run: Run, checkpoint: Path | None, target: Path) -> None:
    """The run as it is at `checkpoint`, without its logs, in the folder `target`."""
    (target / CHECKPOINTS).mkdir(parents=True)
    for name in (TOKENIZER, TARGET_TOKENIZER)[: len(run.tokenizers)]:
        shutil.copyfile(run.path / name, target / name)
    if checkpoint is not None:
        shutil.copytree(checkpoint, target / CHECKPOINTS / checkpoint.name)
    replace(run, path=target).reconfigured(run.config)


def _train(path: Path, log: Recorder, begin: Callable[[Trainer], None], ranks: Ranks, until: int) -> None:
    """Continue the run at `path` until a step, as `train.py --resume` does; not if it begins with a difference."""
    run = Run.open(path)
    checkpoint = checkpoint_to_resume(run, run.config, None)
    machine, _ = ranks.from_main(lambda: machine_again(run.machine, run.config, ()))
    prepared = ranks.first_on_node(lambda: run.config.prepare(run.tokenizers))
    check_same_text(run, run.config, prepared)
    trainer = build_trainer(run, prepared, machine, log, StopRequest(), ranks, checkpoint=checkpoint)
    begin(trainer)
    if not ranks.any(log.difference is not None):
        trainer.train(until)


def _scramble_generators() -> None:
    """Leave the random generators of this process as another process would have them."""
    random.seed()
    np.random.seed()
    torch.seed()


@contextmanager
def deterministic_cuda() -> Iterator[None]:
    """Within the block, torch uses only those algorithms on CUDA that give the same bits each time.

    Raises `UserError` if there is none for a part of a training. Enter it before the first use of CUDA.
    """
    if not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        reason = str(error).partition(".")[0]
        raise UserError(f"this training has no deterministic form on CUDA ({reason}): choose --device cpu") from None
    finally:
        torch.use_deterministic_algorithms(before)
