"""`train`: prepare the data, train a model, and print the run folder and the next commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

from typing_extensions import Doc

from minitransformer.amounts import amount, duration
from minitransformer.commands import (
    DONE,
    HELP,
    NON_FINITE,
    given_flags,
    reads_standard_input,
    with_exit_code,
    with_files,
)
from minitransformer.commands.settings_flags import parse_with_settings
from minitransformer.diagnostics import check_probe
from minitransformer.errors import UserError
from minitransformer.files import writing
from minitransformer.models.model import Model, count_parameters, count_trained
from minitransformer.pretrained.checkpoint import is_checkpoint
from minitransformer.processes import is_launched
from minitransformer.registry import lookup
from minitransformer.runs import CONFIG, REMEDY, Run, claimed_run_path, only_writer_of
from minitransformer.runs.begin import (
    begin_run,
    check_fits_run,
    check_possible,
    check_same_data,
    initial_model,
    with_chat_template,
    with_class_names,
)
from minitransformer.runs.importing import as_run
from minitransformer.runs.resume import changed_settings, check_can_resume, check_same_text, checkpoint_to_resume
from minitransformer.runs.teaching import with_teacher
from minitransformer.runs.trainer import build_trainer, open_log
from minitransformer.text.corpora import named, short_name
from minitransformer.text.datasets import Conversations, PreparedData
from minitransformer.training.checkpoint import check_room, checkpoint_step
from minitransformer.training.config import RunConfig, with_usual_vocabulary, with_vocabulary
from minitransformer.training.divergence import NonFiniteTraining
from minitransformer.training.finetuning import fine_tuning, prepare_fine_tuning
from minitransformer.training.logging import Log, TensorBoard, Terminal
from minitransformer.training.loop import Trainer
from minitransformer.training.machine import Machine
from minitransformer.training.outcome import describe
from minitransformer.training.presets import DEFAULT, PRESETS
from minitransformer.training.ranks import Ranks, check_gpus, joined_ranks, spoken_by_main
from minitransformer.training.run_machine import SETTINGS, machine_again, machine_for
from minitransformer.training.signals import StopRequest
from minitransformer.training.weights import Parent

CLASSIFY = 'python sample.py {path} --prompt "..."'
CHAT = "python sample.py {path} --chat"
TRANSLATE = 'echo "..." | python sample.py {path}'
NEXT = {
    "decoder": 'python sample.py {path} --prompt "..."',
    "encoder-classifier": CLASSIFY,
    "decoder-classifier": CLASSIFY,
    "encoder": 'python sample.py {path} --prompt "... <mask> ..."',
    "encoder-decoder": TRANSLATE,
    "rnn": TRANSLATE,
}

OF_RANKS = {"parallel", "tensor_parallel"}
FINE_TUNING = Doc(
    "fine-tune: start a new run from the model, weights and tokenizer of this run folder, or of a public checkpoint (a "
    "folder, or a name on the Hugging Face hub), which is imported first; by default with a tenth of its learning "
    "rates, and at most 20 warm-up steps, 1000 steps and 1024 tokens per sequence"
)


@dataclass(frozen=True)
class Options:
    """The run folder, and what the run starts from."""

    out: Path | None = None
    """folder of the new run; None is runs/PRESET-DATA"""
    resume: Path | None = None
    """continue the run in this folder; --steps extends it, other flags change it from here on"""
    checkpoint: str | None = None
    """checkpoint to start from; None is the latest with --resume, the best with --init-from"""
    init_from: Annotated[str | None, FINE_TUNING] = None


Given = TypeVar("Given", bound=Options)


@spoken_by_main()
@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Train, or resume, in one process or in those that `torchrun` has started; returns the exit code."""
    with joined_ranks() as ranks:
        if ranks.begun is not None and (ranks.begun / CONFIG).exists():
            return ranks.ended(_restart(ranks.begun, arguments, ranks))
        resume = folder_option(arguments, "--resume")
        return ranks.ended(_begin(arguments, ranks) if resume is None else _resume(resume, arguments, ranks))


def _begin(arguments: Sequence[str], ranks: Ranks) -> int:
    initial = text_option(arguments, "--init-from")
    if initial is not None and not (HELP & set(arguments) and is_checkpoint(initial)):
        return _fine_tune(initial, arguments, ranks)
    preset, flags = preset_and_flags(arguments)
    options, config = _parse(flags, lookup("preset", preset, PRESETS), ranks)
    print(f"preset     {preset}", flush=True)  # the next line has to wait for more of torch
    ranks.from_main(lambda: check_possible(config, options.out, ranks))
    return _train_new(options, preset, config, ranks.first_on_node(config.prepare), ranks)


