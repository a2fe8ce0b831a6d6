"""The pipeline of every dataset, from files to cached token ids: scan, fit a tokenizer, encode, open."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from minitransformer.errors import UserError
from minitransformer.files import sweep, writing
from minitransformer.plugins import plugins_behind
from minitransformer.records import read_json
from minitransformer.settings import Chosen, to_json
from minitransformer.text.caching import build_once, fit_once, hash_of, note_once
from minitransformer.text.corpora import Files, Signature
from minitransformer.text.folders import REMEDY, work_folder
from minitransformer.text.threads import progress_bar
from minitransformer.text.tokenizers import Tokenizer

FORMAT = 1
SPLITS = ("train", "validation")
# A sample of the corpus consists of evenly spread parts of this many characters.
STRETCH = 1 << 14
META = "meta.json"
TOKENIZERS = ("tokenizer.json", "target_tokenizer.json")


class NotPrepared(Exception):
    """Data that would have to be read, fitted or encoded, where only cached data was asked for."""


class Scan(Protocol):
    """Statistics of a corpus, needed before encoding; `digest` is the hash of its content."""

    @property
    def digest(self) -> str: ...


C = TypeVar("C", bound=Files)
S = TypeVar("S", bound=Scan)
D = TypeVar("D")
TextParts = Callable[[], Iterable[Iterator[str]]]
"""texts to fit a tokenizer to; each iterator is sampled in proportion"""


@dataclass
class Preparation(ABC, Generic[C, S, D]):
    """The pipeline from files to token ids, executed by `run`; subclasses define the steps.

    `tokenizer` is a choice, to be fitted with `vocab_size`, or a tokenizer, which must fit into
    `vocab_size`. A corpus for `validation` is the validation split, and all of `corpus` is trained
    on; otherwise `validation_fraction` of `corpus`, which may be 0, is held out. `workers` threads encode (default: one
    per core). Results are cached in `cache` (default: the work folder's `prepared/`).
    """

    corpus: C
    tokenizer: Chosen[Tokenizer] | Tokenizer
    _: KW_ONLY
    context_length: int
    vocab_size: int | None = None
    validation: C | None = None
    validation_fraction: float = 0.1
    cache: Path = field(default_factory=lambda: work_folder() / "prepared")
    workers: int | None = None
    progress: bool = True
    only_cached: bool = False
    """raise `NotPrepared` where anything would have to be read, fitted or encoded"""

    scan_type: ClassVar[type]
    key: ClassVar[Sequence[str]] = ()
    """prefix of the cache keys"""

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction is {self.validation_fraction}: it must be at least 0 and below 1, such as 0.1"
            )
        if self.validation is not None:
            self.validation_fraction = 0.0

    @property
    def corpora(self) -> list[C]:
        return [self.corpus] if self.validation is None else [self.corpus, self.validation]

    def run(self) -> D:
        """The prepared data, built by one process and opened by all others.

        Raises `UserError` for too little text, unreadable text, and a full disk.
        """
        self.fit()
        with writing(self.cache, REMEDY):
            fault: UserError | None = None
            for division in self.divisions():
                folder = self.cache / self._hash(self.identity(division), *map(type, self.tokenizers))
                prepared = build_once(folder, partial(self._build, division), self.open)
                fault = self.fault(prepared)
                if fault is None:
                    return prepared
        assert fault is not None
        raise fault

    def fit(self) -> tuple[Tokenizer, ...]:
        """The tokenizers alone, fitted to the scanned corpora if necessary."""
        with writing(self.cache, REMEDY):
            self.cache.mkdir(parents=True, exist_ok=True)
            sweep(self.cache)
            self.signatures = [corpus.signature() for corpus in self.corpora]
            self.scans: list[S] = list(map(self._remembered_scan, self.corpora, self.signatures))
            self.tokenizers = self.choose_tokenizers()
        return self.tokenizers

    # Defined by subclasses

    @abstractmethod
    def scan_key(self, corpus: C) -> list[Any]:
        """What a scan depends on besides the files' signature."""

    @abstractmethod
    def scan(self, corpus: C, on_read: Callable[[int], object]) -> S:
        """Read the whole corpus; `on_read` is called with numbers of bytes read."""

    @abstractmethod
    def choose_tokenizers(self) -> tuple[Tokenizer, ...]:
        """One tokenizer, or those of sources and targets, fitted if necessary."""

    def divisions(self) -> Sequence[str]:
        """The ways to split the corpus, in order of preference."""
        return ("only",)

    @abstractmethod
    def identity(self, division: str) -> list[Any]:
        """Everything that the token ids depend on."""

    @abstractmethod
    def write(self, division: str, folder: Path) -> dict[str, Any]:
        """Encode the split corpora into files in `folder`; returns the metadata for `load`."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, meta: dict[str, Any], tokenizers: Sequence[Tokenizer]) -> D:
        """Load the result of `write`; raises any error for an incomplete folder."""

    @abstractmethod
    def fault(self, prepared: D) -> UserError | None:
        """An error for unusable data; None if it is usable."""

    # Shared by all datasets

    def fitted(
        self, chosen: Chosen[Tokenizer], texts: TextParts, size: int, digests: Sequence[str], *key: Any
    ) -> Tokenizer:
        """The `chosen` tokenizer for `texts` of `size` bytes, cached on disk.

        `key` starts with the model's vocabulary size, or None.
        """
        name, limit = chosen.name, chosen.variant.fit_limit
        if limit and size > limit and self.progress and not self.only_cached:
            sampled = f"an even sample of {limit / 1e6:.0f} MB of the {size / 1e6:.0f} MB"
            print(f"fitting {name} to {sampled}", file=sys.stderr)

        def read() -> Iterator[str]:
            with progress_bar(f"fitting {name}", size, self.progress) as bar:
                for part in texts():
                    counted = _counted(part, bar.update)
                    yield from counted if limit is None else sample(counted, limit / size)

        def fit() -> Tokenizer:
            self._check_may_prepare()
            tokenizer = chosen.variant.fit(chosen.settings, read, key[0])
            self.check_unchanged()
            return tokenizer

        place = self._hash([*digests, name, to_json(chosen.settings), *key], chosen.variant)
        return fit_once(self.cache / f"tokenizer-{place}.json", fit)

    @classmethod
    def open(cls, folder: Path) -> D | None:
        """The data in `folder`; None if it is missing or incomplete."""
        try:
            meta = read_json(folder / META, REMEDY)
            names = [name for name in TOKENIZERS if name == TOKENIZERS[0] or (folder / name).exists()]
            return cls.load(folder, meta, [Tokenizer.load(folder / name) for name in names])
        except (OSError, ValueError, KeyError, TypeError, UserError):
            return None

    def _hash(self, content: list[Any], *tokenizers: type[Tokenizer]) -> str:
        """The cache key of `content`, made by this dataset and `tokenizers`, which plugins may have defined."""
        return hash_of([*self.key, FORMAT, *content, *plugins_behind(type(self), *tokenizers)])[:16]

    def _remembered_scan(self, corpus: C, signature: Signature) -> S:
        """The scan of these files in this state, cached on disk."""

        def find() -> S:
            self._check_may_prepare()
            with progress_bar("reading", corpus.size, self.progress) as bar:
                scan = self.scan(corpus, bar.update)
            corpus.check_unchanged(signature)
            return scan

        note = self.cache / f"scan-{self._hash([signature, *self.scan_key(corpus)])}.json"
        return note_once(note, self.scan_type, find)

    def _check_may_prepare(self) -> None:
        if self.only_cached:
            raise NotPrepared

    def _build(self, division: str, folder: Path) -> None:
        self._check_may_prepare()
        for tokenizer, name in zip(self.tokenizers, TOKENIZERS, strict=False):
            tokenizer.save(folder / name)
        meta = self.write(division, folder)
        self.check_unchanged()
        (folder / META).write_text(json.dumps({"format": FORMAT, **meta}))

    def check_unchanged(self) -> None:
        """Raises `UserError` if a file has changed since it was scanned."""
        for corpus, signature in zip(self.corpora, self.signatures, strict=True):
            corpus.check_unchanged(signature)


def _counted(texts: Iterable[str], count: Callable[[int], object]) -> Iterator[str]:
    for text in texts:
        yield text
        count(len(text.encode()))


def sample(texts: Iterable[str], share: float) -> Iterator[str]:
    """About a fraction `share` of the characters, in evenly spread parts, deterministically."""
    seen = taken = 0
    for text in texts:
        for start in range(0, len(text), STRETCH):
            stretch = text[start : start + STRETCH]
            seen += len(stretch)
            if taken + len(stretch) <= seen * share:
                taken += len(stretch)
                yield stretch
