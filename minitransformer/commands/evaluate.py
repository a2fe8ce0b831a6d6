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
from minitransformer.commands.prediction_report import Wanted, predict_all, titled_lines
from minitransformer.errors import UserError
from minitransformer.evaluation.metrics import described_values
from minitransformer.runs import Run
from minitransformer.runs.choosing import ChoiceScorer
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.text.corpora import named
from minitransformer.training.machine import choose_device

ABOUT = (
    "Evaluate a model on the validation data of its run, or on all of other data of the same kind: the metrics of its "
    "objective, exact match and F1 of the answers that it writes, BLEU and chrF of translations, and figures for each "
    "class. With --choices, a model chooses the likeliest candidate of each item. Intervals have 95% confidence."
)


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
    """new .jsonl file with what the model predicts for each text, beside what stands there; None writes none"""
    stride: int | None = None
    """tokens from one window of a text to the next: with half the context length, every token after the first window is
    predicted from at least half of it; None is all of it, windows that do not overlap"""
    batch_size: int | None = None
    """number of questions to answer at a time; None is 16"""
    num_beams: int | None = None
    """number of beams for translations; None is 5"""
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
        for name, number in (("batch_size", self.batch_size), ("num_beams", self.num_beams), ("stride", self.stride)):
            if number is not None and number < 1:
                raise UserError(f"{name} is {number}: it must be at least 1")
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
        for name in ("batch_size", "num_beams", "stride", "target_data"):
            if getattr(self, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} has no effect on --choices: leave it out")
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
    validation = data.evaluate(model, device, options.stride)
    of_each = described_values(validation.values, validation.intervals)
    print(*titled_lines("read", f"{validation.tokens:,} tokens", of_each), sep="\n")
    found = predict_all(model, data, Wanted(options.batch_size, options.num_beams))
    print(*found.lines, sep="\n", end="\n" if found.lines else "")
    if options.out is not None:
        found.write(options.out)
    return {"stride": options.stride, "metrics": validation.record(), **found.record}


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
