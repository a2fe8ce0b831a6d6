"""`train`: prepare the text, train a model, and say where the run lies and what to do next."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from minitransformer.amounts import amount, duration
from minitransformer.commands import DONE, parse, run_command
from minitransformer.errors import UserError
from minitransformer.files import sha256, writing
from minitransformer.generation.samples import sample_of
from minitransformer.lab.instruments import check_probe, probe_for
from minitransformer.models.model import Model, count_parameters
from minitransformer.registry import lookup
from minitransformer.runs import Run, data_name, free_run_path
from minitransformer.text.prepare import TooShort
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.checkpoint import (
    MODEL,
    check_room,
    checkpoint_step,
    choose_checkpoint,
    load_model_weights,
)
from minitransformer.training.config import RunConfig, with_usual_vocabulary, with_vocabulary
from minitransformer.training.finetuning import LEAST_TOKENS, Parent, check_fits, fine_tuning
from minitransformer.training.logging import Logs, RunFiles, TensorBoard, Terminal
from minitransformer.training.loop import NonFiniteTraining, Trainer
from minitransformer.training.machine import Machine, choose_device, choose_precision
from minitransformer.training.objectives import Objective
from minitransformer.training.objectives.base import Prepared
from minitransformer.training.presets import DEFAULT, PRESETS
from minitransformer.training.run_machine import SETTINGS, machine_again, machine_for
from minitransformer.training.signals import StopRequest

NON_FINITE = 3
SAMPLE_TOKENS, EXAMPLES = 120, 4
TRANSLATE = 'echo "..." | python sample.py {path}'
NEXT = {
    "decoder": 'python sample.py {path} --prompt "..."',
    "encoder": 'python sample.py {path} --prompt "... <mask> ..."',
    "encoder-decoder": TRANSLATE,
    "rnn": TRANSLATE,
}


@dataclass(frozen=True)
class Options(RunConfig):
    """A whole configuration, and the folder it is for."""

    out: Path | None = None
    """folder of the new run; None is runs/PRESET-DATA"""
    resume: Path | None = None
    """continue the run in this folder; --steps extends it, other settings hold from here on"""
    checkpoint: str | None = None
    """with --resume: the checkpoint to continue from, None is the latest; with --init-from: None is the best"""
    init_from: Path | None = None
    """fine-tune: a new run that begins with the weights, the model and the tokenizer of the run in this folder, by
    default at a tenth of its learning rates, with at most 20 steps of warm-up, 1000 steps and 1024 tokens a sequence"""

    def run_config(self) -> RunConfig:
        return RunConfig(self.model, self.data, self.training)


def main(arguments: Sequence[str]) -> int:
    """Train, or resume; returns the exit code."""
    resume = _option(arguments, "--resume")
    return run_command(lambda: _begin(arguments) if resume is None else _resume(resume, arguments))


def _begin(arguments: Sequence[str]) -> int:
    named = bool(arguments) and not arguments[0].startswith("-")
    if (initial := _option(arguments, "--init-from")) is not None:
        if named:
            raise UserError(f"--init-from {initial} brings a model of its own: leave the preset {arguments[0]!r} out")
        return _fine_tune(initial, arguments)
    preset = arguments[0] if named else DEFAULT
    options = _parse(arguments[named:], lookup("preset", preset, PRESETS))
    print(f"preset     {preset}", flush=True)  # what follows has to load more of torch first
    if options.checkpoint is not None:
        raise UserError(f"--checkpoint {options.checkpoint} belongs to a run: name that with --resume or --init-from")
    path = _free_path(options, preset)
    config, prepared = options.run_config(), _prepare(options.run_config())
    return _train(*_created(path, config, prepared), checkpoint=None)


def _fine_tune(initial: Path, arguments: Sequence[str]) -> int:
    source = Run.open(initial)
    new_data = any(word.partition("=")[0] == "--data" for word in arguments)
    base = fine_tuning(source.config, from_scratch=source.parent is None, new_data=new_data)
    options = _parse(arguments, base)
    weights = source.checkpoint(options.checkpoint)
    size = f"{source.config.model.topology} of {amount(count_parameters(source.config.model))} parameters"
    print(f"from       {initial} ({size}, {weights.name})", flush=True)
    check_fits(source.config.model, options.model)
    if options.data.tokenizer != base.data.tokenizer:
        raise UserError(f"--init-from {initial} has a tokenizer of its own: leave --tokenizer out")
    path = _free_path(options, source.path.resolve().name)
    config = options.run_config()
    try:
        prepared = _prepare(config, source.tokenizers)
    except TooShort as error:
        if options.training.sequence_length != base.training.sequence_length or error.longest < LEAST_TOKENS:
            raise
        config = replace(config, training=replace(config.training, sequence_length=error.longest))
        prepared = _prepare(config, source.tokenizers)
    if (length := config.training.sequence_length) is not None:
        print(f"sequences  {length:,} tokens, of the {config.model.context_length:,} that the model sees")
    parent = Parent(str(initial), weights.name, sha256(weights / MODEL))
    return _train(*_created(path, config, prepared, parent), checkpoint=None, weights=weights)


def _free_path(options: Options, name: str) -> Path:
    """The folder of the new run. Raises `UserError` now for what cannot work: not after minutes of preparing text."""
    path = options.out or free_run_path(f"{name}-{data_name(options.data.data)}")
    if path.exists():
        raise UserError(f"{path} exists already: choose another --out, or continue the run with --resume {path}")
    if options.training.tensorboard:
        TensorBoard.check()
    choose_precision(choose_device(options.training.device), options.training.precision)
    count_parameters(with_usual_vocabulary(options))
    return path


def _created(
    path: Path, config: RunConfig, prepared: Prepared, parent: Parent | None = None
) -> tuple[Run, Prepared, Machine]:
    config = replace(config, model=with_vocabulary(config.model, prepared))
    check_room(path, config)
    machine = machine_for(config)
    tokenizers = prepared.tokenizer, prepared.target_tokenizer
    run = Run.create(path, config, *tokenizers, prepared.folder.name, machine.resolved, parent)
    return run, prepared, machine


def _option(arguments: Sequence[str], flag: str) -> Path | None:
    """The folder that `flag` names: it decides what the other flags' defaults are."""
    parser = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument(flag, type=Path, dest="folder")
    return parser.parse_known_args(arguments)[0].folder


