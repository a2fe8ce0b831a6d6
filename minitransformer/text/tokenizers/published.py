"""The encodings that tiktoken publishes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar, Self

from minitransformer.errors import UserError
from minitransformer.files import whole_file
from minitransformer.text.tokenizers.base import Texts, Tokenizer
from minitransformer.text.tokenizers.bpe import BPE


class TiktokenEncoding(BPE):
    """A published tiktoken encoding; a saved one includes its ranks and needs no network."""

    Settings = Tokenizer.Settings  # type: ignore[assignment]

    fit_limit = 0
    size: ClassVar[int]
    host: ClassVar[str] = "https://openaipublic.blob.core.windows.net/"
    files: ClassVar[tuple[str, ...]]

    @classmethod
    def fit(cls, settings: Any, texts: Texts, vocab_size: int | None = None) -> Self:
        import tiktoken

        cls._fetch()
        try:
            encoding = tiktoken.get_encoding(cls.name)
        except Exception as error:  # from requests, the file system or tiktoken's own checks
            raise cls._unavailable(error) from None
        ranks = sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.__getitem__)
        special_tokens = dict(encoding._special_tokens)
        return cls(ranks, pattern=encoding._pat_str, special_tokens=special_tokens).check_vocab_size(vocab_size)

    @classmethod
    def usual_vocab_size(cls, settings: Any) -> int:
        return cls.size

    @classmethod
    def _cached(cls) -> dict[str, Path]:
        """tiktoken's cache paths: each file under the SHA-1 of its URL."""
        folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
        cache = Path(folder or Path(tempfile.gettempdir(), "data-gym-cache"))
        addresses = [cls.host + file for file in cls.files]
        return {address: cache / hashlib.sha1(address.encode()).hexdigest() for address in addresses}

    @classmethod
    def _fetch(cls) -> None:
        """Fill tiktoken's cache, because its own download has no time limit."""
        from urllib.request import urlopen

        for address, path in cls._cached().items():
            if path.exists():
                continue
            try:
                with urlopen(address, timeout=20) as answer:
                    content = answer.read()
                with whole_file(path) as file:
                    file.write(content)
            except OSError as error:
                raise cls._unavailable(error) from None

    @classmethod
    def _unavailable(cls, error: Exception) -> UserError:
        files = " and ".join(f"{address} as {path.name}" for address, path in cls._cached().items())
        reason = str(error) or type(error).__name__
        return UserError(
            f"the {cls.name} encoding cannot be fetched ({reason}): on a connected machine download {files}, put it "
            "into a folder here and set TIKTOKEN_CACHE_DIR to that folder; or choose the bpe, bytes or chars tokenizer"
        )


class GPT2Encoding(TiktokenEncoding, name="gpt2"):
    """GPT-2's 50,257 tokens; r50k_base is the same."""

    size = 50_257
    files = ("gpt-2/encodings/main/vocab.bpe", "gpt-2/encodings/main/encoder.json")


class CL100KEncoding(TiktokenEncoding, name="cl100k_base"):
    """GPT-4's 100,277 ids."""

    size = 100_277
    files = ("encodings/cl100k_base.tiktoken",)


class O200KEncoding(TiktokenEncoding, name="o200k_base"):
    """GPT-4o's 200,019 ids."""

    size = 200_019
    in_gguf = False
    files = ("encodings/o200k_base.tiktoken",)
