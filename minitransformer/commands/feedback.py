"""`feedback`: fine-tuning data from what users say of a served run's answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from minitransformer import files
from minitransformer.amounts import counted
from minitransformer.commands import DONE, check_outputs, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.runs import Run
from minitransformer.runs.feedback import FeedbackExamples, examples_of
from minitransformer.runs.promoting import served_checkpoint
from minitransformer.runs.served import FEEDBACK, ServedAnswer, read_answers

ABOUT = (
    "Make fine-tuning data from the feedback that a server has collected for a run, and for what was promoted over "
    "it: a conversation, or a prompt and its completion, for each answer that was corrected or got a thumb up. "
    "Thumbs down without a correction are left out."
)


@dataclass(frozen=True)
class Options:
    """Whose feedback, and where the data goes."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """run folder that is served"""
    to: Path
    """new .jsonl file for the data, to be named with --objective instruct --data"""
    test: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """new .jsonl file for examples that are held out, for `promote`; None holds out none"""
    fraction: Annotated[float, tyro.conf.arg(metavar="X")] = 0.2
    """fraction of what was asked that is held out by --test: the same in later data, as a hash decides"""

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise UserError(f"fraction is {self.fraction}: it must be above 0 and below 1")
        for name, path in (("to", self.to), ("test", self.test)):
            if path is not None and path.suffix != ".jsonl":
                raise UserError(f"{path} is no .jsonl, in which conversations are: choose another --{name}")
        check_outputs({"--to": self.to, "--test": self.test})


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Write the data; returns the exit code."""
    options = parse(Options, arguments, prog="minitransformer feedback", description=ABOUT)
    answers = _answers(options.run)
    examples = examples_of(answers, 0.0 if options.test is None else options.fraction)
    print(f"feedback   {counted(len(answers), 'rows')} on the answers of {options.run}")
    _tell("used", examples.used)
    _tell("left out", examples.left_out)
    if not examples.used:
        raise UserError(f"no feedback on {options.run} says what to answer: collect thumbs up, or corrections")
    _write(options, examples)
    served, _ = served_checkpoint(options.run)
    print(f"next       python train.py --init-from {served} --objective instruct --data {options.to}")
    return DONE


def _answers(path: Path) -> list[ServedAnswer]:
    Run.open(path)
    if not (path / FEEDBACK).exists():
        raise UserError(f"{path} has no {FEEDBACK}: serve it, and have its users send thumbs to /feedback")
    return list(read_answers(path / FEEDBACK))


def _tell(name: str, counts: Mapping[str, int]) -> None:
    for what, count in counts.items():
        print(f"{name:10} {count:,} {what}")


def _write(options: Options, examples: FeedbackExamples) -> None:
    """The examples for training; and those held out, if that is asked for."""
    parts: list[tuple[str, Path, list[dict[str, Any]]]] = [("to", options.to, examples.training)]
    if options.test is not None:
        parts.append(("test", options.test, examples.held_out))
    if empty := next((path for _, path, rows in parts if not rows), None):
        raise UserError(f"there is no example for {empty}, of {sum(examples.used.values())}: collect more feedback")
    for name, path, rows in parts:
        with files.writing(path, f"choose another --{name}"):
            files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        print(f"{'examples' if name == 'to' else 'held out':10} {path}: {len(rows):,}")