def _resume(path: Path, arguments: Sequence[str]) -> int:
    run = Run.open(path)
    options = _parse(arguments, run.config)
    if options.init_from is not None:
        raise UserError("--resume goes on with a run, and --init-from begins one: give one of them")
    if not run.text:
        raise UserError(f"{path} was imported, and no training of it can go on: begin one with --init-from {path}")
    _check_changes(run.config, options, silent=() if run.machine is None else SETTINGS)
    checkpoint = choose_checkpoint(run.checkpoints, options.checkpoint)
    if checkpoint_step(checkpoint) >= options.training.steps:
        raise UserError(f"{path} has done its {options.training.steps} steps: give a larger --steps to extend it")
    anew = [name for name in SETTINGS if getattr(run.config.training, name) != getattr(options.training, name)]
    if options.training.tensorboard:
        TensorBoard.check()
    machine, changes = machine_again(run.machine, options, anew)
    for change in changes:
        print(f"changed    {change}")
    prepared = _prepare(options.run_config(), run.tokenizers)
    if prepared.folder.name != run.text:
        raise UserError(f"{options.data.data} is not the text that {path} began with: restore it, or train a new run")
    check_room(path, options)
    return _train(run.reconfigured(options.run_config(), machine.resolved), prepared, machine, checkpoint)


