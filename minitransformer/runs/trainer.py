"""The trainer of a run folder, with its logs, samples and diagnostics."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from minitransformer.diagnostics import probe_for
from minitransformer.generation.classes import Classifier, ranked_classes
from minitransformer.generation.samples import sample_of
from minitransformer.models.model import Model
from minitransformer.runs.open import Run
from minitransformer.runs.teaching import open_teacher
from minitransformer.text.datasets import PreparedData
from minitransformer.training.learner import build_learner
from minitransformer.training.loader import Loader
from minitransformer.training.logging import Log, Logs, RunFiles, TensorBoard
from minitransformer.training.loop import Trainer
from minitransformer.training.machine import Machine
from minitransformer.training.ranks import ONE_PROCESS, Ranks
from minitransformer.training.signals import StopRequest

SAMPLE_TOKENS, EXAMPLES = 120, 4


def build_trainer(
    run: Run,
    prepared: PreparedData,
    machine: Machine,
    log: Log,
    stop: StopRequest,
    ranks: Ranks = ONE_PROCESS,
    *,
    initial: Path | None = None,
    checkpoint: Path | None = None,
) -> Trainer:
    """The trainer of `run`: from scratch, from the weights of `initial`, or resumed from `checkpoint`."""
    probe = probe_for(run.config.training)
    teacher = open_teacher(run.config)
    learner = build_learner(run.config, prepared, machine, ranks, initial=initial, teacher=teacher, make_probe=probe)
    trainer = Trainer(run.path, learner, log, stop, partial(_sample, run))
    if checkpoint is not None:
        trainer.restore(checkpoint)
    return trainer


def open_log(run: Run, done: int, *others: Log) -> Log:
    """The log files of `run` from step `done` on, the `others`, and TensorBoard if enabled."""
    tensorboard = [TensorBoard(run.path)] if run.config.training.tensorboard else []
    return Logs(RunFiles(run.path, resume_at=done), *others, *tensorboard)


def _sample(run: Run, model: Model, loader: Loader) -> str:
    if isinstance(model, Classifier):
        texts = loader.examples(EXAMPLES)
        return "\n".join(
            f"{run.tokenizer.decode(text)}\n  -> {ranked_classes(model, run.class_names, text)}" for text in texts
        )
    return sample_of(model, run.tokenizer, run.target_tokenizer, loader.examples(EXAMPLES), SAMPLE_TOKENS)