def _fine_tune(initial: str, arguments: Sequence[str], ranks: Ranks) -> int:
    source, usual = open_parent(initial, arguments, ranks)
    options, config = _parse(arguments, usual, ranks)
    config = with_chat_template(config, source)
    weights = source.checkpoint(options.checkpoint)
    size = f"{source.config.model.topology} of {amount(count_parameters(source.config.model.base))} parameters"
    if source.path != Path(initial):
        print(f"imported   {initial}")
    print(f"from       {source.path} ({size}, {weights.name})", flush=True)
    check_fits_run(source, config)
    ranks.from_main(lambda: check_possible(config, options.out, ranks, source))
    whole, prepared = ranks.first_on_node(lambda: prepare_fine_tuning(config, usual, source.tokenizers))
    start = Parent.of(source.path, weights), partial(initial_model, source, weights.name)
    return _train_new(options, Path(initial).resolve().name, whole, prepared, ranks, start)


def _train_new(
    options: Options,
    name: str,
    config: RunConfig,
    prepared: PreparedData,
    ranks: Ranks,
    start: tuple[Parent, Callable[[RunConfig], Model]] | None = None,
) -> int:
    """Train a new run; of `start`, from its parent and the model made from it."""
    check_same_data(ranks, prepared)
    _print_data(config, prepared)
    if start is not None and (length := config.training.sequence_length) is not None:
        print(f"sequences  {length:,} tokens, of a context of {config.model.context_length:,}")
    config = replace(config, model=with_vocabulary(config.model, prepared))
    config = with_teacher(config, prepared)
    ranks.from_main(lambda: check_room(options.out or Path("runs"), config))
    machine = ranks.from_main(lambda: machine_for(config))
    named_by_us = f"{name}-{short_name(config.data.data)}"
    path = options.out or ranks.begun or ranks.from_main(lambda: claimed_run_path(named_by_us))
    ranks.use_run(path)
    with only_writer_of(ranks, path):

        def begin() -> Run:
            known = () if start is None else (start[0], start[1](config))
            return begin_run(path, config, prepared, machine.resolved, *known)

        run = ranks.main_first(begin, lambda: Run.open(path))
        initial = None if start is None else run.checkpoint_to_continue()
        return _train(run, prepared, machine, ranks, initial=initial)


