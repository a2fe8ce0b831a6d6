"""`lab`: experiments on norm placement, each with a report of the published claims and the measurements."""

from __future__ import annotations

import re
import sys
import textwrap
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from minitransformer import files
from minitransformer.amounts import duration
from minitransformer.commands import DONE, FAILED, INTERRUPTED, WIDTH, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.lab.experiment import Criterion, ExperimentSettings
from minitransformer.lab.experiments import Experiment
from minitransformer.lab.report import coverage, reproduced, summary, write_lab_report
from minitransformer.lab.runner import ExperimentFolder
from minitransformer.reporting.report import REPORT, skipped
from minitransformer.tasks.progress import TerminalProgress
from minitransformer.tasks.runner import RESULTS
from minitransformer.tasks.store import REMEDY
from minitransformer.toolchain import check_importable

LIST, ALL = "list", "all"
OUTCOME, CLAIM, MEASURED = 13, 34, 29
"""column widths of the table of criteria, in characters, separated by two spaces"""


@dataclass(frozen=True)
class Options:
    """Which experiment to run, and how."""

    experiment: tyro.conf.Positional[str]
    """name of an experiment, or "list" to list them, or "all" to run every one"""
    quick: bool = False
    """run a reduced version with fewer sizes, steps and seeds"""
    out: Path | None = None
    """folder for results and report; an interrupted command continues there; None is lab/NAME, or lab/NAME-quick"""
    data: str = ExperimentSettings.data
    """training data of the experiments: a recipe or a file, as for train.py"""
    processes: int | None = None
    """number of parallel processes; None is one per CPU core"""

    @property
    def settings(self) -> ExperimentSettings:
        return ExperimentSettings(self.quick, self.data)

    def folder(self, name: str) -> Path:
        """The folder of the experiment `name`."""
        if self.out is not None:
            return self.out / name if self.experiment == ALL else self.out
        return Path("lab") / (f"{name}-quick" if self.quick else name)


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Run experiments, or list them; returns the exit code."""
    about = "Experiments on norm placement. `lab list` shows the question and the duration of each."
    options = parse(Options, arguments, prog="minitransformer lab", description=about)
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes is {options.processes}: give 1 or more, or leave it out")
    if options.experiment == LIST:
        return _list()
    if options.experiment == ALL:
        return _run_all(options)
    return _run(Experiment.named(options.experiment), options)


def _in_order() -> list[type[Experiment]]:
    """All experiments, E2 before E10."""

    def rank(name: str) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]

    return [Experiment.registry[name] for name in sorted(Experiment.registry, key=rank)]


def _list() -> int:
    margin = max(len(name) for name in Experiment.registry) + 2
    for experiment in _in_order():
        time = f"{experiment.minutes:g} min"
        title = textwrap.shorten(experiment.title, WIDTH - margin - len(time) - 2)
        print(f"{experiment.name:{margin}}{title:{WIDTH - margin - len(time)}}{time}")
        for text in (experiment.question, f"Repeats {experiment.source}"):
            print(textwrap.fill(text, WIDTH, initial_indent=" " * margin, subsequent_indent=" " * margin))
    print("\ntimes are for the full version on two CPU cores; --quick takes a fraction")
    return DONE


def _run(kind: type[Experiment], options: Options) -> int:
    """Measure, evaluate the criteria, and write the report."""
    _check_installed()
    folder = options.folder(kind.name)
    run = ExperimentFolder(folder, kind(options.settings))
    if not run.is_measured:
        run.experiment.prepare()
    print(f"experiment {kind.name}, {kind.title}", flush=True)
    with files.locked(folder / RESULTS, REMEDY):
        # Reopened, since another process may have added results while this one waited for the lock.
        run = ExperimentFolder(folder, kind(options.settings))
        try:
            failures = run.run(options.processes, TerminalProgress(kind.name))
        except KeyboardInterrupt:
            # Reread: a result being written at the interrupt may be on disk, but not in memory.
            covered = coverage(ExperimentFolder(folder, kind(options.settings)), ())
            counts = f"{covered.measured} of {covered.asked} results are in {folder}"
            print(f"\ninterrupted: {counts}; the same command continues from there", file=sys.stderr)
            return INTERRUPTED
        try:
            findings = run.conclude()
        except Exception as error:
            if not failures:
                raise
            print(f"failed     {len(failures)} tasks; no report, since too few results are left ({error})")
            return FAILED
        report = write_lab_report(run, findings, failures)
    _print_criteria(findings.criteria)
    covered = coverage(run, failures)
    spent = duration(60 * covered.processor_minutes)
    print(f"results    {covered.measured} of {covered.asked}, {spent} of processor time")
    if covered.skipped_lines:
        print(f"skipped    {skipped(covered.skipped_lines)}")
    if failures:
        print(f"failed     {len(failures)} tasks; the same command retries them")
    print(f"criteria   {summary(findings.criteria)}")
    print(f"report     {report}")
    return DONE if reproduced(findings) and not failures else FAILED


def _run_all(options: Options) -> int:
    """Run all experiments, continue after failures, and list those in the summary."""
    _check_installed()
    outcomes = {}
    left_out = _without_data(options)
    if left_out:
        names, (reason, *_) = ", ".join(left_out), left_out.values()
        print(f"left out   {names}, for lack of data: {reason}; --data FILE takes any text\n", flush=True)
    for kind in _in_order():
        if kind.name in left_out:
            continue
        outcomes[kind.name] = code = _guarded(kind, options)
        if code == INTERRUPTED:
            return INTERRUPTED
        print(flush=True)
    for name, code in outcomes.items():
        report = options.folder(name) / REPORT
        print(f"{name:10} {'done' if code == DONE else 'FAILED':8} {report if report.exists() else ''}")
    for name in left_out:
        print(f"{name:10} left out")
    return DONE if set(outcomes.values()) <= {DONE} and not left_out else FAILED


def _without_data(options: Options) -> dict[str, str]:
    """The experiments whose training data is unavailable, and why."""
    reasons: dict[Any, str | None] = {}
    left_out = {}
    for kind in _in_order():
        with suppress(UserError):  # a folder with other contents is reported when the experiment runs
            run = ExperimentFolder(options.folder(kind.name), kind(options.settings))
            if run.is_measured:
                continue
            if kind.prepare not in reasons:
                reasons[kind.prepare] = _why_not(run.experiment)
            if (reason := reasons[kind.prepare]) is not None:
                left_out[kind.name] = reason
    return left_out


def _why_not(experiment: Experiment) -> str | None:
    try:
        experiment.prepare()
    except UserError as error:
        return str(error)
    return None


@with_exit_code
def _guarded(kind: type[Experiment], options: Options) -> int:
    """`_run`, but an unexpected exception fails this experiment only."""
    try:
        return _run(kind, options)
    except (UserError, BrokenPipeError):
        raise
    except Exception:
        traceback.print_exc()
        return FAILED


def _check_installed() -> None:
    """Raises `UserError` early for packages that are needed only for the report."""
    check_importable("the laboratory needs", "lab", "matplotlib.figure", "scipy.stats")


def _print_criteria(criteria: Sequence[Criterion]) -> None:
    """Print claims and measurements side by side, in 80 columns."""
    print(f"\n{'outcome':{OUTCOME}}  {'claim':{CLAIM}}  measured\n{'-' * WIDTH}")
    for criterion in criteria:
        cells = [
            textwrap.wrap(criterion.outcome, OUTCOME),
            textwrap.wrap(criterion.claim, CLAIM),
            textwrap.wrap(criterion.measured, MEASURED),
        ]
        for line in range(max(map(len, cells))):
            outcome, claim, measured = (cell[line] if line < len(cell) else "" for cell in cells)
            print(f"{outcome:{OUTCOME}}  {claim:{CLAIM}}  {measured}".rstrip())
    print()
