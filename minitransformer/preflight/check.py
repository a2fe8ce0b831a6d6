"""The interface of checks, and what they find."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from minitransformer.errors import UserError
from minitransformer.preflight.candidate import Candidate
from minitransformer.registry import Registered

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """What a check found, with a remedy unless it is "ok"; `figures` are the numbers in it."""

    status: Status
    text: str
    remedy: str = ""
    figures: Mapping[str, Any] = field(default_factory=dict)
    topic: str = ""

    @classmethod
    def of(cls, error: UserError) -> Finding:
        """The problem that `error` states as "what is wrong: what to do"."""
        text, remedy = split_remedy(str(error))
        return cls("problem", text, remedy)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class PreflightCheck(Registered, kind="check"):
    """One question about a run before it starts; the name is its topic."""

    def find(self, candidate: Candidate) -> Finding:
        """The answer; a `UserError` is a problem."""
        raise NotImplementedError


def findings_of(candidate: Candidate) -> Iterator[Finding]:
    """What every registered check finds, in order; a problem that stops several checks is reported once."""
    known: set[str] = set()
    for name, check in PreflightCheck.registry.items():
        try:
            found = check().find(candidate)
        except UserError as error:
            found = Finding.of(error)
            if str(error) in known:
                found = Finding("note", "unknown until the problem above is solved")
            known.add(str(error))
        yield Finding(found.status, found.text, found.remedy, found.figures, name)


def split_remedy(sentence: str) -> tuple[str, str]:
    """The two sides of the last colon that is outside of parentheses and quotes."""
    depth, quoted, found = 0, False, len(sentence)
    for place, character in enumerate(sentence):
        if character == "'":
            quoted = not quoted and not sentence[place - 1 : place].isalpha()  # rather than an apostrophe
        depth += (character == "(") - (character == ")")
        if sentence[place : place + 2] == ": " and depth == 0 and not quoted:
            found = place
    return sentence[:found], sentence[found + 2 :]
