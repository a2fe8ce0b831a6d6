"""What must be known of the files that a text comes from before it is encoded: their content, and how to divide it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minitransformer.errors import UserError
from minitransformer.text.corpora import Corpus, Signature, kind
from minitransformer.text.preparing import check_unchanged, hash_of, noted, progress_bar
from minitransformer.text.tables import TABLES

FORMAT = 1
READER = "rows"
# The division by document stands if validation is at least this part, and at most this multiple, of what was asked.
TOLERANCE = 2.0


@dataclass(frozen=True)
class Scan:
    """What must be known of a corpus before it is encoded."""

    digest: str
    documents: int
    characters: int
    bytes: int
    validation_bytes: int
    """of the documents that `is_validation` picks"""

    def balanced(self, fraction: float) -> bool:
        """Whether dividing by document gives validation about its share; with few documents it may not."""
        share = self.validation_bytes / self.bytes
        return self.documents > 1 and fraction / TOLERANCE <= share <= min(fraction * TOLERANCE, (1 + fraction) / 2)


@dataclass(frozen=True)
class Source:
    """The files of both splits, as they are now: a corpus to divide by `fraction`, or one for each split."""

    corpus: Corpus
    validation: Corpus | None
    fraction: float
    scan: Scan
    """of the corpus"""
    validation_scan: Scan | None
    signatures: tuple[Signature, ...]

    @property
    def corpora(self) -> list[Corpus]:
        return [self.corpus] if self.validation is None else [self.corpus, self.validation]

    @property
    def scans(self) -> list[Scan]:
        return [self.scan] if self.validation_scan is None else [self.scan, self.validation_scan]

    @property
    def bytes(self) -> int:
        return sum(scan.bytes for scan in self.scans)

    @property
    def splits(self) -> Sequence[str]:
        """How the text can be divided, the best way first."""
        if self.validation is not None:
            return ("given",)
        if not self.fraction:
            return ("none",)
        return ("documents", "contiguous") if self.scan.balanced(self.fraction) else ("contiguous",)

    @property
    def division(self) -> float | str:
        """What the splits depend on beside the corpus."""
        return self.fraction if self.validation_scan is None else self.validation_scan.digest

    def check_unchanged(self) -> None:
        """Raises `UserError` if a file has changed since it was scanned."""
        for corpus, signature in zip(self.corpora, self.signatures, strict=True):
            check_unchanged(corpus, signature)


def source_of(corpus: Corpus, validation: Corpus | None, fraction: float, cache: Path, progress: bool) -> Source:
    corpora = [corpus] if validation is None else [corpus, validation]
    signatures = tuple(each.signature() for each in corpora)
    scans = [
        _remembered_scan(each, signature, fraction, cache, progress)
        for each, signature in zip(corpora, signatures, strict=True)
    ]
    return Source(corpus, validation, fraction, scans[0], scans[1] if validation is not None else None, signatures)


def check_apart(corpus: Corpus, validation: Corpus) -> None:
    """Raises `UserError` if a file is in both: a model is not judged by what it has seen."""
    seen = {file.resolve() for file in corpus.files}
    if both := [file for file in validation.files if file.resolve() in seen]:
        raise UserError(f"{both[0]} is in --data and in --validation-data: move it, or leave it out of one of them")


def is_validation(beginning: str, fraction: float) -> bool:
    """The side of the document that begins so: a hash, so duplicates stay together and order does not matter."""
    digest = hashlib.blake2b(beginning.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < fraction * 2**64


def _remembered_scan(corpus: Corpus, signature: Signature, fraction: float, cache: Path, progress: bool) -> Scan:
    """The scan of these files in this state, from disk if they were scanned before."""
    # Tables were text before they were read by their rows: what was noted of them then is not this.
    tables = [READER for path in corpus.files if kind(path) in TABLES][:1]
    note = cache / f"scan-{hash_of([FORMAT, signature, corpus.field, fraction, *tables])[:16]}.json"

    def find() -> Scan:
        scan = _scan(corpus, fraction, progress)
        check_unchanged(corpus, signature)
        return scan

    return noted(note, Scan, find)


def _scan(corpus: Corpus, fraction: float, progress: bool) -> Scan:
    digest, documents, characters, size, validation = hashlib.sha256(), 0, 0, 0, 0
    aside = False
    with progress_bar("reading", corpus.size, progress) as bar:
        for piece in corpus.pieces(bar.update):
            encoded = piece.text.encode()
            if piece.opens:
                documents += 1
                aside = is_validation(piece.text, fraction)
                digest.update(b"\xff")  # in no UTF-8, so documents cannot run together
            digest.update(encoded)
            characters += len(piece.text)
            size += len(encoded)
            validation += len(encoded) * aside
    if not documents:
        raise UserError(f"{corpus.name} is empty: put text there")
    return Scan(digest.hexdigest(), documents, characters, size, validation)
