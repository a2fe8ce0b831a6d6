"""`evaluate`: a model on data that it has not learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from minitransformer import files
from minitransformer.commands import DONE, choice_report, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.evaluation.answers import answer_totals
from minitransformer.evaluation.metrics import described_values, intervals_of, values_of
from minitransformer.models.model import Model
from minitransformer.runs import Run
from minitransformer.runs.answering import answers_to, questions_of
from minitransformer.runs.choosing import ChoiceScorer
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.text.corpora import named
from minitransformer.training.machine import choose_device
from minitransformer.training.validation import Validation

ABOUT = (
    "Evaluate a model on the validation data of its run, or on all of other data of the same kind. A model that has "
    "learned conversations answers the questions there, too, by greedy decoding. With --choices, a model chooses the "
    "likeliest candidate of each item. Intervals have 95% confidence."
)
USUAL_BATCH = 16


@dataclass(frozen=True)
class Options:
    """Which model, on which data, and where the results go."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """run folder"""
    data: tuple[str, ...] = ()
    """files, folders or recipes to evaluate on, such as train.py's --data; none is the run's validation data"""
    target_data: str | None = None
    """file with the other side of pairs, line by line"""
    json: Path | None = None
    """new .json file with the results; None writes none"""
    out: Path | None = None
    """new .jsonl file with the reference and the answer to each question, or the scores of items; None writes none"""
    batch_size: int | None = None
    """number of questions to answer at a time; None is 16"""
    choices: bool = False
    """score candidates by their likelihood: .jsonl rows with a question, choices and an answer, or minimal pairs with a
    sentence_good and a sentence_bad, as BLiMP has them"""
    shots: int = 0
    """number of examples before each item of --choices, with their answers"""
    seed: int = 0
    """seed of the choice of examples, which no order of rows changes"""
    examples: Path | None = None
    """.jsonl file of examples; None takes other rows of --data"""
    template: Path | None = None
    """file with a Jinja template that makes the prompt of an item from its fields; None is "Question: {{ question }}",
    and "Answer:" in the next line"""
    checkpoint: str | None = None
    """checkpoint of the run, such as step-000500 or latest; None is the best, or else the latest"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")
        for name, path in (("out", self.out), ("json", self.json)):
            if path is not None and path.exists():
                raise UserError(f"{path} already exists: choose another --{name}")
        if self.target_data is not None and not self.data:
            raise UserError("target_data are the other side of data: give --data too, or leave it out")
        self._check_choices()

    def _check_choices(self) -> None:
        """Raises `UserError` for flags that have no effect beside others, or lack one."""
        if not self.choices:
            names = [name for name in ("shots", "seed", "examples", "template") if getattr(self, name)]
            if names:
                raise UserError(f"--{names[0]} belongs to --choices: give that too, or leave it out")
            return
        if not self.data:
            raise UserError("--choices needs items: name their .jsonl files with --data")
        if self.batch_size is not None or self.target_data is not None:
            name = "target-data" if self.batch_size is None else "batch-size"
            raise UserError(f"--{name} has no effect on --choices: leave it out")
        if self.shots < 0:
            raise UserError(f"shots is {self.shots}: it must be at least 0")
        if not self.shots and (self.seed or self.examples):
            raise UserError("--seed and --examples have no effect without --shots: leave them out, or ask for examples")


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Evaluate; returns the exit code."""
    options = parse(Options, arguments, prog="minitransformer evaluate", description=ABOUT)
    run = Run.open(options.run)
    about = {"run": str(options.run), "checkpoint": run.checkpoint(options.checkpoint).resolve().name}
    about["data"] = named(options.data) if options.data else f"{named(run.config.data.data)}, validation"
    results = {**about, **(_chosen if options.choices else _evaluated)(run, about, options)}
    if options.json is not None:
        with files.writing(options.json, "choose another --json"):
            files.write_text(options.json, json.dumps(results, indent=2) + "\n")
    return DONE


def _evaluated(run: Run, about: dict[str, str], options: Options) -> dict[str, Any]:
    """The metrics of a model on data like that of its run."""
    data = HeldOutData.of_files(run, options.data, options.target_data) if options.data else HeldOutData.of_run(run)
    device = choose_device(options.device)
    model = run.load_model(options.checkpoint, str(device))
    _tell_what(about)
    validation = data.evaluate(model, device)
    _tell("read", f"{validation.tokens:,} tokens", validation)
    answered = _answered(model, data, options)
    return {"metrics": validation.record(), **({"answers": answered.record()} if answered else {})}


def _chosen(run: Run, about: dict[str, str], options: Options) -> dict[str, Any]:
    """How often a model chooses the right candidate."""
    items = choice_report.read_items(
        [Path(path) for path in options.data],
        shots=options.shots,
        seed=options.seed,
        template=options.template,
        examples=options.examples,
    )
    scorer = ChoiceScorer.of_run(run, options.checkpoint, str(choose_device(options.device)))
    scored = choice_report.score_all(scorer, items)
    found = choice_report.choice_summary(scored)
    _tell_what(about)
    before = f", {options.shots} examples before each" if options.shots else ""
    print(f"items      {len(items):,}{before}; chance is {found['chance']:.1%}")
    for table in choice_report.choice_tables(found):
        print(f"\n{table}")
    if options.out is not None:
        choice_report.write_items(options.out, items, scored)
    return {"shots": options.shots, "seed": options.seed, "choices": found}


def _tell_what(about: dict[str, str]) -> None:
    print(f"model      {about['run']}, {about['checkpoint']}")
    print(f"data       {about['data']}")


def _tell(title: str, of_what: str, validation: Validation) -> None:
    print(f"{title:10} {of_what}")
    for line in described_values(validation.values, validation.intervals):
        print(f"{'':11}{line}")


def _answered(model: Model, data: HeldOutData, options: Options) -> Validation | None:
    """How well `model` answers the questions of conversations; None for other data."""
    asked = questions_of(data)
    if not asked:
        if options.out is not None:
            raise UserError(f"{options.run} has no questions in its data: leave --out out")
        return None
    answers = list(answers_to(data.run, model, asked, options.batch_size or USUAL_BATCH))
    totals = answer_totals((answer, each.reference) for answer, each in zip(answers, asked, strict=True))
    found = Validation(values_of(totals), sum(each.length for each in asked), intervals=intervals_of(totals))
    _tell("answers", f"to {totals.texts:,} questions, by greedy decoding", found)
    if options.out is not None:
        rows = ({"reference": each.reference, "answer": text} for each, text in zip(asked, answers, strict=True))
        with files.writing(options.out, "choose another --out"):
            files.write_text(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return found
