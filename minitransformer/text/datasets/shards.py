"""Tokenized shards, mixed by weight, of which only the rows in use are in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minitransformer.amounts import size
from minitransformer.errors import StorageError, UserError
from minitransformer.files import locked, sha256, writing
from minitransformer.text.caching import hash_of, note_once
from minitransformer.text.corpora import LINES, Corpus, Files, kind
from minitransformer.text.datasets.base import BatchShape, DataRequest, PreparedData
from minitransformer.text.datasets.pipeline import SPLITS, NotPrepared
from minitransformer.text.datasets.text import TextPreparation, TooShort
from minitransformer.text.folders import REMEDY
from minitransformer.text.mixture import whole_weights
from minitransformer.text.shard_index import Shard, ShardIndex
from minitransformer.text.tables import TABLES
from minitransformer.text.threads import progress_bar
from minitransformer.text.token_files import BLOCK, JoinedTokens, TokenFile, dtype_of, reading_shard
from minitransformer.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from minitransformer.text.batches import SequentialWindows

FORMAT = 1


@dataclass(frozen=True)
class TokenScan:
    """Statistics of a file of tokens, before and after a cut."""

    sha256: str
    bytes: tuple[int, int]
    documents: tuple[int, int]


@dataclass(frozen=True)
class FileDigest:
    """The SHA-256 of a file."""

    sha256: str


@dataclass(frozen=True)
class PreparedShard:
    """A shard's tokens for training and validation, with the bytes and documents of each, and a digest of them."""

    path: str
    train: TokenFile
    validation: TokenFile
    bytes: tuple[int, int]
    documents: tuple[int, int]
    digest: str


