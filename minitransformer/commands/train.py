"""`train`: prepare the text, train a model, and say where the run lies and what to do next."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from minitransformer.commands import DONE, parse, run_command, with_files
from minitransformer.errors import UserError
from minitransformer.files import writing
from minitransformer.generation.samples import sample_of
from minitransformer.lab.instruments import check_probe, probe_for
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, count_parameters
from minitransformer.registry import lookup
from minitransformer.runs import Run, free_run_path
from minitransformer.text.corpora import named, short_name
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.checkpoint import check_room, check_weights, checkpoint_step, choose_checkpoint
from minitransformer.training.config import RunConfig, with_vocabulary
from minitransformer.training.logging import Logs, RunFiles, TensorBoard, Terminal
from minitransformer.training.loop import NonFiniteTraining, Trainer
from minitransformer.training.machine import choose_device, choose_machine
from minitransformer.training.objectives import Objective
from minitransformer.training.objectives.base import Prepared
from minitransformer.training.presets import DEFAULT, PRESETS
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
    """with --resume: the checkpoint to continue from; None is the latest"""
    init_from: Path | None = None
    """a new run that begins with the weights, the model and the tokenizer of the run in this folder: fine-tuning"""

    def run_config(self) -> RunConfig:
        return RunConfig(self.model, self.data, self.training)


def main(arguments: Sequence[str]) -> int:
    """Train, or resume; returns the exit code."""
    resume = _option(arguments, "--resume")
    return run_command(lambda: _begin(arguments) if resume is None else _resume(resume, arguments))


def _begin(arguments: Sequence[str]) -> int:
    named = bool(arguments) and not arguments[0].startswith("-")
    preset = arguments[0] if named else DEFAULT
    initial = _option(arguments, "--init-from")
    base = lookup("preset", preset, PRESETS)
    if initial is not None:
        base = replace(Run.open(initial).config, data=base.data) if named else Run.open(initial).config
    options = _parse(arguments[named:], base)
    print(f"preset     {preset}", flush=True)  # what follows has to load more of torch first
    if options.checkpoint is not None:
        raise UserError(f"--checkpoint {options.checkpoint} belongs to a run: name that with --resume")
    options = replace(options, data=with_files(options.data))
    path = options.out or free_run_path(f"{preset}-{short_name(options.data.data)}")
    if path.exists():
        raise UserError(f"{path} exists already: choose another --out, or continue the run with --resume {path}")
    # What cannot work is said now, and not after minutes of preparing text.
    if options.training.tensorboard:
        TensorBoard.check()
    choose_device(options.training.device)
    _count_parameters(options.model)
    source = None if initial is None else Run.open(initial)
    prepared = _prepare(options.run_config(), source.tokenizers if source else ())
    config = replace(options.run_config(), model=with_vocabulary(options.model, prepared))
    check_room(path, config)
    run = Run.create(path, config, prepared.tokenizer, prepared.target_tokenizer, prepared.folder.name)
    return _train(run, prepared, checkpoint=None, initial=source)


def _option(arguments: Sequence[str], flag: str) -> Path | None:
    """The folder that `flag` names: it decides what the other flags' defaults are."""
    parser = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument(flag, type=Path, dest="folder")
    return parser.parse_known_args(arguments)[0].folder


def _resume(path: Path, arguments: Sequence[str]) -> int:
    run = Run.open(path)
    options = _parse(arguments, run.config)
    _check_changes(run.config, options)
    checkpoint = choose_checkpoint(run.checkpoints, options.checkpoint)
    check_weights(checkpoint, run.config.model)
    if checkpoint_step(checkpoint) >= options.training.steps:
        raise UserError(f"{path} has done its {options.training.steps} steps: give a larger --steps to extend it")
    prepared = _prepare(options.run_config(), run.tokenizers)
    if prepared.folder.name != run.text:
        raise UserError(
            f"{named(options.data.data)} is not the text that {path} began with: restore it, or train a new run"
        )
    check_room(path, options)
    return _train(run.reconfigured(options.run_config()), prepared, checkpoint)


def _check_changes(old: RunConfig, new: RunConfig) -> None:
    """Say which settings a resumed run changes; refuse those that would make it another run."""
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
    sizes = "\n".join(f"  {name:12}{_count_parameters(run.model) / 1e6:8.2f}M" for name, run in PRESETS.items())
    return f"Train a model, or resume a run.\n\nPresets (default: {DEFAULT}) and their parameters:\n{sizes}"


def _count_parameters(model: ModelConfig) -> int:
    """Parameters of a model whose vocabulary may not be known yet: BPE's default size stands for it."""
    return count_parameters(replace(model, vocab_size=model.vocab_size or 4096))


def _prepare(config: RunConfig, tokenizers: Sequence[Tokenizer] = ()) -> Prepared:
    prepared = Objective.named(config.training.objective).prepare(config, tokenizers)
    print(f"data       {named(config.data.data)}\n{prepared.summary()}", flush=True)
    return prepared


def _train(run: Run, prepared: Prepared, checkpoint: Path | None, initial: Run | None = None) -> int:
    config = run.config.training
    parameters = count_parameters(run.config.model)
    objective = Objective.named(config.objective)
    tokens = config.steps * objective.tokens_per_step(run.config)
    machine = choose_machine(
        config.device,
        config.precision,
        config.compile,
        run_flops=6 * parameters * tokens,
        fixed_shapes=objective.fixed_shapes,
    )
    print(f"model      {parameters / 1e6:.2f}M parameters, {tokens / 1e6:.1f}M tokens to read")
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
        if initial is not None:
            trainer.model.load_state_dict(initial.load_model().state_dict())
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
    if trainer.objective.validates:
        print(f"validation {trainer.validation} (best at step {progress.best_step})")
    print(f"run        {path}, {progress.seconds / 60:.1f} minutes of training")
    print(f"next       {NEXT[trainer.model.config.topology].format(path=path)}")
    return DONE
