"""`memorisation`: what a model repeats of its training text (`measure`), and secrets to plant into it (`plant`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from minitransformer import files
from minitransformer.commands import DONE, check_outputs, parse, table_width, task_of, with_exit_code
from minitransformer.commands.memorisation_report import MeasuredPart, MemorisationMeasures
from minitransformer.errors import UserError
from minitransformer.models.decoder import DecoderLM
from minitransformer.reporting.plain import titled_table
from minitransformer.runs import Run
from minitransformer.runs.memorising import LearnedText
from minitransformer.text.canaries import Canary, canary_rows, make_canaries, planted_rows, read_canaries
from minitransformer.text.corpora import named
from minitransformer.training.machine import choose_device

ABOUT = {
    "measure": "Measure what a language model repeats of its training text: how often greedy decoding continues it "
    "verbatim, how much of what the model writes stands in it, and how exposed planted secrets are. Validation text is "
    "measured beside it. Intervals have 95% confidence.",
    "plant": "Write texts with random secrets to train on, each as often as --times says, and a file that says which.",
}
CANARIES, PLANTED = "canaries.jsonl", "planted.jsonl"


@dataclass(frozen=True)
class Options:
    """Which model to measure, and how much of it."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """run folder"""
    data: tuple[str, ...] = ()
    """the text that the model has learned, such as train.py's --data; none is that of the run"""
    canaries: Path | None = None
    """.jsonl file of planted secrets: canaries.jsonl of `plant`, or rows with what stands before a secret, the secret,
    and optionally what stands after it"""
    texts: int = 1000
    """number of training texts, and of validation texts, of which a prefix is given to the model"""
    prefix_length: int | None = None
    """tokens of each prefix; None is 50, or half of a context that has fewer than 100"""
    length: int | None = None
    """tokens that have to follow verbatim; None is 50, or half of a context that has fewer than 100"""
    samples: int = 64
    """number of texts that the model writes without a prompt"""
    sample_length: int | None = None
    """tokens of each of them; None is 256, or as many as the model reads"""
    temperature: float = 1.0
    """temperature at which they are drawn"""
    others: int = 2000
    """number of other secrets that each planted one is compared with"""
    seed: int = 0
    """seed of the texts, samples and secrets that are drawn"""
    json: Path | None = None
    """new .json file with the results; None writes none"""
    checkpoint: str | None = None
    """checkpoint of the run, such as step-000500 or latest; None is the best, or else the latest"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        for name in ("texts", "prefix_length", "length", "samples", "sample_length", "others"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UserError(f"{name} is {number}: it must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: it must be at least 0 (0 takes the likeliest token)")
        check_outputs({"--json": self.json})


@dataclass(frozen=True)
class PlantingOptions:
    """How many secrets to plant, and how often."""

    out: Path
    """new folder for planted.jsonl, to add to the --data of train.py, and canaries.jsonl, for `measure`"""
    times: tuple[int, ...] = (0, 1, 4, 16, 64)
    """how often to plant a secret, for several groups of them; 0 is for secrets to compare with"""
    each: int = 5
    """number of secrets in each group"""
    digits: int = 6
    """digits of each secret"""
    seed: int = 0
    """seed of the secrets and of the order of the texts"""

    def __post_init__(self) -> None:
        for name, number, least in (("times", min(self.times, default=-1), 0), ("each", self.each, 1)):
            if number < least:
                raise UserError(f"{name} is {getattr(self, name)}: give whole numbers of at least {least}")
        if not 2 <= self.digits <= 18:
            raise UserError(f"digits is {self.digits}: it must be 2 to 18")
        if self.out.exists():
            raise UserError(f"{self.out} already exists: choose another --out")


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Measure or plant; returns the exit code."""
    task = task_of("memorisation", arguments, ABOUT, "[options]")
    prog, description = f"minitransformer memorisation {task}", ABOUT[task]
    if task == "plant":
        return _plant(parse(PlantingOptions, arguments[1:], prog=prog, description=description))
    return _measure(parse(Options, arguments[1:], prog=prog, description=description))


def _plant(options: PlantingOptions) -> int:
    canaries = make_canaries(options.times, options.each, options.digits, options.seed)
    rows = planted_rows(canaries, options.seed)
    with files.writing(options.out, "choose another --out"):
        files.make_folder(options.out.parent)
        with files.whole_folder(options.out) as folder:
            files.write_text(folder / PLANTED, rows)
            files.write_text(folder / CANARIES, canary_rows(canaries))
    print(f"planted    {options.out / PLANTED}: {rows.count(chr(10)):,} texts of {len(canaries):,} secrets")
    print(f"canaries   {options.out / CANARIES}: which secret is planted how often")
    print(f"next       python train.py --data {options.out / PLANTED} my.txt")
    print(f"then       python -m minitransformer memorisation measure RUN --canaries {options.out / CANARIES}")
    return DONE


def _measure(options: Options) -> int:
    run = Run.open(options.run)
    checkpoint = run.checkpoint(options.checkpoint).resolve().name
    canaries = [] if options.canaries is None else read_canaries(options.canaries)
    learned = LearnedText.of_files(run, options.data) if options.data else LearnedText.of_run(run)
    model = run.load_model(options.checkpoint, str(choose_device(options.device)))
    assert isinstance(model, DecoderLM), "the objective of its run is that of decoders"
    data = named(options.data or run.config.data.data)
    print(f"model      {options.run}, {checkpoint}")
    print(f"learned    {data}: {len(learned.training):,} tokens")
    measures = MemorisationMeasures(model, run.tokenizer, learned, options.seed)
    results: dict[str, Any] = {"run": str(options.run), "checkpoint": checkpoint, "data": data, "seed": options.seed}
    for part in _parts(measures, canaries, options):
        results |= part.record
        print(*("", titled_table(part.table, table_width()), *part.notes), sep="\n")
    if options.json is not None:
        with files.writing(options.json, "choose another --json"):
            files.write_text(options.json, json.dumps(results, indent=2) + "\n")
    return DONE


def _parts(measures: MemorisationMeasures, canaries: Sequence[Canary], options: Options) -> Iterator[MeasuredPart]:
    """Each part of the results, as soon as it is measured."""
    yield measures.extraction(options.texts, options.prefix_length, options.length)
    yield measures.overlap(options.samples, options.sample_length, options.temperature)
    if canaries:
        yield measures.exposure(canaries, options.others)