def _check_changes(old: RunConfig, new: RunConfig, silent: Sequence[str] = ()) -> None:
    """Say which settings a resumed run changes, but the `silent` ones; refuse those that would make it another run."""
    for part in ("model", "data", "training"):
        before, after = getattr(old, part), getattr(new, part)
        for field in fields(before):
            a, b = getattr(before, field.name), getattr(after, field.name)
            if a == b:
                continue
            if part != "training" or field.name in ("objective", "optimizer", "seed"):
                raise UserError(
                    f"this run has {field.name} {a}, and resuming cannot make it {b}: train a new run for that"
                )
            if field.name not in silent:
                print(f"changed    {field.name} {a} -> {b}")


def _parse(arguments: Sequence[str], config: RunConfig) -> Options:
    options = parse(
        Options,
        arguments,
        default=Options(config.model, config.data, config.training),
        prog="train.py [PRESET]",
        description=_describe_presets() if {"-h", "--help"} & set(arguments) else "",
    )
    check_probe(options)
    return options


def _describe_presets() -> str:
    sizes = {name: count_parameters(with_usual_vocabulary(run)) / 1e6 for name, run in PRESETS.items()}
    lines = "\n".join(f"  {name:18}{size:7.2f}M" for name, size in sizes.items())
    about = f"Presets (default: {DEFAULT}) and their parameters, with the usual vocabulary of their tokenizers:"
    return f"Train a model, resume a run, or fine-tune one.\n\n{about}\n{lines}"


def _prepare(config: RunConfig, tokenizers: Sequence[Tokenizer] = ()) -> Prepared:
    prepared = Objective.named(config.training.objective).prepare(config, tokenizers)
    print(f"data       {config.data.data}\n{prepared.summary()}", flush=True)
    return prepared


def _train(run: Run, prepared: Prepared, machine: Machine, checkpoint: Path | None, weights: Path | None = None) -> int:
    config = run.config.training
    tokens = config.steps * Objective.named(config.objective).tokens_per_step(run.config)
    print(f"model      {amount(count_parameters(run.config.model))} parameters, {amount(tokens)} tokens to read")
    print(f"machine    {machine.description}")
    print(f"run        {run.path}", flush=True)
    with StopRequest() as stop, writing(run.path, "choose an --out on another disk"):
        done = 0 if checkpoint is None else checkpoint_step(checkpoint)
        logs = [RunFiles(run.path, resume_at=done), Terminal(steps=config.steps, done=done)]
        if config.tensorboard:
            logs.append(TensorBoard(run.path))
        log = Logs(*logs)
        trainer = Trainer(run, prepared, machine, log, stop, partial(_sample, run), probe_for(config))
        if checkpoint is not None:
            trainer.restore(checkpoint)
        if weights is not None:
            load_model_weights(weights, trainer.model)
        try:
            trainer.train()
            if stop.signal is None and not config.sample_at_eval:  # else the last validation has printed one
                trainer.write_sample()
        except NonFiniteTraining as error:
            log.line(f"error: {error}")
            return NON_FINITE
        finally:
            log.close()
        return _report(trainer, stop)


def _sample(run: Run, model: Model, objective: Objective) -> str:
    return sample_of(model, run.tokenizer, run.target_tokenizer, objective.examples(EXAMPLES), SAMPLE_TOKENS)


def _report(trainer: Trainer, stop: StopRequest) -> int:
    path, progress = trainer.run.path, trainer.progress
    if stop.signal is not None:
        print(f"stopped at step {progress.step}, which is saved; to continue:\n\n    python train.py --resume {path}\n")
        return stop.exit_code
    if trainer.stopped_early:
        print(f"stopped early at step {progress.step}: no better validation in {progress.validations_since_best}")
    print(f"validation {trainer.validation} (best at step {progress.best_step})")
    print(f"run        {path}, {duration(progress.seconds)} of training")
    print(f"next       {NEXT[trainer.model.config.topology].format(path=path)}")
    return DONE
