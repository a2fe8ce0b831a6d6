"""`sweep`: hyper-parameter search over a preset, in parallel, with a report."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from typing_extensions import Doc

from minitransformer import files
from minitransformer.analysis.search_space import Range, SweptSetting, Values, label
from minitransformer.analysis.sweep import SweepFolder
from minitransformer.analysis.sweep_plan import SweepPlan
from minitransformer.analysis.sweep_report import (
    best_seed,
    conclusion,
    diverged,
    extreme,
    method,
    outcome_text,
    standings_table,
    train_command,
    write_sweep_report,
)
from minitransformer.commands import DONE, FAILED, INTERRUPTED, SMALLEST, parse, table_width, with_exit_code, with_files
from minitransformer.commands.settings_flags import parse_with_settings
from minitransformer.diagnostics import check_probe
from minitransformer.errors import UserError, suggestion
from minitransformer.evaluation.metrics import Metric
from minitransformer.processes import processors
from minitransformer.registry import lookup
from minitransformer.reporting import plain
from minitransformer.reporting.report import skipped
from minitransformer.settings import kinds, names_with
from minitransformer.tasks.progress import TerminalProgress
from minitransformer.tasks.runner import RESULTS
from minitransformer.tasks.store import REMEDY
from minitransformer.tasks.task import Failure
from minitransformer.text.corpora import named
from minitransformer.toolchain import check_importable
from minitransformer.training.config import RunConfig
from minitransformer.training.logging import TensorBoard
from minitransformer.training.machine import choose_device
from minitransformer.training.presets import DEFAULT, PRESETS

PROGRAM = "minitransformer sweep [PRESET]"
MOST_ROWS = 40
"""rows of the table on the terminal; the report has more, and trials.csv has all"""
JUDGES = [name for name, metric in Metric.registry.items() if metric.lower_is_better is not None]
METRIC = Doc(
    f"metric of trials, whose best value is sought: {', '.join(JUDGES)}; None is validation_loss, or bits_per_byte "
    "if tokenizers differ"
)
ABOUT = """Search hyper-parameters of a preset. Each trial is a run, as train.py makes it.

  --set lr=1e-3,3e-3 --set residual=pre,post  all combinations
  --set lr=1e-4..1e-2 --random 20             20 draws, log-uniform if wide
  --seeds 0,1,2                               three seeds per combination
  --halving 3                                 successive halving: the best third

Settings are named as the flags of train.py; flags given here apply to all trials. Repeating the command continues an \
interrupted sweep."""


@dataclass(frozen=True)
class Options:
    """What to vary, and how trials are chosen; all other flags apply to every trial."""

    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """a setting with its values (lr=1e-3,3e-3) or, for --random, its range (lr=1e-4..1e-2)"""
    seeds: str | None = None
    """seeds per combination, such as 0,1,2 or 0..4; None is --seed"""
    random: int | None = None
    """number of combinations to draw; None is the full grid"""
    draw_seed: int = 0
    """random seed of the draws"""
    halving: int | None = None
    """successive halving: at each rung, the best 1/N of the trials continue for N times the steps; None is off"""
    metric: Annotated[str | None, METRIC] = None
    smallest_difference: Annotated[float | None, SMALLEST] = None
    out: Path | None = None
    """folder for trials and report; an interrupted sweep continues there; None is sweeps/PRESET-SETTINGS"""
    processes: int | None = None
    """number of parallel trials, of one thread each; None is one per CPU core, or one on a GPU"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Search; returns the exit code."""
    has_preset = bool(arguments) and not arguments[0].startswith("-")
    preset = arguments[0] if has_preset else DEFAULT
    base = lookup("preset", preset, PRESETS)
    options, config = parse_with_settings(Options, arguments[has_preset:], base, prog=PROGRAM, description=ABOUT)
    plan = _plan(preset, options, replace(config, data=with_files(config.data)))
    processes = _check(options, plan)
    folder = options.out or Path("sweeps") / "-".join([preset, *(setting.name for setting in plan.settings)])
    SweepFolder(folder, plan)
    _print_plan(plan, folder, processes)
    for prepared in plan.prepare():
        print(f"{prepared.summary()}", flush=True)
    command = shlex.join(["python", "-m", "minitransformer", "sweep", *arguments])
    with files.locked(folder / RESULTS, REMEDY):
        # Reopened, since another process may have added results while this one waited for the lock.
        sweep = SweepFolder(folder, plan)
        try:
            failures = sweep.run(processes, TerminalProgress)
        except KeyboardInterrupt:
            # Reread: a result being written at the interrupt may be on disk, but not in memory.
            counts = f"{len(SweepFolder(folder, plan).results())} results are in {folder}"
            print(f"\ninterrupted: {counts}; the same command continues from there", file=sys.stderr)
            return INTERRUPTED
        return _report(sweep, failures, command)


def _plan(preset: str, options: Options, base: RunConfig) -> SweepPlan:
    settings = tuple(_setting(text) for text in options.set)
    names = [setting.name for setting in settings]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--set names {name} {names.count(name)} times: give all of its values at once")
    of_tokens = names_with(RunConfig, "changes_tokens")
    if options.metric is not None:
        lookup("metric", options.metric, dict.fromkeys(JUDGES))
    tokens_differ = any(s.name in of_tokens and not (isinstance(s, Values) and len(s.values) == 1) for s in settings)
    return SweepPlan(
        preset,
        base,
        settings,
        seeds=(base.training.seed,) if options.seeds is None else _seeds(options.seeds),
        random=options.random,
        draw_seed=options.draw_seed,
        halving=options.halving,
        metric=options.metric or ("bits_per_byte" if tokens_differ else "validation_loss"),
        smallest_difference=options.smallest_difference,
    )


