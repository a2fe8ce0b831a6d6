"""Normalisations: each is a map of text, registered by name, and applied only where it is asked for."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, ClassVar

from minitransformer.errors import UserError
from minitransformer.registry import Registered

EXTRA = 'pip install "minitransformer[data]"'
"""what installs the packages of this room"""


class TextNormalisation(Registered, kind="normalisation"):
    """A map of text to text that is the same when it is applied again. They are applied in the order of `order`."""

    order: ClassVar[int] = 100

    def __init__(self, settings: Any) -> None:
        """Raises `UserError` where a package is missing."""

    def __call__(self, text: str) -> str:
        raise NotImplementedError


class Mojibake(TextNormalisation, name="mojibake"):
    """UTF-8 that was read as another encoding is mended (âœ” becomes ✔), as ftfy does where it is sure."""

    order = 0

    def __init__(self, settings: Any) -> None:
        try:
            from ftfy import fix_encoding
        except ImportError:
            raise UserError(f"the normalisation mojibake needs ftfy, which is not installed: {EXTRA}") from None
        self._fix = fix_encoding

    def __call__(self, text: str) -> str:
        return text if text.isascii() else str(self._fix(text))


class NFC(TextNormalisation, name="nfc"):
    """Letters and their accents are one character where there is one. Unicode Standard Annex 15."""

    order = 10
    form: ClassVar[Any] = "NFC"

    def __call__(self, text: str) -> str:
        return text if text.isascii() else unicodedata.normalize(self.form, text)


class NFKC(NFC, name="nfkc"):
    """`NFC`, and ligatures, full-width letters and superscripts become ordinary ones: ﬁ, Ａ and ² become fi, A, 2."""

    form = "NFKC"


class ControlCharacters(TextNormalisation, name="control"):
    """Control characters are removed, except tab, newline and carriage return; so are byte-order marks."""

    order = 20
    pattern = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]+")
    ascii = bytes({*range(32), 127} - set(b"\t\n\r"))

    def __call__(self, text: str) -> str:
        if not text.isascii():
            return self.pattern.sub("", text)
        kept = text.encode().translate(None, self.ascii)  # ten times as fast
        return text if len(kept) == len(text) else kept.decode()


class LowerCase(TextNormalisation, name="lower"):
    """Lower case."""

    order = 30

    def __call__(self, text: str) -> str:
        return text.lower()


class Punctuation(TextNormalisation, name="punctuation"):
    """Typographic quotes, dashes, ellipses and spaces become those of ASCII."""

    order = 40
    table = str.maketrans(
        {
            **dict.fromkeys("‘’‚‛′", "'"),
            **dict.fromkeys("“”„‟″«»", '"'),
            **dict.fromkeys("‐‑‒–—―−", "-"),
            **dict.fromkeys("\u00a0\u2002\u2003\u2007\u2009\u200a\u202f\u3000", " "),
            **dict.fromkeys("\u00ad\u200b\u2060", ""),
            "…": "...",
        }
    )

    def __call__(self, text: str) -> str:
        return text if text.isascii() else text.translate(self.table)


def normalisations(names: Sequence[str]) -> list[TextNormalisation]:
    """The normalisations with these names, in the order in which they are applied; raises `UserError` for two forms."""
    if {"nfc", "nfkc"} <= set(names):
        raise UserError("--normalise has nfc and nfkc, and a text has one form: choose one of them")
    members = sorted({TextNormalisation.named(name) for name in names}, key=lambda member: (member.order, member.name))
    return [member(member.Settings()) for member in members]
