"""What one process finds out about a block of documents, each judged by itself."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minitransformer.text.cleaning.config import Changes, CleaningConfig
from minitransformer.text.cleaning.formats import DocumentFile
from minitransformer.text.cleaning.held_out import HeldOut
from minitransformer.text.cleaning.journal import RECORD, SIGNATURE, Examined
from minitransformer.text.cleaning.ngrams import HashedTexts, hash_ngrams, hash_words
from minitransformer.text.cleaning.quality import Judged
from minitransformer.text.cleaning.scripts import SCRIPTS, count_scripts, main_script
from minitransformer.text.tokenizers import Tokenizer

KEPT, EMPTY, EXACT, NEAR, LEAK, RULES = 0, 1, 2, 3, 4, 16
"""verdicts on a document; from `RULES` on, the number of the quality rule that refuses it"""
REASONS = {EMPTY: "empty", EXACT: "exact duplicate", NEAR: "near duplicate", LEAK: "shared with held-out text"}
SHINGLE = 3
"""words of the n-grams by which near duplicates are found"""
SEED = 20


class BlockOfFile(NamedTuple):
    """A block of the file number `number`."""

    number: int
    file: DocumentFile
    content: Any


class Examiner:
    """Judges documents one by one, by the choices of a configuration.

    A tokenizer counts the tokens of about `sampled` of all documents, chosen by their hash.
    """

    def __init__(self, config: CleaningConfig, held_out: Path | None, sampled: float) -> None:
        self.config, self.changes = config, Changes(config)
        self.rules = [rule.make() for rule in config.rules]
        self.held_out = None if held_out is None else HeldOut.open(held_out)
        self.sampled = sampled

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose tokens are counted."""
        assert self.config.tokenizer is not None
        return Tokenizer.load(Path(self.config.tokenizer))

    def examine(self, block: BlockOfFile) -> Examined:
        """What there is to know of the documents of `block`."""
        units = block.file.parse(block.content)
        records = np.zeros(len(units), RECORD)
        totals: dict[str, Any] = {}
        texts = []
        for record, unit in zip(records, units, strict=True):
            texts.append(self._examine_text(unit.text, record, totals))
        streams: dict[str, npt.NDArray[Any]] = {"documents": records}
        if self.config.duplicates == "near" or self.held_out is not None:
            words = hash_words(texts)
            if self.config.duplicates == "near":
                streams["signatures"] = signatures(hash_ngrams(words, SHINGLE))
            if self.held_out is not None:
                streams |= self.held_out.found(hash_ngrams(words, self.config.leak_words))
        return Examined(streams, totals)

    def _examine_text(self, read: str, record: Any, totals: dict[str, Any]) -> str:
        """Fill in the `record` of a document, add to `totals`, and return the new text."""
        text, record["changed"], spans = self.changes.of(read)
        encoded = text.encode()
        stripped = text.strip()
        digest = hashlib.blake2b(stripped.encode() if len(stripped) < len(text) else encoded, digest_size=16).digest()
        record["fingerprint"] = np.frombuffer(digest, "<u8")
        record["read"] = len(encoded) if read is text else len(read.encode())
        record["bytes"], record["characters"] = len(encoded), len(text)
        record["words"], record["lines"] = len(text.split()), text.count("\n") + 1
        scripts = count_scripts(text)
        record["script"] = main_script(scripts)
        record["verdict"] = self._verdict(stripped)
        self._count(totals, text, record, scripts, Counter(span.kind for span in spans))
        return text

    def _verdict(self, stripped: str) -> int:
        if not stripped:
            return EMPTY
        if self.rules:
            document = Judged(stripped)
            return next((RULES + i for i, rule in enumerate(self.rules) if rule.refuses(document)), KEPT)
        return KEPT

    def _count(
        self, totals: dict[str, Any], text: str, record: Any, scripts: npt.NDArray[np.int64], found: Counter[str]
    ) -> None:
        letters = totals.setdefault("letters", {})
        for place in np.flatnonzero(scripts):
            letters[SCRIPTS[place]] = letters.get(SCRIPTS[place], 0) + int(scripts[place])
        for bit, kind in enumerate(self.changes.kinds):
            if found[kind.name]:
                personal = totals.setdefault("personal", {})
                personal[kind.name] = personal.get(kind.name, 0) + found[kind.name]
                record["personal"] |= 1 << bit
        if self.config.tokenizer is not None and record["fingerprint"][0] / 2**64 < self.sampled:
            totals["sampled_tokens"] = totals.get("sampled_tokens", 0) + len(self.tokenizer.encode_array(text))
            totals["sampled_bytes"] = totals.get("sampled_bytes", 0) + int(record["bytes"])


def signatures(shingles: HashedTexts) -> npt.NDArray[np.uint32]:
    """[texts, SIGNATURE] MinHash signatures: of two texts, the share of equal numbers estimates the Jaccard index.

    Broder 1997 (On the resemblance and containment of documents), section 3.
    """
    from rensa import RMinHash

    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        shingles.hashes, shingles.offsets.astype(np.uint64), SIGNATURE, SEED
    )
    return np.array(matrix.to_rows(), "<u4").reshape(-1, SIGNATURE)


@lru_cache(maxsize=1)
def _examiner(config: CleaningConfig, held_out: Path | None, sampled: float) -> Examiner:
    """The examiner of a process, which makes it once."""
    return Examiner(config, held_out, sampled)


def examine_block(config: CleaningConfig, held_out: Path | None, sampled: float, block: BlockOfFile) -> Examined:
    """What `Examiner` finds out about `block`."""
    return _examiner(config, held_out, sampled).examine(block)


def reason_of(verdict: int, rules: Sequence[str]) -> str:
    """The verdict in words; `rules` are the names of the quality rules."""
    return REASONS[verdict] if verdict < RULES else rules[verdict - RULES]
