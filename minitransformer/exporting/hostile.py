"""Texts on which tokenizers of different programs have disagreed."""

from __future__ import annotations

from collections.abc import Iterator

from minitransformer.errors import UserError
from minitransformer.text.tokenizers import Tokenizer

TEXTS = (
    "",
    " ",
    "   ",
    "\n",
    "\n\n\n",
    "\r\n",
    "\t\tx\t",
    " \n \n  x \n",
    "a  \n  b   c    ",
    "Once upon a time, there was",
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure they'll say it's what WE'VE done; he'd've I'LL don'T",
    "1 12 123 1234 12345 1,234.56 -7e-10 0x1F 2²³ Ⅻ ½ ٣٤٥",
    "naïve café Größe Straße İstanbul ĳ ﬁ Ǆ",
    "e\u0301 o\u0308 \u0301x n\u0303\u0303",
    "東京都 日本語のテキスト。中文，测试！한국어 문장",
    "नमस्ते दुनिया สวัสดี สระ́ مرحبا بالعالم שלום",
    "🦊 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☃️",
    "\u00a0x\u00a0\u2003y\u2028z\u3000w\u200b\ufeff",
    "_snake_case camelCase HTTPServer x1y2z3 a.b.c::d->e",
    "def f(x):\n    return {'a': [x ** 2, \"b\"]}  # note\n\n\n    pass\n",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\dir\\file",
    "!!!??? ... --- ___ === <<>> $$ £€ @#%^&*()",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "x" + " " * 40 + "y",
    "\x01\x07\x1b[0m\x7f",
    "ends in a space ",
    "ends in a line\n",
    "'s 't 're ''ll '' \" ' s",
    "…“quoted”—dash–‘single’",
)
PROMPTS = ("Once upon a time, there was", "The quick brown fox", "def f(x):\n    return")


def encodable(tokenizer: Tokenizer, text: str) -> str:
    """`text` without the characters that `tokenizer` cannot encode."""
    if _is_encodable(tokenizer, text):
        return text
    return "".join(character for character in text if _is_encodable(tokenizer, character))


def hostile_texts(tokenizer: Tokenizer, special_tokens: dict[str, int]) -> Iterator[str]:
    """What `tokenizer` can encode of the texts, and its special tokens, spelled out between words."""
    texts = dict.fromkeys(encodable(tokenizer, text) for text in TEXTS)
    yield from texts
    word = encodable(tokenizer, "word")
    for name in special_tokens:
        yield f"{word}{name}{word} {name}" if _is_encodable(tokenizer, " ") else f"{word}{name}{word}"


def _is_encodable(tokenizer: Tokenizer, text: str) -> bool:
    try:
        tokenizer.encode(text)
    except UserError:
        return False
    return True
