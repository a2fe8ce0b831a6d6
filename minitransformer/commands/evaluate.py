"""`evaluate`: the answers of a model to held-out questions, compared with the right ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minitransformer import files
from minitransformer.commands import DONE, choice_report, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.evaluation.answers import answer_totals
from minitransformer.evaluation.metrics import described_values, intervals_of, values_of
from minitransformer.runs import Run
from minitransformer.runs.answering import generate_held_out, held_out
from minitransformer.runs.choosing import ChoiceScorer
from minitransformer.training.machine import choose_device

ABOUT = (
    "Answer the questions in the validation data of a run that has learned conversations, by greedy decoding, and "
    "compare with the answers there: exact match and token F1, with 95% confidence intervals. With --choices, choose "
    "the likeliest candidate of each item of --data instead, and tell how often it is the right one."
)
USUAL_BATCH = 16


@dataclass(frozen=True)
class Options:
    """Which model answers, and where the answers go."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """run folder"""
    out: Path | None = None
    """new .jsonl file with the reference and the answer in each line; None writes none"""
    batch_size: int | None = None
    """number of questions to answer at a time; None is 16"""
    choices: bool = False
    """score the candidates of the items in --data by their likelihood; no score depends on the other items"""
    data: tuple[Path, ...] = ()
    """.jsonl files for --choices: rows with a question, choices and an answer, or minimal pairs with a sentence_good
    and a sentence_bad, as BLiMP has them"""
    shots: int = 0
    """number of examples before each item, with their answers"""
    seed: int = 0
    """seed of the choice of examples, which no order of rows changes"""
    examples: Path | None = None
    """.jsonl file of examples; None takes other rows of --data"""
    template: Path | None = None
    """file with a Jinja template that makes the prompt of an item from its fields; None is "Question: {{ question }}",
    and "Answer:" in the next line"""
    json: Path | None = None
    """new .json file for the results of --choices"""
    checkpoint: str | None = None
    """checkpoint of the run, such as step-000500 or latest; None is the best, or else the latest"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")
        for flag, new in (("--out", self.out), ("--json", self.json)):
            if new is not None and new.exists():
                raise UserError(f"{new} already exists: choose another {flag}")
        self._check_choices()

    def _check_choices(self) -> None:
        """Raises `UserError` for flags that have no effect beside others, or lack one."""
        given = {name: getattr(self, name) for name in ("data", "shots", "seed", "examples", "template", "json")}
        if not self.choices:
            if names := [name for name, value in given.items() if value]:
                raise UserError(f"--{names[0]} belongs to --choices: give that too, or leave it out")
            return
        if not self.data:
            raise UserError("--choices needs items: name their .jsonl files with --data")
        if self.batch_size is not None:
            raise UserError("--batch-size has no effect with --choices, which no batch changes: leave it out")
        if self.shots < 0:
            raise UserError(f"shots is {self.shots}: it must be at least 0")
        if not self.shots and (self.seed or self.examples):
            raise UserError("--seed and --examples have no effect without --shots: leave them out, or ask for examples")


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Answer and compare; returns the exit code."""
    options = parse(Options, arguments, prog="minitransformer evaluate", description=ABOUT)
    run = Run.open(options.run)
    device = str(choose_device(options.device))
    if options.choices:
        _choose(run, device, options)
    else:
        _answer(run, device, options)
    if options.out is not None:
        print(f"file       {options.out}")
    return DONE


def _model_line(run: Run, options: Options) -> str:
    return f"model      {options.run}, {run.checkpoint(options.checkpoint).resolve().name}"


def _answer(run: Run, device: str, options: Options) -> None:
    asked = held_out(run)
    model = run.load_model(options.checkpoint, device)
    answers = list(generate_held_out(run, model, asked, options.batch_size or USUAL_BATCH))
    totals = answer_totals((answer, each.reference) for answer, each in zip(answers, asked, strict=True))
    print(_model_line(run, options))
    print(f"questions  {totals.texts:,}")
    for line in described_values(values_of(totals), intervals_of(totals)):
        print(f"{'':11}{line}")
    if options.out is not None:
        rows = ({"reference": each.reference, "answer": text} for each, text in zip(asked, answers, strict=True))
        with files.writing(options.out, "choose another --out"):
            files.write_text(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _choose(run: Run, device: str, options: Options) -> None:
    items = choice_report.read_items(
        options.data, shots=options.shots, seed=options.seed, template=options.template, examples=options.examples
    )
    scored = choice_report.score_all(ChoiceScorer.of_run(run, options.checkpoint, device), items)
    found = choice_report.choice_summary(scored)
    before = f", {options.shots} examples before each" if options.shots else ""
    print(_model_line(run, options))
    print(f"items      {len(items):,}{before}; chance is {found['chance']:.1%}")
    for table in choice_report.choice_tables(found):
        print(f"\n{table}")
    if options.out is not None:
        choice_report.write_items(options.out, items, scored)
    if options.json is not None:
        about = {"run": str(options.run), "data": list(map(str, options.data)), "shots": options.shots}
        with files.writing(options.json, "choose another --json"):
            files.write_text(options.json, json.dumps({**about, "seed": options.seed, **found}, indent=2) + "\n")
