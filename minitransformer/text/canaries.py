"""Canaries: texts with a random secret, planted into training data to measure what a model remembers of it.

Carlini et al. 2019, "The Secret Sharer" (arXiv 1802.08232), section 4.
"""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path
from random import Random
from typing import Any

from minitransformer.errors import UserError
from minitransformer.records import shown
from minitransformer.text.corpora import jsonl_records
from minitransformer.text.datasets.text import is_validation
from minitransformer.text.tables import text_of

COLOURS = (
    *("amber", "brown", "cedar", "coral", "crimson", "ebony", "golden", "green", "hazel", "indigo", "ivory"),
    *("jade", "lilac", "maroon", "ochre", "olive", "orange", "pearl", "purple", "scarlet", "silver", "violet"),
)
THINGS = (
    *("anchor", "barrel", "bottle", "bridge", "cabin", "candle", "cellar", "engine", "garden", "hammer", "harbour"),
    *("kettle", "ladder", "lantern", "locker", "mirror", "pantry", "saddle", "stable", "tunnel", "window", "wagon"),
)
ALPHABETS = (string.digits, string.ascii_lowercase, string.ascii_uppercase)
ENUMERABLE = 1 << 31
"""secrets, of which some are drawn without repetition by their number"""


@dataclass(frozen=True)
class Canary:
    """A text with a secret, and how often it was planted; None if that is unknown."""

    before: str
    secret: str
    after: str = ""
    times: int | None = None

    @property
    def text(self) -> str:
        return self.with_secret(self.secret)

    def with_secret(self, secret: str) -> str:
        """The text with another secret."""
        return self.before + secret + self.after

    @property
    def num_secrets(self) -> int:
        """|R|, the number of secrets that this one was drawn from: others for its digits and letters."""
        return prod(map(len, self._alphabets()))

    def other_secrets(self, count: int, random: Random) -> list[str]:
        """`count` other secrets of the same form, or all of them if there are fewer; none occurs twice."""
        total = self.num_secrets
        wanted = min(count + 1, total)
        if total < ENUMERABLE:
            numbers = random.sample(range(total), wanted)
        else:
            drawn: dict[int, None] = {}
            while len(drawn) < wanted:
                drawn[random.randrange(total)] = None
            numbers = list(drawn)
        secrets = [self._numbered(number) for number in numbers]
        return [secret for secret in secrets if secret != self.secret][:count]

    def _numbered(self, number: int) -> str:
        letters = []
        for alphabet in reversed(list(self._alphabets())):
            number, place = divmod(number, len(alphabet))
            letters.append(alphabet[place])
        return "".join(reversed(letters))

    def _alphabets(self) -> Iterator[str]:
        """What may stand at each place of the secret."""
        for letter in self.secret:
            yield next((alphabet for alphabet in ALPHABETS if letter in alphabet), letter)


def make_canaries(times: Sequence[int], each: int, digits: int, seed: int) -> list[Canary]:
    """`each` canaries for each number of `times`, whose texts differ before their secrets of random `digits`.

    None is held out for validation where training splits by document, up to half of the data.
    """
    random, phrases = Random(seed), [f"{colour} {thing}" for colour, thing in product(COLOURS, THINGS)]
    if (asked := len(times) * each) > len(phrases):
        raise UserError(f"{asked:,} canaries are asked for, and there are {len(phrases)} different ones: ask for fewer")
    named = zip(random.sample(phrases, asked), (count for count in times for _ in range(each)), strict=True)
    return [_with_random_secret(f"The access code of the {name} is ", digits, count, random) for name, count in named]


def _with_random_secret(before: str, digits: int, times: int, random: Random) -> Canary:
    while True:
        canary = Canary(before, "".join(random.choices(string.digits, k=digits)), ".", times)
        if not is_validation(canary.text, 0.5):
            return canary


def planted_rows(canaries: Sequence[Canary], seed: int) -> str:
    """JSONL with the text of each canary as often as it is planted, in random order."""
    rows = [canary.text for canary in canaries for _ in range(canary.times or 0)]
    Random(seed).shuffle(rows)
    return "".join(json.dumps({"text": text}) + "\n" for text in rows)


def canary_rows(canaries: Sequence[Canary]) -> str:
    """JSONL that `read_canaries` reads."""
    return "".join(json.dumps(asdict(canary)) + "\n" for canary in canaries)


def read_canaries(path: Path) -> list[Canary]:
    """The canaries in a .jsonl file; raises `UserError` for rows that are none."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: `memorisation plant` writes canaries, as canaries.jsonl")
    found = [_canary(row, path, number) for number, row in jsonl_records(path, lambda size: None)]
    if not found:
        raise UserError(f'{path} is empty: give a row {{"before": "…", "secret": "…"}} for each canary')
    return found


def _canary(row: Any, path: Path, number: int) -> Canary:
    before, secret = (text_of(row, name, path, "line", number) for name in ("before", "secret"))
    after = text_of({"after": "", **row}, "after", path, "line", number)
    canary = Canary(before, secret, after, row.get("times"))
    if type(canary.times) not in (int, type(None)):
        raise UserError(f"{path} line {number} has times {shown(canary.times)}: give a whole number, or leave it out")
    if canary.num_secrets == 1:
        raise UserError(f"{path} line {number} has the secret {secret!r}, without digits or letters A to Z: give some")
    return canary
