"""`train`: prepare the text, train a model, and say where the run lies and what to do next."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from minitransformer.amounts import amount, duration
from minitransformer.commands import DONE, given_flags, run_command, with_files
from minitransformer.commands.settings_flags import parse_with_settings
from minitransformer.diagnostics import check_probe, probe_for
from minitransformer.errors import StorageError, UserError
from minitransformer.files import sha256, writing
from minitransformer.generation.samples import sample_of
from minitransformer.models.model import Model, count_parameters
from minitransformer.pretrained.originals import inherit_originals
from minitransformer.registry import lookup
from minitransformer.runs import REMEDY, Run, check_free, claimed_run_path, only_writer
from minitransformer.settings import flat
from minitransformer.text.corpora import named, short_name
from minitransformer.text.prepare import TooShort
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.checkpoint import (
    MODEL,
    check_room,
    check_weights,
    checkpoint_step,
    checkpoints_in,
    load_progress,
)
from minitransformer.training.config import RunConfig, fixed_settings, with_usual_vocabulary, with_vocabulary
from minitransformer.training.finetuning import LEAST_TOKENS, Parent, check_fits, fine_tuning
from minitransformer.training.logging import Logs, RunFiles, TensorBoard, Terminal
from minitransformer.training.loop import SAMPLES, NonFiniteTraining, Trainer, sample_heading
from minitransformer.training.machine import Machine, choose_device, choose_precision
from minitransformer.training.objectives import Objective
from minitransformer.training.objectives.base import Prepared
from minitransformer.training.outcome import describe
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

EXPORTED = "`minitransformer export --help` says which of them the transformers library opens."
FINE_TUNING = Doc(
    "fine-tune: a new run that begins with the weights, the model and the tokenizer of the run in this folder, by "
    "default at a tenth of its learning rates, with at most 20 steps of warm-up, 1000 steps and 1024 tokens a sequence"
)


@dataclass(frozen=True)
class Flags:
    """Which run to make, and where."""

    out: Path | None = None
    """folder of the new run; None is runs/PRESET-DATA"""
    resume: Path | None = None
    """continue the run in this folder; --steps extends it, other settings hold from here on"""
    checkpoint: str | None = None
    """with --resume: the checkpoint to continue from, None is the latest; with --init-from: None is the best"""
    init_from: Annotated[Path | None, FINE_TUNING] = None


@dataclass(frozen=True)
class Options(Flags):
    """The flags, and the configuration that they make."""

    config: RunConfig = field(default_factory=RunConfig)


def main(arguments: Sequence[str]) -> int:
    """Train, or resume; returns the exit code."""
    resume = _option(arguments, "--resume")
    return run_command(lambda: _begin(arguments) if resume is None else _resume(resume, arguments))


def _begin(arguments: Sequence[str]) -> int:
    has_preset = bool(arguments) and not arguments[0].startswith("-")
    if (initial := _option(arguments, "--init-from")) is not None:
        if has_preset:
            raise UserError(f"--init-from {initial} brings a model of its own: leave the preset {arguments[0]!r} out")
        return _fine_tune(initial, arguments)
    preset = arguments[0] if has_preset else DEFAULT
    options = _parse(arguments[has_preset:], lookup("preset", preset, PRESETS))
    print(f"preset     {preset}", flush=True)  # what follows has to load more of torch first
    if options.checkpoint is not None:
        raise UserError(f"--checkpoint {options.checkpoint} belongs to a run: name that with --resume or --init-from")
    _check_possible(options)
    return _begun(options, preset, options.config, _prepare(options.config))


def _fine_tune(initial: Path, arguments: Sequence[str]) -> int:
    source = Run.open(initial)
    new_data = "data" in given_flags(arguments)
    base = fine_tuning(source.config, from_scratch=source.parent is None, new_data=new_data)
    options = _parse(arguments, base)
    weights = source.checkpoint(options.checkpoint)
    size = f"{source.config.model.topology} of {amount(count_parameters(source.config.model))} parameters"
    print(f"from       {initial} ({size}, {weights.name})", flush=True)
    check_fits(source.config.model, options.config.model)
    if options.config.data.tokenizer != base.data.tokenizer:
        raise UserError(f"--init-from {initial} has a tokenizer of its own: leave --tokenizer out")
    _check_possible(options)
    config = options.config
    try:
        prepared = _prepare(config, source.tokenizers)
    except TooShort as error:
        if options.config.training.sequence_length != base.training.sequence_length or error.longest < LEAST_TOKENS:
            raise
        config = replace(config, training=replace(config.training, sequence_length=error.longest))
        prepared = _prepare(config, source.tokenizers)
    if (length := config.training.sequence_length) is not None:
        print(f"sequences  {length:,} tokens, of the {config.model.context_length:,} that the model sees")
    parent = Parent(str(initial), weights.name, sha256(weights / MODEL))
    return _begun(options, source.path.resolve().name, config, prepared, parent, source.load_model(weights.name))


def _check_possible(options: Options) -> None:
    """Raises `UserError` now for what cannot work: not after minutes of preparing text."""
    if options.out is not None:
        check_free(options.out)
    if options.config.training.tensorboard:
        TensorBoard.check()
    choose_precision(choose_device(options.config.training.device), options.config.training.precision)
    count_parameters(with_usual_vocabulary(options.config))


def _begun(
    options: Options,
    name: str,
    config: RunConfig,
    prepared: Prepared,
    parent: Parent | None = None,
    initial: Model | None = None,
) -> int:
    """Make the folder of a new run, which begins with the weights of `initial` if there is one, and train it."""
    config = replace(config, model=with_vocabulary(config.model, prepared))
    check_room(options.out or Path("runs"), config)
    machine = machine_for(config)
    path = options.out or claimed_run_path(f"{name}-{short_name(options.config.data.data)}")
    with only_writer(path):
        tokenizers = prepared.tokenizer, prepared.target_tokenizer
        inherit = partial(inherit_originals, None if parent is None else Path(parent.path))
        run = Run.create(path, config, *tokenizers, prepared.folder.name, machine.resolved, parent, initial, inherit)
        return _train(run, prepared, machine, checkpoint=None if initial is None else run.checkpoint_to_continue())


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
    if options.config.training.tensorboard:
        TensorBoard.check()
    with only_writer(path):
        return _continue(Run.open(path), options)  # as it stands now that nobody else writes to it


def _continue(run: Run, options: Options) -> int:
    _check_changes(run.config, options.config, silent=() if run.machine is None else SETTINGS)
    checkpoint = _checkpoint_to_continue(run, options)
    anew = [name for name in SETTINGS if getattr(run.config.training, name) != getattr(options.config.training, name)]
    machine, changes = machine_again(run.machine, options.config, anew)
    for change in changes:
        print(f"changed    {change}")
    prepared = _prepare(options.config, run.tokenizers)
    if prepared.folder.name != run.text:
        raise UserError(
            f"{named(options.config.data.data)} is not the text that {run.path} began with: restore it, "
            "or train a new run"
        )
    check_room(run.path, options.config)
    return _train(run.reconfigured(options.config, machine.resolved), prepared, machine, checkpoint)


def _checkpoint_to_continue(run: Run, options: Options) -> Path | None:
    """None for a run that was stopped before its first checkpoint; raises `UserError` for one that has done it all."""
    if options.checkpoint is None and not checkpoints_in(run.checkpoints):
        if run.parent is not None:
            raise StorageError(f"{run.path} has lost the weights that it began with: begin anew with --init-from")
        print(f"checkpoint none yet: {run.path} begins at step 0", flush=True)
        return None
    checkpoint = run.checkpoint_to_continue(options.checkpoint)
    check_weights(checkpoint, options.config.model)
    step, steps, patience = checkpoint_step(checkpoint), options.config.training.steps, options.config.training.patience
    if step < steps and patience is None:
        return checkpoint
    progress = load_progress(checkpoint)
    ended = _has_ended(run, step, progress)
    if step > steps or (step == steps and ended):
        raise UserError(f"{run.path} has done its {steps} steps: give a larger --steps to extend it")
    worse = progress.get("validations_since_best", 0)
    if patience is not None and worse >= patience and ended:
        raise UserError(f"{run.path} stopped early, after {worse} validations that were no better: raise --patience")
    return checkpoint


def _has_ended(run: Run, step: int, progress: dict[str, Any]) -> bool:
    """Whether the last validation and the sample are there as well; a signal may have come before them."""
    samples = run.path / SAMPLES
    validated = not run.config.data.validates or progress.get("validated_step") == step
    return validated and samples.exists() and sample_heading(step) in samples.read_text("utf-8", "replace")


def _check_changes(old: RunConfig, new: RunConfig, silent: Sequence[str] = ()) -> None:
    """Say which settings a resumed run changes, but the `silent` ones; refuse those that would make it another run."""
    before, after, fixed = flat(old), flat(new), {**fixed_settings(old), **fixed_settings(new)}
    for name in before | after:
        a, b = before.get(name), after.get(name)
        if a == b:
            continue
        if name in fixed:
            raise UserError(f"this run has {name} {a}, and resuming cannot make it {b}: train a new run for that")
        if name not in silent:
            print(f"changed    {name} {a} -> {b}")


def _parse(arguments: Sequence[str], config: RunConfig) -> Options:
    about = _describe_presets() if {"-h", "--help"} & set(arguments) else ""
    flags, config = parse_with_settings(Flags, arguments, config, prog="train.py [PRESET]", description=about)
    check_probe(config)
    config.check_trainable()
    return Options(**vars(flags), config=replace(config, data=with_files(config.data)))


def _describe_presets() -> str:
    sizes = {name: count_parameters(with_usual_vocabulary(run)) / 1e6 for name, run in PRESETS.items()}
    lines = "\n".join(f"  {name:18}{size:7.2f}M" for name, size in sizes.items())
    about = f"Presets (default: {DEFAULT}) and their parameters, with the usual vocabulary of their tokenizers:"
    return f"Train a model, resume a run, or fine-tune one.\n\n{about}\n{lines}\n\n{EXPORTED}"


def _prepare(config: RunConfig, tokenizers: Sequence[Tokenizer] = ()) -> Prepared:
    prepared = Objective.named(config.training.objective).prepare(config, tokenizers)
    print(f"data       {named(config.data.data)}\n{prepared.summary()}", flush=True)
    return prepared


def _train(run: Run, prepared: Prepared, machine: Machine, checkpoint: Path | None) -> int:
    config = run.config.training
    tokens = config.steps * Objective.named(config.objective).tokens_per_step(run.config)
    print(f"model      {amount(count_parameters(run.config.model))} parameters, {amount(tokens)} tokens to read")
    print(f"machine    {machine.description}")
    print(f"run        {run.path}", flush=True)
    with StopRequest() as stop, writing(run.path, REMEDY):
        done = 0 if checkpoint is None else checkpoint_step(checkpoint)
        logs = [RunFiles(run.path, resume_at=done), Terminal(steps=config.steps, done=done)]
        if config.tensorboard:
            logs.append(TensorBoard(run.path))
        log = Logs(*logs)
        trainer = Trainer(run, prepared, machine, log, stop, partial(_sample, run), probe_for(config))
        if checkpoint is not None:
            trainer.restore(checkpoint)
        if config.eval_every < config.steps and str(trainer.validator):
            log.line(str(trainer.validator))
        try:
            trainer.train()
            stopped = stop.signal is not None
            ended_best = trainer.progress.best_step == trainer.progress.step
            # With sample_at_eval, the last validation has printed one of the last weights.
            if not stopped and not (config.sample_at_eval and ended_best):
                trainer.write_sample(best=True)
        except NonFiniteTraining as error:
            log.line(f"error: {error}")
            return NON_FINITE
        finally:
            log.close()
        return _stopped(trainer, stop) if stopped else _report(trainer)


def _sample(run: Run, model: Model, objective: Objective) -> str:
    return sample_of(model, run.tokenizer, run.target_tokenizer, objective.examples(EXAMPLES), SAMPLE_TOKENS)


def _stopped(trainer: Trainer, stop: StopRequest) -> int:
    path, step = trainer.run.path, trainer.progress.step
    print(f"stopped at step {step}, which is saved; to continue:\n\n    python train.py --resume {path}\n")
    return stop.exit_code


def _report(trainer: Trainer) -> int:
    path, progress = trainer.run.path, trainer.progress
    if trainer.stopped_early:
        print(f"stopped early at step {progress.step}: no better validation in {progress.validations_since_best}")
    if trainer.validation is not None:
        print(*describe(trainer.validation, progress, path / "metrics.jsonl", trainer.config.eval_every), sep="\n")
    print(f"curves     python -m minitransformer compare {path}")
    print(f"run        {path}, {duration(progress.seconds)} of training")
    print(f"next       {NEXT[trainer.model.config.topology].format(path=path)}")
    return DONE
