"""One trial of a sweep: a run folder that is trained until a step, and continued from there when it goes on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.generation.samples import sample_of
from minitransformer.lab.experiment import Measurement
from minitransformer.lab.instruments import probe_for
from minitransformer.lab.store import REMEDY
from minitransformer.models.model import Model, count_parameters
from minitransformer.runs import Run, clear, only_writer
from minitransformer.training.checkpoint import check_room, checkpoint_step
from minitransformer.training.config import RunConfig, TrainingConfig, with_vocabulary
from minitransformer.training.logging import Log, Logs, RunFiles, TensorBoard, records_until
from minitransformer.training.loop import NonFiniteTraining, Trainer
from minitransformer.training.machine import choose_machine
from minitransformer.training.objectives import Objective
from minitransformer.training.objectives.base import Prepared
from minitransformer.training.signals import StopRequest

METRICS = {"validation_loss": "validation loss", "bits_per_byte": "bits per byte"}
"""what a trial may be judged by, and how it is called"""
SAMPLE_TOKENS, EXAMPLES = 120, 4


@cache
def _prepared(config: RunConfig) -> Prepared:
    return Objective.named(config.training.objective).prepare(config)


def prepared_for(config: RunConfig) -> Prepared:
    """The data of a trial, opened once in each process."""
    return _prepared(replace(config, training=TrainingConfig(objective=config.training.objective)))


def train_trial(path: Path, config: RunConfig, until: int) -> Measurement:
    """Train the run at `path` from where it stands until step `until`, and return what came of it so far.

    A folder that cannot be continued, as after a kill before its first checkpoint, is made anew: the state after a
    step does not depend on how often a run was interrupted.
    """
    prepared = prepared_for(config)
    config = replace(config, model=with_vocabulary(config.model, prepared))
    with files.writing(path, REMEDY), only_writer(path):
        finite = _advance(path, config, prepared, until)
    return {**_outcome(path, until, finite), "text": prepared.folder.name}


def _advance(path: Path, config: RunConfig, prepared: Prepared, until: int) -> bool:
    """Train the run at `path` until step `until`; False if that ended because nothing was finite any more."""
    found = _found(path, config)
    run, checkpoint = (_begun(path, config, prepared), None) if found is None else found
    done = 0 if checkpoint is None else checkpoint_step(checkpoint)
    if done >= until:
        return True
    log = _log(run, done)
    trainer = _trainer(run, prepared, log)
    if checkpoint is not None:
        trainer.restore(checkpoint)
    try:
        trainer.train(until)
    except NonFiniteTraining as error:
        log.line(f"error: {error}")
        return False
    finally:
        log.close()
    return True


def _found(path: Path, config: RunConfig) -> tuple[Run, Path] | None:
    """The run at `path` and its latest checkpoint, if there is a whole one of this configuration."""
    try:
        run = Run.open(path)
        return (run, run.checkpoint_to_continue()) if run.config == config else None
    except UserError:
        return None


def _begun(path: Path, config: RunConfig, prepared: Prepared) -> Run:
    clear(path)
    check_room(path, config)
    return Run.create(path, config, prepared.tokenizer, prepared.target_tokenizer, prepared.folder.name)


def _log(run: Run, done: int) -> Log:
    log = RunFiles(run.path, resume_at=done)
    return Logs(log, TensorBoard(run.path)) if run.config.training.tensorboard else log


def _trainer(run: Run, prepared: Prepared, log: Log) -> Trainer:
    config = run.config.training
    objective = Objective.named(config.objective)
    flops = 6 * count_parameters(run.config.model) * config.steps * objective.tokens_per_step(run.config)
    machine = choose_machine(
        config.device, config.precision, config.compile, run_flops=flops, fixed_shapes=objective.fixed_shapes
    )
    return Trainer(run, prepared, machine, log, StopRequest(), partial(_sample, run), probe_for(config))


def _sample(run: Run, model: Model, objective: Objective) -> str:
    return sample_of(model, run.tokenizer, run.target_tokenizer, objective.examples(EXAMPLES), SAMPLE_TOKENS)


def _outcome(path: Path, until: int, finite: bool) -> Measurement:
    """What the run at `path` wrote down until step `until`: its best validation, and whether all went well."""
    records = [json.loads(line) for line in records_until(path / "metrics.jsonl", until)]
    losses = [record["loss"] for record in records if "loss" in record]
    validations = [record for record in records if "validation_loss" in record]
    usable = [record for record in validations if math.isfinite(record["validation_loss"])]
    best: dict[str, Any] = min(usable, key=lambda record: record["validation_loss"], default={})
    return {
        **{metric: best.get(metric) for metric in METRICS},
        "best_step": best.get("step"),
        "steps": max((record["step"] for record in records), default=0),
        # A loss of None is that of an interval in which no step had a finite one.
        "finite": finite and None not in losses[-1:] and bool(usable) and usable[-1] is validations[-1],
    }
