"""Multiple-choice items in prompts with examples, and minimal pairs, from JSONL."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

from minitransformer.errors import UserError
from minitransformer.records import shown
from minitransformer.text.columns import column_value
from minitransformer.text.corpora import LINES, jsonl_records, kind
from minitransformer.text.tables import text_of
from minitransformer.text.templates import filled_template

CHOICES, ANSWER = "choices", "answer"
GOOD, BAD, PARADIGM = "sentence_good", "sentence_bad", "UID"
TEMPLATE = "Question: {{ question }}\nAnswer:"
BETWEEN = "\n\n"
"""what stands between two examples"""


@dataclass(frozen=True)
class ChoiceItem:
    """A context, candidates for what follows it, and the place of the right one; `where` it stands, for messages."""

    where: str
    context: str
    candidates: tuple[str, ...]
    answer: int
    group: str = ""

    def continuation(self, candidate: str) -> str:
        """What follows the context: `candidate`, after a space if neither has one."""
        return _after(self.context, candidate)


@dataclass(frozen=True)
class ChoiceRow:
    """A row of multiple-choice data: its fields, of which a template makes a prompt."""

    where: str
    fields: Mapping[str, Any]
    candidates: tuple[str, ...]
    answer: int

    @cached_property
    def digest(self) -> str:
        """A hash of its content, in which the order of fields does not matter."""
        return hashlib.sha256(json.dumps(self.fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class FewShot:
    """A prompt template, and how many of the rows in `pool` stand before an item, with their answers.

    Which ones follows from the content of the item and of the pool, and from `seed`: not from the order of rows. A row
    is no example of itself. Raises `UserError` for fewer other rows than examples. Brown et al. 2020 (GPT-3, arXiv
    2005.14165), section 2.4.
    """

    pool: Sequence[ChoiceRow] = ()
    shots: int = 0
    seed: int = 0
    template: str = TEMPLATE
    origin: str = "of questions"
    """name of the template in messages"""
    _prompts: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    def item(self, row: ChoiceRow, group_by: str | None = None) -> ChoiceItem:
        """`row` after its examples; its group is the value in the column `group_by`."""
        examples = (self._prompt(each) + self._answer(each) for each in self._examples(row))
        context = BETWEEN.join([*examples, self._prompt(row)])
        group = "" if group_by is None else column_value(row.fields, group_by, row.where)
        return ChoiceItem(row.where, context, row.candidates, row.answer, group)

    def _examples(self, row: ChoiceRow) -> Iterator[ChoiceRow]:
        others = len(self._by_digest) - (row.digest in self._by_digest)
        if others < self.shots:
            raise UserError(
                f"{row.where} is to have {self.shots} examples, and there are {others} other rows: ask for fewer, or "
                "give a file with more"
            )
        digests, drawn = list(self._by_digest), {row.digest}
        for number in count():
            if len(drawn) > self.shots:
                return
            key = f"{self.seed} {row.digest} {number}".encode()
            digest = digests[int.from_bytes(hashlib.sha256(key).digest()) % len(digests)]
            if digest not in drawn:
                drawn.add(digest)
                yield self._by_digest[digest]

    @cached_property
    def _by_digest(self) -> dict[str, ChoiceRow]:
        return {row.digest: row for row in sorted(self.pool, key=lambda row: row.digest)}

    def _prompt(self, row: ChoiceRow) -> str:
        if row.digest not in self._prompts:
            self._prompts[row.digest] = filled_template(self.template, row.fields, self.origin, row.where)
        return self._prompts[row.digest]

    def _answer(self, row: ChoiceRow) -> str:
        return _after(self._prompt(row), row.candidates[row.answer])


def _after(context: str, text: str) -> str:
    return text if not context or context[-1].isspace() or text[0].isspace() else f" {text}"


def read_choices(path: Path) -> list[ChoiceRow]:
    """The rows of a JSONL file, each with "choices", its texts, and an "answer": one of them, or its place from 0.

    Raises `UserError` with the line of any other row.
    """
    return _read(path, _choice_row)


def read_minimal_pairs(path: Path, group_by: str | None = None) -> list[ChoiceItem]:
    """The pairs of a JSONL file: two sentences, of which the first is acceptable, by the name of what they test.

    Or their groups are the values in the column `group_by`.

    The format of BLiMP: Warstadt et al. 2020 (arXiv 1912.00582), section 3.
    """
    return _read(path, partial(_minimal_pair, group_by=group_by))


def holds_minimal_pairs(path: Path) -> bool:
    """Whether the first row of a JSONL file is a minimal pair."""
    return GOOD in next(_rows(path))[1]


def _read(path: Path, parse: Callable[[str, Mapping[str, Any], Path, int], Any]) -> list[Any]:
    return [parse(f"{path} line {number}", row, path, number) for number, row in _rows(path)]


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The objects of a JSONL file with their lines; raises `UserError` if there is none."""
    if not path.is_file() or kind(path) not in LINES:
        what = "is no .jsonl" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: give a .jsonl file with a JSON object for each item")
    number = 0
    for number, row in jsonl_records(path, lambda size: None):
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is {shown(row)}: give a JSON object for each item")
        yield number, row
    if not number:
        raise UserError(f"{path} is empty: give a JSON object for each item")


def _choice_row(where: str, row: Mapping[str, Any], path: Path, number: int) -> ChoiceRow:
    for name in (CHOICES, ANSWER):
        if name not in row:
            raise UserError(f"{where} has no field {name!r}, only {', '.join(map(repr, row)) or 'none'}: add it")
    choices, answer = row[CHOICES], row[ANSWER]
    if not isinstance(choices, list) or not all(isinstance(each, str) and each.strip() for each in choices):
        raise UserError(f"{where} has the choices {shown(choices)}: give a list of texts that are not blank")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise UserError(f"{where} has the choices {shown(choices)}: give two or more that differ")
    places = {choice: place for place, choice in enumerate(choices)}
    place = answer if type(answer) is int else places.get(answer, -1) if isinstance(answer, str) else -1
    if not 0 <= place < len(choices):
        raise UserError(
            f"{where} has the answer {shown(answer)}, which is not among its choices {shown(choices)}: give one of "
            f"them, or its place from 0 to {len(choices) - 1}"
        )
    return ChoiceRow(where, row, tuple(choices), place)


def _minimal_pair(
    where: str, row: Mapping[str, Any], path: Path, number: int, group_by: str | None = None
) -> ChoiceItem:
    good, bad = (text_of(row, name, path, "line", number) for name in (GOOD, BAD))
    if not good.strip() or not bad.strip() or good == bad:
        raise UserError(f"{where} has the sentences {shown(good)} and {shown(bad)}: give two that differ")
    group = text_of(row, PARADIGM, path, "line", number) if PARADIGM in row else path.name.partition(".")[0]
    if group_by is not None:
        group = column_value(row, group_by, where)
    return ChoiceItem(where, "", (good, bad), 0, group)
