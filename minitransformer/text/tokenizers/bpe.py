"""Trained byte-level byte-pair encoding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.records import shown
from minitransformer.settings import setting
from minitransformer.text.tokenizers.base import Texts, Tokenizer, not_text, special_tokens_in, typed_entry
from minitransformer.text.tokenizers.native import call_native, call_within_time

# A sample of everything that a split pattern must preserve.
ALL_KINDS = "It's  two WORDS,\tnaïve 東京 12345 x1\r\n\n 🦊 _-=+ \x07 \u00a0\u2028e\u0301 '"
LEAST_TOKENS = 256 + 1
"""the single bytes and the end-of-text token"""
# GPT-4's (cl100k) split pattern in tiktoken's form, whose backtracking cannot overflow the stack.
GPT4_SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# The default of a ByteLevel pre-tokenizer in public tokenizers.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class BPE(Tokenizer, name="bpe"):
    """Byte-level byte-pair encoding with GPT-4's split pattern, trained by rustbpe and run by tiktoken.

    `ranks` are the tokens in merge order; a token's id is its index.
    Sennrich et al. 2016 (arXiv 1508.07909); on bytes: Radford et al. 2019 (GPT-2), section 2.2.
    """

    @dataclass(frozen=True)
    class Settings:
        vocab_size: int | None = setting(
            None,
            at_least=LEAST_TOKENS,
            changes_tokens=True,
            help="number of tokens to train, with the 256 bytes and the end-of-text token; None is vocab_size, or 4096",
        )

    # rustbpe stores every distinct word; more text than this changes few merges and costs memory.
    fit_limit = 32 << 20
    in_gguf = True

    def __init__(
        self, ranks: Sequence[bytes], *, pattern: str = GPT4_SPLIT, special_tokens: dict[str, int] | None = None
    ) -> None:
        import tiktoken

        if len(set(ranks)) < len(ranks) or not {bytes([value]) for value in range(256)} <= set(ranks):
            raise ValueError("ranks must be distinct and hold all 256 single bytes")
        super().__init__(ranks, special_tokens)
        self.ranks, self.pattern = list(ranks), pattern
        self._encoding = tiktoken.Encoding(
            self.name,
            pat_str=pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
            special_tokens=self.special_tokens,
        )
        if self.decode_bytes(self._encoded(ALL_KINDS).tolist()) != ALL_KINDS.encode():
            raise ValueError(f"pattern {shown(pattern)} leaves out parts of a text")

    def _encoded(self, text: str) -> npt.NDArray[np.uint32]:
        """The ids of `text`; raises `ValueError` if the pattern fails or never ends, and for text that is not UTF-8."""

        def encode() -> npt.NDArray[np.uint32]:
            return self._encoding.encode_to_numpy(text, disallowed_special=())

        try:
            if self.pattern in (GPT4_SPLIT, GPT2_SPLIT):
                return call_native(encode)
            return call_within_time(encode, len(text))
        except UnicodeEncodeError:
            raise
        except ValueError as error:
            raise ValueError(f"pattern {shown(self.pattern)} fails ({error})") from None

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int) -> Self:
        """Merge the most frequent pairs of `texts` until there are `vocab_size` tokens, or no pair is left.

        A single text is one document. Raises `UserError` if `vocab_size` is too small for the 256 bytes and the special
        tokens, and for text that is not valid UTF-8.
        """
        import rustbpe

        if vocab_size < LEAST_TOKENS:
            raise UserError(
                f"vocabulary too small: vocab_size is {vocab_size}, but bpe needs {LEAST_TOKENS} or more "
                "(256 bytes and the end-of-text token): set vocab_size higher"
            )
        trainer = rustbpe.Tokenizer()
        # A small buffer, since rustbpe holds this many texts at once, and they may be long.
        documents = iter([texts] if isinstance(texts, str) else texts)
        try:
            trainer.train_from_iterator(documents, vocab_size=vocab_size - 1, buffer_size=64, pattern=GPT4_SPLIT)
        except UnicodeEncodeError as error:
            raise not_text(error) from None
        ranks = sorted(trainer.get_mergeable_ranks(), key=lambda entry: entry[1])
        return cls([bytes(token) for token, _ in ranks])

    @classmethod
    def fit(cls, settings: Any, texts: Texts, vocab_size: int | None = None) -> Self:
        wanted = settings.vocab_size or vocab_size or cls.usual_vocab_size(settings)
        if vocab_size is not None and wanted > vocab_size:
            raise UserError(
                f"bpe_vocab_size is {wanted}, but vocab_size leaves room for {vocab_size} trained tokens: "
                "lower it, or set vocab_size higher"
            )
        return cls.train(texts(), wanted)

    @classmethod
    def usual_vocab_size(cls, settings: Any) -> int:
        return settings.vocab_size or super().usual_vocab_size(settings)

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        try:
            return self._encoded(text)
        except UnicodeEncodeError as error:
            raise not_text(error) from None
        except ValueError as error:
            raise UserError(f"the tokenizer cannot split this text ({error}): use another one") from None

    def to_json(self) -> dict[str, Any]:
        # Latin-1 maps byte b to code point b: lossless and readable.
        return self._described(pattern=self.pattern, ranks=[token.decode("latin-1") for token in self.ranks])

    @classmethod
    def _from_json(cls, content: dict[str, Any]) -> Self:
        ranks = [token.encode("latin-1") for token in typed_entry(content, "ranks", list)]
        return cls(ranks, pattern=typed_entry(content, "pattern", str), special_tokens=special_tokens_in(content))
