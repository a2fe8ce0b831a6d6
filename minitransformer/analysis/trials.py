"""A trial of a sweep: a run folder that is trained up to a rung, and resumed for the next."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from minitransformer import files
from minitransformer.analysis.verdicts import last_value
from minitransformer.errors import UserError
from minitransformer.evaluation.metrics import Metric
from minitransformer.runs import Run, clear, only_writer
from minitransformer.runs.begin import begin_run
from minitransformer.runs.teaching import with_teacher
from minitransformer.runs.trainer import build_trainer, open_log
from minitransformer.tasks.store import REMEDY
from minitransformer.tasks.task import Measurement
from minitransformer.text.datasets import PreparedData
from minitransformer.training.checkpoint import check_room, checkpoint_step
from minitransformer.training.config import RunConfig, TrainingConfig, with_vocabulary
from minitransformer.training.divergence import NonFiniteTraining
from minitransformer.training.logging import records_until
from minitransformer.training.machine import Machine, Resolved
from minitransformer.training.run_machine import SETTINGS, machine_again, machine_for, run_flops
from minitransformer.training.signals import StopRequest


def recorded_metrics() -> list[str]:
    """The metrics of a validation that have a direction, which the results of every trial have."""
    return [name for name, metric in Metric.registry.items() if metric.in_words and metric.lower_is_better is not None]


def shared_machine(configs: Sequence[RunConfig], kept: Resolved | None, swept: Collection[str]) -> Resolved:
    """The machine for all of `configs`, compiled only if that pays for the shortest.

    The machine `kept` by an interrupted sweep takes precedence. Raises `UserError` as `trial_machine` does.
    """
    known = [replace(config, model=with_vocabulary(config.model, prepared_for(config))) for config in configs]
    shared = kept or machine_for(min(known, key=run_flops)).resolved
    for config in configs:
        trial_machine(config, shared, swept)
    return shared


def trial_machine(config: RunConfig, shared: Resolved, swept: Collection[str]) -> Machine:
    """The machine of one trial: the `shared` one except for `swept` settings.

    Raises `UserError` if it is unavailable, because trials on different machines are not comparable.
    """
    config = replace(config, model=with_vocabulary(config.model, prepared_for(config)))
    anew = [name for name in SETTINGS if name in swept]
    machine, changes = machine_again(shared, config, anew)
    if missing := [change for change in changes if change.split()[0] not in anew]:
        raise UserError(f"finished trials were trained differently, {', '.join(missing)}: {REMEDY}")
    return machine


@cache
def _prepared(config: RunConfig) -> PreparedData:
    return config.prepare()


def prepared_for(config: RunConfig) -> PreparedData:
    """The data of a trial, opened once in each process."""
    return _prepared(replace(config, training=TrainingConfig(objective=config.training.objective)))


def train_trial(
    path: Path, config: RunConfig, until: int, machine: Machine | None = None, *, metrics: Sequence[str] = ()
) -> Measurement:
    """Train the run at `path` from its latest checkpoint up to step `until`, and return its results, with `metrics`.

    `machine` defaults to the one chosen for `config`. A folder that cannot be resumed, as after a
    kill before its first checkpoint, is recreated: the state after a step does not depend on
    interruptions.
    """
    prepared = prepared_for(config)
    config = with_teacher(replace(config, model=with_vocabulary(config.model, prepared)), prepared)
    with files.writing(path, REMEDY), only_writer(path):
        finite = _advance(path, config, prepared, until, machine or machine_for(config))
    return {**_outcome(path, until, finite, metrics), "text": prepared.folder.name}


def _advance(path: Path, config: RunConfig, prepared: PreparedData, until: int, machine: Machine) -> bool:
    """Train the run at `path` up to step `until`; returns False if it diverged."""
    found = _found(path, config, machine.resolved)
    if found is None:
        clear(path)
        check_room(path, config)
    run, checkpoint = found or (begin_run(path, config, prepared, machine.resolved), None)
    done = 0 if checkpoint is None else checkpoint_step(checkpoint)
    if done >= until:
        return True
    log = open_log(run, done)
    trainer = build_trainer(run, prepared, machine, log, StopRequest(), checkpoint=checkpoint)
    try:
        trainer.train(until)
    except NonFiniteTraining as error:
        log.line(f"error: {error}")
        return False
    finally:
        log.close()
    return True


def _found(path: Path, config: RunConfig, machine: Resolved) -> tuple[Run, Path] | None:
    """The run at `path` and its latest checkpoint, if they match this configuration and machine."""
    try:
        run = Run.open(path)
        if run.config != config or run.machine not in (None, machine):
            return None
        checkpoint = run.checkpoint_to_continue()
    except UserError:
        return None
    return (run if run.machine else run.reconfigured(config, machine)), checkpoint  # old runs have no machine


def _outcome(path: Path, until: int, finite: bool, metrics: Sequence[str] = ()) -> Measurement:
    """The results of the run at `path` up to step `until`: its last and best validation, and whether it diverged."""
    records = records_until(path / "metrics.jsonl", until)
    losses = [record["loss"] for record in records if "loss" in record]
    validations = [record for record in records if "validation_loss" in record]
    # Non-finite values are None; old versions wrote NaN.
    known = [record for record in validations if record["validation_loss"] is not None]
    usable = [record for record in known if math.isfinite(record["validation_loss"])]
    best: dict[str, Any] = min(usable, key=lambda record: record["validation_loss"], default={})
    return {
        **{metric: last_value(records, metric) for metric in (*recorded_metrics(), *metrics)},
        "best_validation_loss": best.get("validation_loss"),
        "best_step": best.get("step"),
        "steps": max((record["step"] for record in records), default=0),
        # The loss is None for an interval without a finite step.
        "finite": finite and None not in losses[-1:] and bool(usable) and usable[-1] is validations[-1],
    }
