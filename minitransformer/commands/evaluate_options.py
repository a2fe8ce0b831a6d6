"""The options of `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from minitransformer.commands import check_outputs
from minitransformer.errors import UserError


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
    html: Path | None = None
    """new .html file with the results, plots and the worst items; None writes none"""
    out: Path | None = None
    """new .jsonl file with each item: its text, its loss, and what the model predicts; None writes none"""
    group_by: str | None = None
    """column of the data: the same metrics for each of its values, and the largest gaps between them"""
    against: Path | None = None
    """another run folder, whose best or else latest checkpoint is compared on the same items"""
    counterfactuals: bool = False
    """ask for each text again with one word exchanged (names, pronouns, words of gender, nationalities): how often and
    how much the answer changes"""
    exchanges: Path | None = None
    """.tsv file of words to exchange, with the columns kind, word and other; None is the list of the package"""
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
        check_outputs({"--out": self.out, "--json": self.json, "--html": self.html})
        if self.target_data is not None and not self.data:
            raise UserError("target_data are the other side of data: give --data too, or leave it out")
        if self.exchanges is not None and not self.counterfactuals:
            raise UserError("--exchanges belongs to --counterfactuals: give that too, or leave it out")
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