def preset_and_flags(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The preset, which is the first word or the default, and the flags after it."""
    has_preset = bool(arguments) and not arguments[0].startswith("-")
    return arguments[0] if has_preset else DEFAULT, arguments[has_preset:]


def open_parent(name: str, arguments: Sequence[str], ranks: Ranks) -> tuple[Run, RunConfig]:
    """The run that a fine-tune starts from, and the default configuration of the fine-tune.

    A public checkpoint becomes a run first, beside the new one.
    """
    if arguments and not arguments[0].startswith("-"):
        raise UserError(f"--init-from {name} determines the model: leave the preset {arguments[0]!r} out")
    out = folder_option(arguments, "--out")
    run = ranks.from_main(lambda: as_run(name, Path("runs") if out is None else out.parent))
    source, new_data = Run.open(run), "data" in given_flags(arguments)
    adapter = text_option(arguments, "--adapter") or "none"
    usual = fine_tuning(source.config, from_scratch=source.parent is None, new_data=new_data, adapter=adapter)
    return source, with_class_names(usual, source.class_names)


def folder_option(arguments: Sequence[str], flag: str) -> Path | None:
    """The folder that `flag` names, which determines the defaults of the other flags."""
    name = text_option(arguments, flag)
    return None if name is None else Path(name)


def text_option(arguments: Sequence[str], flag: str) -> str | None:
    """The value of `flag`, read before the others."""
    parser = argparse.ArgumentParser(prog="train.py", add_help=False, allow_abbrev=False)
    parser.add_argument(flag, dest="value")
    value: str | None = parser.parse_known_args(arguments)[0].value
    return value


def _resume(path: Path, arguments: Sequence[str], ranks: Ranks) -> int:
    run = Run.open(path)
    options, config = _parse(arguments, run.config, ranks)
    check_can_resume(run)
    if config.training.tensorboard:
        TensorBoard.check()
    ranks.use_run(path)
    with only_writer_of(ranks, path):
        return _continue(Run.open(path), config, options.checkpoint, ranks)  # reopened under the lock


def _restart(path: Path, arguments: Sequence[str], ranks: Ranks) -> int:
    """Continue the run that ranks of this launch have begun, from its latest checkpoint, with the same flags."""
    _, config = _parse(preset_and_flags(arguments)[1], Run.open(path).config, ranks)
    ranks.use_run(path)
    with only_writer_of(ranks, path):
        return _continue(Run.open(path), config, None, ranks)


def _continue(run: Run, config: RunConfig, wanted: str | None, ranks: Ranks) -> int:
    changes = changed_settings(run.config, config, silent=() if run.machine is None else SETTINGS)
    checkpoint = checkpoint_to_resume(run, config, wanted)
    anew = [name for name in SETTINGS if getattr(run.config.training, name) != getattr(config.training, name)]
    machine, others = ranks.from_main(lambda: machine_again(run.machine, config, anew))
    for change in (*changes, *others):
        print(f"changed    {change}")
    if checkpoint is None:
        print(f"checkpoint none yet: {run.path} starts at step 0", flush=True)
    prepared = ranks.first_on_node(lambda: config.prepare(run.tokenizers))
    _print_data(config, prepared)
    check_same_text(run, config, prepared)
    ranks.from_main(lambda: check_room(run.path, config))
    run = ranks.main_first(lambda: run.reconfigured(config, machine.resolved), lambda: Run.open(run.path))
    return _train(run, prepared, machine, ranks, checkpoint=checkpoint)


def _parse(arguments: Sequence[str], base: RunConfig, ranks: Ranks) -> tuple[Options, RunConfig]:
    if not is_launched() and (flags := OF_RANKS & given_flags(arguments)):
        flag = f"--{min(flags).replace('_', '-')}"
        raise UserError(f"{flag} is for several processes, and this is one: start it with torchrun, or leave it out")
    about = _describe_presets() if HELP & set(arguments) else ""
    return parse_run(Options, arguments, base, ranks, prog="train.py [PRESET]", description=about)


def parse_run(
    kind: type[Given], arguments: Sequence[str], base: RunConfig, ranks: Ranks, **about: str
) -> tuple[Given, RunConfig]:
    """Parse a command's own options, and the flags that change `base`, to become a run that `ranks` can train."""
    options, config = parse_with_settings(kind, arguments, base, **about)
    if options.resume is not None and options.init_from is not None:
        raise UserError("--resume continues a run, and --init-from starts one: give one of them")
    if options.checkpoint is not None and options.resume is None and options.init_from is None:
        raise UserError(f"--checkpoint {options.checkpoint} needs a run: name it with --resume or --init-from")
    return options, trainable(config, ranks)


def trainable(config: RunConfig, ranks: Ranks) -> RunConfig:
    """`config` with standard input, which rank 0 reads, in a file; raises `UserError` if `ranks` cannot train it."""
    check_probe(config)
    config.check_trainable()
    ranks.use_timeout(config.training.rank_timeout)
    ranks.check_launch(config.training.device, standard_input=reads_standard_input(config.data))
    return replace(config, data=ranks.from_main(lambda: with_files(config.data)))


def _describe_presets() -> str:
    from minitransformer.exporting.formats import formats_of  # late: training needs nothing of it

    lines = "\n".join(
        f"  {name:18}{count_parameters(with_usual_vocabulary(run)) / 1e6:7.2f}M  {', '.join(formats_of(run.model))}"
        for name, run in PRESETS.items()
    )
    return (
        f"Train a model, resume a run, or fine-tune one.\n\nPresets (default: {DEFAULT}), their parameters with the "
        f"tokenizer's usual vocabulary, and the formats of `minitransformer export` that hold them:\n{lines}"
    )


def _print_data(config: RunConfig, prepared: PreparedData) -> None:
    print(f"data       {named(config.data.data)}\n{prepared.summary()}", flush=True)


def _train(
    run: Run,
    prepared: PreparedData,
    machine: Machine,
    ranks: Ranks,
    *,
    initial: Path | None = None,
    checkpoint: Path | None = None,
) -> int:
    config = run.config.training
    check_gpus(ranks, machine.device)
    tokens = config.steps * run.config.tokens_per_step
    size, trained = count_parameters(run.config.model), count_trained(run.config.model)
    part = "" if trained == size else f", of which {amount(trained)} are trained"
    print(f"model      {amount(size)} parameters{part}, {amount(tokens)} tokens to read")
    count = f"{ranks.size} ranks ({config.parallel.name}), each " if ranks.size > 1 else ""
    print(f"machine    {count}{machine.description}{ranks.unused_cores(machine.device)}")
    print(f"run        {run.path}", flush=True)
    with StopRequest() as stop, writing(run.path, REMEDY):
        done = 0 if checkpoint is None else checkpoint_step(checkpoint)
        log = open_log(run, done, Terminal(steps=config.steps, done=done)) if ranks.is_main else Log()
        trainer = build_trainer(run, prepared, machine, log, stop, ranks, initial=initial, checkpoint=checkpoint)
        if config.eval_every < config.steps and str(trainer.validator):
            log.line(str(trainer.validator))
        try:
            trainer.train()
            stopped = stop.agreed(ranks)
            if not stopped:
                trainer.write_last_sample()
        except NonFiniteTraining as error:
            log.line(f"error: {error}")
            return NON_FINITE
        finally:
            log.close()
        return _stopped(trainer, stop) if stopped else _report(trainer)


def _stopped(trainer: Trainer, stop: StopRequest) -> int:
    path, step, command = trainer.folder, trainer.progress.step, trainer.ranks.command()
    print(f"stopped at step {step}, which is saved; to continue:\n\n    {command} --resume {path}\n")
    return stop.exit_code


def _report(trainer: Trainer) -> int:
    path, progress = trainer.folder, trainer.progress
    if trainer.stopped_early:
        print(f"stopped early at step {progress.step}: no improvement in {progress.validations_since_best} validations")
    if trainer.validation is not None:
        print(*describe(trainer.validation, progress, path / "metrics.jsonl", trainer.config.eval_every), sep="\n")
    print(f"curves     python -m minitransformer compare {path}")
    print(f"run        {path}, {duration(progress.seconds)} of training")
    config = trainer.learner.config
    is_chat = config.data.dataset.variant is Conversations
    print(f"next       {(CHAT if is_chat else NEXT[config.model.topology]).format(path=path)}")
    return DONE