@dataclass(frozen=True)
class PreparedShards(PreparedData):
    """The shards to train on, their whole weights, and the files of validation: the ends of these, or others."""

    folder: Path
    tokenizer: Tokenizer
    shards: tuple[PreparedShard, ...]
    weights: tuple[int, ...]
    held_out: tuple[PreparedShard, ...]
    """whole shards for validation, in place of the ends of `shards`"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_tokenizer", self.tokenizer)

    @property
    def sources(self) -> Mapping[str, str]:
        return {shard.path: shard.digest for shard in (*self.shards, *self.held_out)}

    @cached_property
    def _joined(self) -> dict[str, JoinedTokens]:
        validation = [shard.train for shard in self.held_out] or [shard.validation for shard in self.shards]
        return {
            "train": JoinedTokens(tuple(shard.train for shard in self.shards)),
            "validation": JoinedTokens(tuple(validation)),
        }

    def targets(self, split: str) -> JoinedTokens:
        return self._joined[split]

    def num_tokens(self, split: str) -> int:
        return len(self.targets(split))

    def num_bytes(self, split: str) -> int:
        return self._counted(split, lambda shard: shard.bytes)

    def _counted(self, split: str, counts: Callable[[PreparedShard], tuple[int, int]]) -> int:
        if split == "validation" and self.held_out:
            return sum(counts(shard)[0] for shard in self.held_out)
        return sum(counts(shard)[split == "validation"] for shard in self.shards)

    def shuffled_batches(self, shape: BatchShape, seed: int, step: int, change: Callable[[Any], Any]) -> list[Any]:
        from minitransformer.text.mixed_batches import MixedWindows  # late: text is prepared before torch is imported

        files = [shard.train for shard in self.shards]
        windows = MixedWindows(files, self.weights, shape.window, shape.rows * shape.micro_batches, seed)
        micro_batches: list[Any] = change(windows.batch(step)).split(shape.rows)
        return micro_batches

    def ordered_batches(self, split: str, shape: BatchShape) -> SequentialWindows:
        from minitransformer.text.batches import SequentialWindows

        tokens = self.targets(split)
        if shape.whole:
            tokens = tokens.part(0, max(1, (len(tokens) - 1) // shape.window) * shape.window + 1)
        return SequentialWindows(tokens, shape.window, shape.rows, shape.stride)

    def summary(self) -> str:
        """Four lines to print, under 80 columns."""
        tokenizer = self.tokenizer
        lines = [f"tokens     {tokenizer.name} tokenizer, {tokenizer.vocab_size:,} tokens", self._mixture()]
        for split in SPLITS:
            if not self.num_tokens(split):
                return "\n".join([*lines, "validation none: overfitting goes unnoticed"])
            documents = self._counted(split, lambda shard: shard.documents)
            amount = f"{self.num_tokens(split):,} tokens from {size(self.num_bytes(split))}"
            lines.append(f"{split:10} {amount}, documents: {documents:,}")
        return "\n".join(lines)

    def _mixture(self) -> str:
        """The line with the heaviest shards, as many as fit."""
        order = sorted(range(len(self.shards)), key=lambda i: -self.weights[i])
        line = f"shards     {len(self.shards)}:"
        for left, i in zip(range(len(order), 0, -1), order, strict=True):
            more = f" {Path(self.shards[i].path).name} {self.weights[i] / sum(self.weights):.1%},"
            if len(line + more) > 70:
                return f"{line} and {left} more"
            line += more
        return line.removesuffix(",")


@dataclass(frozen=True)
class ShardPreparation:
    """Opens the shards of `index`; text among them is tokenized, one shard after the other, into `cache`."""

    index: ShardIndex
    request: DataRequest
    cache: Path

    def run(self) -> PreparedShards:
        """The prepared shards; raises `UserError` for a mistake, `StorageError` for a missing or damaged shard."""
        self._check_request()
        for shard in self.index.all:  # before any is read
            self.index.size(shard)
        with writing(self.cache, REMEDY):
            self.cache.mkdir(parents=True, exist_ok=True)
            tokenizer = self._tokenizer()
            wanted = self.index.validation if self.request.validation_fraction else ()
            fraction = 0.0 if wanted else self.request.validation_fraction
            shards = tuple(self._opened(shard, tokenizer, fraction) for shard in self.index.shards)
            held_out = tuple(self._opened(shard, tokenizer, 0.0) for shard in wanted)
        weights = self._weights(shards)
        origin = [[shard.digest for shard in shards], weights, [shard.digest for shard in held_out], fraction]
        folder = self.cache / hash_of(["shards", FORMAT, tokenizer.fingerprint, *origin])[:16]
        prepared = PreparedShards(folder, tokenizer, shards, weights, held_out)
        self._check_lengths(prepared)
        return prepared

    def _check_request(self) -> None:
        request, name = self.request, self.index.path
        if request.validation_data is not None:
            raise UserError(
                f'{name} is an index of shards: name those for validation in it, under "validation", '
                "in place of --validation-data"
            )
        texts = [shard for shard in self.index.all if shard.is_text]
        if request.field != "text" and not any(kind(Path(shard.path)) in LINES | TABLES for shard in texts):
            raise UserError(f"--field is {request.field!r}, and {name} has no shard with fields: leave it out")

    @cached_property
    def _own(self) -> Tokenizer | None:
        """The tokenizer that the index names."""
        return None if self.index.tokenizer is None else Tokenizer.load(self.index.tokenizer)

    def _tokenizer(self) -> Tokenizer:
        """The tokenizer of the index, or of the run, or one that is fitted to the texts of the index."""
        request, own, name = self.request, self._own, self.index.path
        given = request.tokenizers[0] if request.tokenizers else None
        if own is not None and given is None and request.tokenizer != type(own).choose():
            more = "with settings" if request.tokenizer.name == own.name else f"{request.tokenizer}"
            raise UserError(
                f"{name} brings its {own.name} tokenizer, and --tokenizer is {more}: give --tokenizer {own.name} alone"
            )
        chosen = own or given or self._fitted()
        chosen = chosen.with_special_tokens(request.special_tokens).check_vocab_size(request.vocab_size)
        if given is not None and given.fingerprint != chosen.fingerprint and own is not None:
            raise UserError(
                f"{name} has another tokenizer than the run: tokenize its texts by that of the run, with "
                "--tokenizer RUN/tokenizer.json"
            )
        return chosen

    def _fitted(self) -> Tokenizer:
        files = tuple(self.index.place(shard) for shard in self.index.all)
        return self._text_preparation(str(self.index.path), files, self.request.tokenizer, 0.0).fit()[0]

    def _text_preparation(self, name: str, files: tuple[Path, ...], tokenizer: Any, fraction: float) -> TextPreparation:
        return TextPreparation(
            Corpus(name, files, self.request.field),
            tokenizer,
            context_length=1,
            vocab_size=self.request.vocab_size,
            validation_fraction=fraction,
            special_tokens=self.request.special_tokens,
            cache=self.cache,
            only_cached=self.request.only_cached,
        )

    def _opened(self, shard: Shard, tokenizer: Tokenizer, fraction: float) -> PreparedShard:
        path = self.index.place(shard)
        return self._text(shard, path, tokenizer, fraction) if shard.is_text else self._tokens(shard, path, fraction)

    def _text(self, shard: Shard, path: Path, tokenizer: Tokenizer, fraction: float) -> PreparedShard:
        if shard.sha256 is not None:
            self._check_digest(shard, self._noted(path, FileDigest, lambda: FileDigest(sha256(path))).sha256)
        text = self._text_preparation(str(path), (path,), tokenizer, fraction).run()
        train, validation = (TokenFile.open(text.folder / f"{split}.bin", text.train.dtype) for split in SPLITS)
        counts = (text.train_bytes, text.validation_bytes), (text.train_documents, text.validation_documents)
        return PreparedShard(shard.path, train, validation, *counts, text.folder.name)

    def _tokens(self, shard: Shard, path: Path, fraction: float) -> PreparedShard:
        assert self._own is not None, "an index with tokens names their tokenizer"
        tokenizer = self._own
        tokens = TokenFile.open(path, dtype_of(tokenizer))
        if shard.tokens not in (None, len(tokens)):
            raise StorageError(
                f"shard {path} has {len(tokens):,} tokens, and {self.index.path} says {shard.tokens:,}: "
                "it is truncated or another one; restore it"
            )
        cut = len(tokens) - int(len(tokens) * fraction)
        scan = self._noted(path, TokenScan, lambda: self._scan(tokens, tokenizer, cut), tokenizer.fingerprint, cut)
        self._check_digest(shard, scan.sha256)
        parts = tokens.part(0, cut), tokens.part(cut, len(tokens))
        return PreparedShard(shard.path, *parts, scan.bytes, scan.documents, scan.sha256)

    def _check_digest(self, shard: Shard, found: str) -> None:
        if shard.sha256 is not None and shard.sha256.lower() != found:
            raise StorageError(
                f"shard {self.index.place(shard)} has changed: its SHA-256 is {found[:12]}…, and {self.index.path} "
                f"says {shard.sha256[:12]}…: restore it"
            )

    def _noted(self, path: Path, kind: type[Any], find: Callable[[], Any], *key: Any) -> Any:
        """What `find` finds in the file at `path` in its present state, remembered by all processes."""
        with reading_shard(path):
            signature = Files("", (path,)).signature()
        note = self.cache / f"shard-{hash_of([FORMAT, kind.__name__, signature, *key])[:16]}.json"

        def read() -> Any:
            if self.request.only_cached:
                raise NotPrepared
            return find()

        with locked(note):  # of several ranks, one reads it
            return note_once(note, kind, read)

    def _scan(self, tokens: TokenFile, tokenizer: Tokenizer, cut: int) -> TokenScan:
        digest, most = hashlib.sha256(), tokenizer.vocab_size
        counts = [np.zeros(most, np.int64), np.zeros(most, np.int64)]
        with progress_bar(f"reading {tokens.path.name}", len(tokens) * tokens.dtype.itemsize, progress=True) as bar:
            for start in range(0, len(tokens), BLOCK):
                block = tokens[start : start + BLOCK]
                digest.update(block.tobytes())
                if (largest := int(block.max())) >= most:
                    raise UserError(
                        f"shard {tokens.path} has the token {largest:,}, and the tokenizer of {self.index.path} "
                        f"has {most:,}: name the tokenizer that made it"
                    )
                before = max(0, cut - start)
                for count, part in zip(counts, (block[:before], block[before:]), strict=True):
                    count += np.bincount(part, minlength=most)
                bar.update(block.nbytes)
        sizes = np.array([len(piece) for piece in tokenizer.pieces])
        first, second = counts
        documents = int(first[tokenizer.end_of_text]), int(second[tokenizer.end_of_text])
        return TokenScan(digest.hexdigest(), (int(sizes @ first), int(sizes @ second)), documents)

    def _weights(self, shards: Sequence[PreparedShard]) -> tuple[int, ...]:
        weights = [
            shard.weight or float(len(found.train)) for shard, found in zip(self.index.shards, shards, strict=True)
        ]
        return tuple(whole_weights(weights))

    def _check_lengths(self, prepared: PreparedShards) -> None:
        """Raises `TooShort` unless every shard, and validation if there is any, has a window."""
        length = self.request.context_length
        parts = {f"shard {self.index.path.parent / shard.path}": len(shard.train) for shard in prepared.shards}
        if prepared.held_out or self.request.validation_fraction:
            parts[f"validation of {self.index.path}"] = prepared.num_tokens("validation")
        shortest = min(parts, key=lambda name: parts[name])
        if parts[shortest] <= length:
            raise TooShort(
                f"{shortest} has {parts[shortest]:,} tokens, too few for a window of {length + 1}: choose a smaller "
                "--context-length, or join it to another",
                longest=parts[shortest] - 1,
            )
