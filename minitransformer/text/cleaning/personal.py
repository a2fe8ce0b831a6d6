"""Personal data that is easily seen: each kind is a class that finds its places in a text, registered by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

from minitransformer.registry import Registered

LOCAL_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+'-]*\Z")
DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b")
LONGEST_LOCAL, LONGEST_DOMAIN = 64, 255
"""characters of the parts of an address (RFC 5321, section 4.5.3.1)"""
SEPARATORS = re.compile(r"[^0-9]+")


class Span(NamedTuple):
    """A place in a text, and what stands there."""

    start: int
    end: int
    kind: str


class PersonalData(Registered, kind="kind of personal data"):
    """A kind of personal data, with the `mark` that replaces it. Where two kinds overlap, the lower `order` counts.

    A text without any of the `hints` has none; no hints are no such test.
    """

    mark: ClassVar[str]
    order: ClassVar[int] = 100
    hints: ClassVar[tuple[str, ...]] = ()

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Begin and end of every place in `text`, in order and apart."""
        raise NotImplementedError


class EmailAddress(PersonalData, name="email"):
    """An address by RFC 5321 without quotes: anna.b+c@mail.example.org."""

    mark = "<EMAIL>"
    order = 20
    hints = ("@",)

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        after = 0
        place = text.find("@")
        while place >= 0:
            local = LOCAL_PART.search(text, max(after, place - LONGEST_LOCAL), place)
            domain = DOMAIN.match(text, place + 1, place + 1 + LONGEST_DOMAIN)
            if local and domain:
                after = domain.end()
                yield local.start(), after
            place = text.find("@", place + 1)


class CardNumber(PersonalData, name="card"):
    """13 to 19 digits, in groups or not, that begin with 2 to 6 and satisfy Luhn's check (ISO/IEC 7812-1)."""

    mark = "<CARD>"
    order = 0
    # A pattern that begins with a set of characters is searched for much faster than one that begins by looking back.
    pattern = re.compile(r"[2-6](?<![\w.,+-].)\d{3}(?:[ -]?\d){9,15}(?![\w-]|[.,]\d)", re.ASCII)

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        for found in self.pattern.finditer(text):
            if _satisfies_luhn(found[0]):
                yield found.span()


def _satisfies_luhn(number: str) -> bool:
    digits = [int(digit) for digit in SEPARATORS.sub("", number)]
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


class PhoneNumber(PersonalData, name="phone"):
    """A number with a country code, in the North American form, or with a leading 0 and in groups; no bare digits."""

    mark = "<PHONE>"
    order = 30
    pattern = re.compile(
        r"[+(\d](?<![\w.,/+-].)(?:"  # begins with a set: see `CardNumber`
        r"(?<=\+)\d{1,3}(?:[ ./-]?\(?\d{1,5}\)?){2,6}"  # +49 (30) 901820, +1-212-555-0123
        r"|(?:(?<=\()|(?<=1)[ .-]\()\d{3}\) ?\d{3}[ .-]\d{4}"  # (212) 555-0123, 1 (212) 555-0123
        r"|(?:(?<=\d)|(?<=1)[ .-]\d)\d\d([.-])\d{3}\1\d{4}"  # 212-555-0123, 1-212-555-0123
        r"|(?<=0)0?[1-9]\d{1,4}(?:[ /-]\d{2,8}){1,4}"  # 030 901820, 0049 30 901820
        r")(?![\w@]|[.,/-]\d)",
        re.ASCII,
    )
    DIGITS = range(8, 16)
    """of a number with its country code (ITU-T E.164), or of one within a country"""

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        for found in self.pattern.finditer(text):
            if len(SEPARATORS.sub("", found[0])) in self.DIGITS:
                yield found.span()


class SecretKey(PersonalData, name="key"):
    """Keys as AWS, GitHub, GitLab, Google, Hugging Face, OpenAI, Slack and Stripe write them; PEM private keys."""

    mark = "<KEY>"
    order = 10
    hints = ("AKIA", "ghp_", "github_pat_", "glpat-", "AIza", "hf_", "sk-", "sk_live_", "xox", "PRIVATE KEY-----")
    pattern = re.compile(
        r"(?<![A-Za-z0-9_-])(?:"
        r"AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{50,90}|glpat-[\w-]{20}|AIza[\w-]{35}"
        r"|hf_[A-Za-z0-9]{30,40}|sk-[\w-]{20,200}|sk_live_[A-Za-z0-9]{20,100}|xox[abprs]-[A-Za-z0-9-]{10,100}"
        r"|-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----[\sA-Za-z0-9+/=:,-]{0,10000}?-----END (?:[A-Z]+ )*PRIVATE KEY-----"
        r")(?![A-Za-z0-9_])",
        re.ASCII,
    )

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        return (found.span() for found in self.pattern.finditer(text))


def kinds_of_personal_data(names: Sequence[str] | None = None) -> list[PersonalData]:
    """The kinds with these names, or all, in the order in which they count."""
    known = PersonalData.registry.values() if names is None else {PersonalData.named(name) for name in names}
    return [member() for member in sorted(known, key=lambda member: (member.order, member.name))]


def find_personal_data(text: str, kinds: Sequence[PersonalData]) -> list[Span]:
    """What there is of the `kinds` in `text`, in its order; of two that overlap, the kind that counts first."""
    found: list[Span] = []
    for kind in kinds:
        if not kind.hints or any(map(text.__contains__, kind.hints)):
            new = [Span(start, end, kind.name) for start, end in kind.spans(text)]
            found += [span for span in new if not any(span.start < old.end and old.start < span.end for old in found)]
    return sorted(found)


def masked(text: str, spans: Sequence[Span], names: Sequence[str]) -> str:
    """`text` with the mark of its kind in place of each of the `spans` that is one of the kinds `names`."""
    parts, after = [], 0
    for span in spans:
        if span.kind in names:
            parts += [text[after : span.start], PersonalData.registry[span.kind].mark]
            after = span.end
    return "".join([*parts, text[after:]]) if parts else text
