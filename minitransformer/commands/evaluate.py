"""`evaluate`: the answers of a model to held-out questions, compared with the right ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minitransformer import files
from minitransformer.commands import DONE, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.evaluation.answers import answer_totals
from minitransformer.evaluation.metrics import described_values, intervals_of, values_of
from minitransformer.runs import Run
from minitransformer.runs.answering import generate_held_out, held_out
from minitransformer.training.machine import choose_device

ABOUT = (
    "Answer the questions in the validation data of a run that has learned conversations, by greedy decoding, and "
    "compare with the answers there: exact match and token F1, with 95% confidence intervals."
)


@dataclass(frozen=True)
class Options:
    """Which model answers, and where the answers go."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """run folder"""
    out: Path | None = None
    """new .jsonl file with the reference and the answer in each line; None writes none"""
    batch_size: int = 16
    """number of questions to answer at a time"""
    checkpoint: str | None = None
    """checkpoint of the run, such as step-000500 or latest; None is the best, or else the latest"""
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: it must be at least 1")
        if self.out is not None and self.out.exists():
            raise UserError(f"{self.out} already exists: choose another --out")


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Answer and compare; returns the exit code."""
    options = parse(Options, arguments, prog="minitransformer evaluate", description=ABOUT)
    run = Run.open(options.run)
    asked = held_out(run)
    model = run.load_model(options.checkpoint, str(choose_device(options.device)))
    answers = list(generate_held_out(run, model, asked, options.batch_size))
    totals = answer_totals((answer, each.reference) for answer, each in zip(answers, asked, strict=True))
    print(f"model      {options.run}, {run.checkpoint(options.checkpoint).resolve().name}")
    print(f"questions  {totals.texts:,}")
    for line in described_values(values_of(totals), intervals_of(totals)):
        print(f"{'':11}{line}")
    if options.out is not None:
        rows = ({"reference": each.reference, "answer": text} for each, text in zip(asked, answers, strict=True))
        with files.writing(options.out, "choose another --out"):
            files.write_text(options.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"file       {options.out}")
    return DONE
