"""`data`: what a text holds that is better left out (`report`), and the text without it (`clean`)."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from typing_extensions import Doc

from minitransformer.amounts import size
from minitransformer.analysis.data_report import data_page, tables_of, write_report
from minitransformer.commands import DONE, check_outputs, table_width, task_of, with_exit_code
from minitransformer.commands.settings_flags import Group, parse_groups
from minitransformer.errors import UserError
from minitransformer.reporting.plain import titled_table
from minitransformer.settings import Chosen, declared
from minitransformer.text.cleaning.config import DUPLICATES, CleaningConfig
from minitransformer.text.cleaning.formats import UNITS
from minitransformer.text.cleaning.normalising import TextNormalisation
from minitransformer.text.cleaning.personal import PersonalData
from minitransformer.text.cleaning.quality import QualityRule
from minitransformer.text.cleaning.summary import summary_of
from minitransformer.text.cleaning.verdicts import judge, open_job
from minitransformer.text.cleaning.writing import REMOVED, REPORT_JSON, REPORT_PAGE, check_out, write_cleaned

ABOUT = {
    "report": "Say what a text holds that is better left out of training, without changing or writing any of it.",
    "clean": "Write a text without what is better left out of training; the files that are read stay as they are.",
}
OFF = "off"
NORMALISE = Doc(f"changes of the text, {OFF} or some of {', '.join(TextNormalisation.registry)}")
MASK = Doc(f"kinds of personal data to replace by a mark such as <EMAIL>: {', '.join(PersonalData.registry)}")
RULES = Doc(f"quality rules, whose settings are below: {', '.join(QualityRule.registry)}")
UNIT = Doc(f"what of a plain text is a document: {', '.join(UNITS)}; the whole file is the first")
SEARCH = Doc(f"duplicates to remove: {', '.join(DUPLICATES)}; near ones include the exact ones")


@dataclass(frozen=True)
class Options:
    """Which text to look at, and for what."""

    data: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PATH")]
    """text, as --data of train.py takes it: files, folders, globs or recipes"""
    out: Path | None = None
    """for clean: new folder for the cleaned files, report.json, report.html and removed.jsonl"""
    json: Path | None = None
    """for report: file for the findings as JSON"""
    html: Path | None = None
    """for report: file for the findings as a page"""
    field: str = "text"
    """field of each .jsonl line or table row that holds the text"""
    unit: Annotated[str, UNIT] = UNITS[0]
    normalise: Annotated[tuple[str, ...], NORMALISE] = CleaningConfig.normalise
    mask: Annotated[tuple[str, ...], MASK] = ()
    duplicates: Annotated[str, SEARCH] = CleaningConfig.duplicates
    alike: float = CleaningConfig.alike
    """share of words, in the same order, from which on documents are near duplicates"""
    against: tuple[str, ...] = ()
    """held-out text, such as validation or test files: documents that share words with it are removed"""
    leak_words: int = CleaningConfig.leak_words
    """how many words in a row a document may not share with held-out text"""
    rules: Annotated[tuple[str, ...], RULES] = ()
    tokenizer: str | None = None
    """tokenizer.json of a run, whose tokens per byte are counted in a sample of about 32 MB"""
    workers: int | None = None
    """processes; None is one per core. The result is the same whatever their number"""


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Report or clean; returns the exit code."""
    task = task_of("data", arguments, ABOUT, "PATH... [options]")
    options, settings = parse_groups(
        Options, arguments[1:], _groups(), {}, prog=f"minitransformer data {task}", description=ABOUT[task]
    )
    _check_together(task, options)
    job = open_job(options.data, _config(options, settings), options.workers)
    if options.out is not None:
        check_out(options.out, job)
    verdicts = judge(job)
    summary = summary_of(job, verdicts)
    print(*(titled_table(table, table_width()) for table in tables_of(summary)), sep="\n\n")
    if options.out is not None:
        write_cleaned(options.out, job, verdicts)
        write_report(options.out / REPORT_PAGE, data_page(summary, options.out / REMOVED))
        write_report(options.out / REPORT_JSON, json.dumps(summary, indent=2))
        print(f"\ncleaned    {options.out}, {size(summary['after']['bytes'])}")
        print(f"removed    {options.out / REMOVED}: which documents, and why")
        print(f"page       {options.out / REPORT_PAGE}")
    if options.json is not None:
        write_report(options.json, json.dumps(summary, indent=2))
    if options.html is not None:
        write_report(options.html, data_page(summary))
    return DONE


def _groups() -> list[Group]:
    return [
        Group(f"rule {rule.name}", (rule.__doc__ or "").partition("\n")[0], list(declared(rule.Settings, rule)))
        for rule in QualityRule.registry.values()
        if declared(rule.Settings, rule)
    ]


def _check_together(task: str, options: Options) -> None:
    """Raises `UserError` for flags that do not belong to the task, or have no effect beside the others."""
    if not options.data:
        raise UserError(f"data {task} needs data: name files, folders, globs or recipes")
    if task == "report" and options.out is not None:
        raise UserError("--out is for clean, and a report writes no text: give --json or --html, or leave it out")
    if task == "clean" and options.out is None:
        raise UserError("clean needs a new folder: name one with --out")
    if task == "clean" and (options.json or options.html):
        raise UserError("--json and --html are for report: clean writes both into its --out, so leave them out")
    check_outputs({"--json": options.json, "--html": options.html}, new=False)
    if options.alike != CleaningConfig.alike and options.duplicates != "near":
        raise UserError(f"--alike is for near duplicates, and --duplicates is {options.duplicates}: leave it out")
    if options.leak_words != CleaningConfig.leak_words and not options.against:
        raise UserError("--leak-words is for held-out text: name it with --against, or leave it out")


def _config(options: Options, settings: Mapping[str, Any]) -> CleaningConfig:
    own = {each.name: getattr(options, each.name) for each in fields(CleaningConfig)}
    normalise = () if options.normalise == (OFF,) else options.normalise
    return CleaningConfig(**{**own, "normalise": normalise, "rules": _chosen_rules(options.rules, settings)})


def _chosen_rules(names: Collection[str], settings: Mapping[str, Any]) -> tuple[Chosen[QualityRule], ...]:
    """The rules with these names and the given settings; raises `UserError` for a setting of another rule."""
    chosen = []
    for rule in {name: QualityRule.named(name) for name in names}.values():
        known = {each.name: each.attribute for each in declared(rule.Settings, rule)}
        chosen.append(rule.choose(**{known[name]: value for name, value in settings.items() if name in known}))
    of_chosen = {each.name for rule in chosen for each in declared(rule.variant.Settings, rule.variant)}
    for name in settings:
        if name not in of_chosen:
            owner = next(
                rule
                for rule in QualityRule.registry.values()
                if name in {each.name for each in declared(rule.Settings, rule)}
            )
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is for the quality rule {owner.name}: add it to --rules, or leave it out")
    return tuple(chosen)
