"""The report of an experiment: `report.html`, a CSV file per table, a PNG file per picture."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from minitransformer import files
from minitransformer.lab.experiment import Criterion, Experiment, ExperimentSettings, Findings
from minitransformer.lab.runner import ExperimentFolder
from minitransformer.reporting.pages import Link, Page
from minitransformer.reporting.report import REPORT, add_facts, add_picture, add_table, csv_text, failed, skipped
from minitransformer.reporting.statistics import FEWEST_SEEDS
from minitransformer.reporting.tables import Picture, Table
from minitransformer.tasks.runner import RESULTS
from minitransformer.tasks.store import REMEDY
from minitransformer.tasks.task import Failure, task_key

Titled = TypeVar("Titled", Table, Picture)

OUTCOMES = ("passed", "FAILED", "holds", "does not hold", "open")
KNOWN_RULE = (
    "A known result is reproduced if the 95 % confidence interval of the mean over seeds lies within the accepted "
    "range, fails if it lies outside,  and is open if it crosses an end."
)
TRIAL_RULE = (
    "Each claim about a gain is decided by a paired t test at 5 %, with Holm's correction for the number of "
    f"claims in the experiment; with fewer than {FEWEST_SEEDS} paired seeds it is open. Intervals are uncorrected, "
    "at 95 %."
)


def reproduced(findings: Findings) -> bool:
    """Whether every criterion that must hold does, or is open."""
    return not any(criterion.must_hold and criterion.holds is False for criterion in findings.criteria)


def summary(criteria: Sequence[Criterion]) -> str:
    """The numbers of criteria by outcome, in one line."""
    known, trial = _split(criteria)
    parts = [f"{what}: {_counts(some)}" for what, some in (("known results", known), ("on trial", trial)) if some]
    return "; ".join(parts) or "none"


def _split(criteria: Sequence[Criterion]) -> tuple[list[Criterion], list[Criterion]]:
    """Those that must hold, and those on trial."""
    known = [criterion for criterion in criteria if criterion.must_hold]
    return known, [criterion for criterion in criteria if not criterion.must_hold]


def _counts(criteria: Sequence[Criterion]) -> str:
    counts = Counter(criterion.outcome for criterion in criteria)
    return ", ".join(f"{counts[name]} {name}" for name in OUTCOMES if counts[name])


@dataclass(frozen=True)
class Coverage:
    """How many of the tasks are measured."""

    asked: int
    measured: int
    skipped_lines: int
    failures: Sequence[Failure]
    processor_minutes: float

    def sentences(self) -> list[str]:
        """The coverage in sentences for the report."""
        said = [
            f"{self.measured} of {self.asked} results were measured, in {self.processor_minutes:.1f} minutes of one "
            "processor."
        ]
        if self.skipped_lines:
            said.append(skipped(self.skipped_lines))
        return [*said, *failed(self.failures, "Tasks")]


def coverage(run: ExperimentFolder, failures: Sequence[Failure]) -> Coverage:
    """The coverage of `run` after a command with `failures`."""
    measured = run.results()
    seconds = sum(run.store.seconds[task_key(result.task)] for result in measured)
    return Coverage(len(run.asked()), len(measured), run.store.skipped, failures, seconds / 60)


def lab_command(name: str, settings: ExperimentSettings) -> str:
    """The command that repeats the experiment."""
    words = ["python", "-m", "minitransformer", "lab", name]
    words += ["--quick"] * settings.quick
    words += [] if settings.data == ExperimentSettings.data else ["--data", settings.data]
    return shlex.join(words)


def write_lab_report(run: ExperimentFolder, findings: Findings, failures: Sequence[Failure] = ()) -> Path:
    """Write the report to the folder of `run`; returns the path of the page.

    Raises `UserError` if the folder is not writable, and without matplotlib if there are pictures.
    """
    folder = run.folder
    with files.writing(folder / REPORT, REMEDY):
        folder.mkdir(parents=True, exist_ok=True)
        covered = coverage(run, failures)
        page = _head(run.experiment, covered)
        _criteria(page, findings.criteria)
        if findings.pictures:
            page.heading("Figures")
        for picture, name in _named(findings.pictures):
            add_picture(page, picture, folder / f"{name}.png")
        for table, name in _named(findings.tables):
            files.write_text(folder / f"{name}.csv", csv_text(table))
            add_table(page, table, f"{name}.csv")
        if findings.remarks:
            page.heading("Remarks")
            for remark in findings.remarks:
                page.paragraph(remark)
        _repeat(page, run, covered, [name for _, name in _named(findings.pictures)])
        files.write_text(folder / REPORT, page.html())
    return folder / REPORT


def _named(things: Iterable[Titled]) -> Iterator[tuple[Titled, str]]:
    """Each with a unique file name made from its title."""
    taken: dict[str, int] = {}
    for thing in things:
        name = re.sub(r"[^a-z0-9]+", "-", thing.title.lower()).strip("-")[:60] or "untitled"
        taken[name] = taken.get(name, 0) + 1
        yield thing, name if taken[name] == 1 else f"{name}-{taken[name]}"


def _head(experiment: Experiment, covered: Coverage) -> Page:
    page = Page(f"{experiment.name}: {experiment.title}")
    page.paragraph(experiment.question)
    page.paragraph(f"Reproduces: {experiment.source.rstrip('.')}.")
    if experiment.settings.quick:
        page.paragraph("This is the reduced version, with fewer sizes, steps and seeds.")
    if covered.measured < covered.asked:
        page.paragraph(f"The experiment is incomplete: {covered.measured} of {covered.asked} results are available.")
    return page


def _criteria(page: Page, criteria: Sequence[Criterion]) -> None:
    known, trial = _split(criteria)
    if known:
        page.heading("What must hold")
        page.paragraph(f"Known results; a failure is a defect of the code or of the claim. {_sentence(known)}")
        page.paragraph(KNOWN_RULE)
        page.table(*_claims(known))
    if trial:
        page.heading("What is on trial")
        page.paragraph(f"Claims whose outcome is published either way. {_sentence(trial)}")
        page.paragraph(TRIAL_RULE)
        page.table(*_claims(trial))


def _sentence(criteria: Sequence[Criterion]) -> str:
    of = "Of one" if len(criteria) == 1 else f"Of {len(criteria)}"
    return f"{of}: {_counts(criteria)}."


def _claims(criteria: Sequence[Criterion]) -> tuple[list[str], list[tuple[str, str, str]]]:
    rows = [(criterion.outcome, criterion.claim, criterion.measured) for criterion in criteria]
    return ["outcome", "claim", "measured"], rows


def _repeat(page: Page, run: ExperimentFolder, covered: Coverage, pictures: Sequence[str]) -> None:
    page.heading("How to reproduce this")
    page.code(lab_command(run.experiment.name, run.experiment.settings))
    page.links("All results, as JSON lines:", [Link(RESULTS, RESULTS)])
    if pictures:
        page.links("All figures:", [Link(f"{name}.png", f"{name}.png") for name in pictures])
    for sentence in covered.sentences():
        page.paragraph(sentence)
    commits = list(dict.fromkeys(record["commit"] for record in run.records))
    if len(commits) > 1:
        page.paragraph(f"The results come from several commits: {', '.join(commits)}.")
    if any(commit.endswith("-dirty") for commit in commits):
        page.paragraph("A commit that ends in -dirty had uncommitted changes.")
    facts = {**(run.records[-1] if run.records else {}), "data": run.experiment.settings.data}
    facts["seeds"] = _ranges({task["seed"] for task in run.asked() if isinstance(task.get("seed"), int)})
    add_facts(page, facts)


def _ranges(numbers: Iterable[int]) -> str:
    """`numbers` as text with ranges: 0–4, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}–{high}" for low, high in runs)