def _setting(text: str) -> SweptSetting:
    """The setting in `text`, such as lr=1e-3,3e-3 or lr=1e-4..1e-2, with values as train.py reads them."""
    name, _, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if not values.strip():
        raise UserError(f"--set {text} has no values: write it as --set {name or 'lr'}=VALUE,VALUE")
    if name == "seed":
        raise UserError("seed cannot be swept with --set: give the seeds of every trial with --seeds")
    if name not in kinds(RunConfig):
        nearest = suggestion(name, kinds(RunConfig))
        raise UserError(f"unknown setting {name!r}: {nearest}The names are those of the flags in --help")
    if (ends := re.fullmatch(r"\s*([^,]+?)\.\.([^,]+?)\s*", values)) is not None:
        return _range(name, *(_value(name, end) for end in ends.groups()))
    return Values(name, tuple(dict.fromkeys(_value(name, word.strip()) for word in values.split(","))))


def _range(name: str, low: Any, high: Any) -> Range:
    if any(isinstance(end, bool) or not isinstance(end, int | float) for end in (low, high)):
        raise UserError(f"{name} is not a number, so it has no range {low}..{high}: list its values")
    if not low < high:
        raise UserError(f"the range {low}..{high} of {name} is empty: give the lower end first")
    return Range(name, low, high)


def _value(name: str, word: str) -> Any:
    """`word`, parsed as the value of the setting's flag of train.py; exits on a parse error."""
    hint = kinds(RunConfig)[name]
    if str(hint).startswith("tuple"):
        raise UserError(f"{name} is a list, which cannot be swept: give it as a flag")
    if hint in (bool, bool | None):
        known = {"true": True, "false": False} if hint is bool else {"true": True, "false": False, "none": None}
        return lookup(f"value of {name}", word.lower(), known)
    # A single value may not be valid on its own: only whole configurations are checked.
    single = make_dataclass("Single", [(name, hint, field())], frozen=True)
    return getattr(parse(single, [f"--{name.replace('_', '-')}={word}"], prog=PROGRAM), name)


def _seeds(text: str) -> tuple[int, ...]:
    """0,1,2 or 0..4."""
    try:
        if (ends := re.fullmatch(r"\s*(\d+)\.\.(\d+)\s*", text)) is not None:
            return tuple(range(int(ends[1]), int(ends[2]) + 1))
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise UserError(f"--seeds {text} are not integers: write them as 0,1,2 or 0..4") from None


def _check(options: Options, plan: SweepPlan) -> int:
    """Raises `UserError` early for options that would fail later; returns the number of processes."""
    check_importable("sweeps need", "lab", "matplotlib.figure", "scipy.stats")
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes is {options.processes}: give 1 or more, or leave it out")
    if plan.base.training.tensorboard:
        TensorBoard.check()
    check_probe(plan.base)
    plan.check()
    device = choose_device(plan.base.training.device)
    return options.processes or (processors() if device.type == "cpu" else 1)


def _print_plan(plan: SweepPlan, folder: Path, processes: int) -> None:
    print(f"sweep      {plan.preset}")
    for setting in plan.settings:
        print(_wrapped(f"{setting.name:10} {setting}", 11))
    print(_wrapped(f"trials     {method(plan)}", 11))
    warmup = plan.shared.training.warmup_steps
    if (first := plan.rungs[0]) is not None and first <= warmup:
        print(_wrapped(f"note       the first rung ends at step {first}, within the {warmup} steps of warm-up", 11))
    print(f"processes  {processes}, of one thread{' each' * (processes > 1)}")
    print(f"folder     {folder}")
    print(f"data       {named(plan.shared.data.data)}", flush=True)


def _wrapped(text: str, margin: int) -> str:
    return textwrap.fill(
        text, table_width(), subsequent_indent=" " * margin, break_long_words=False, break_on_hyphens=False
    )


def _report(sweep: SweepFolder, failures: Sequence[Failure], command: str) -> int:
    """Print the results, and write the report."""
    if not sweep.results():
        print(f"failed     all {len(failures)} trials; the same command retries them")
        return FAILED
    said = conclusion(sweep)
    report = write_sweep_report(sweep, said, failures, command)
    for table in filter(None, (standings_table(sweep), said.pairs)):
        print(f"\n{plain.plain_table(table.columns, table.rows[:MOST_ROWS], table_width())}\n")
        if len(table.rows) > MOST_ROWS:
            print(f"and {len(table.rows) - MOST_ROWS} more, in {report}\n")
    plan, best = sweep.plan, sweep.standings(len(sweep.plan.rungs))[0]
    if (sentence := diverged(sweep.all_standings())) is not None:
        print(_wrapped(f"diverged   {sentence}", 11))
    if sweep.store.skipped:
        print(_wrapped(f"skipped    {skipped(sweep.store.skipped)}", 11))
    if failures:
        print(f"failed     {len(failures)} trials; the same command retries them")
    if not best.values or best.interval is None:
        print(f"{extreme(plan):10} none: no combination has a finite metric for all of its seeds")
    else:
        print(_wrapped(f"{extreme(plan):10} {label(best.combination)}: {plan.judge.title} {outcome_text(best)}", 11))
        print(_wrapped(f"ranking    {said.text}", 11))
        print(f"repeat     {train_command(plan, best)}")
        print(f"run        {sweep.path(best.combination, best_seed(plan, best))}")
    print(f"report     {report}")
    return FAILED if failures else DONE
