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
from minitransformer.text.cleaning.measures import measure_texts
from minitransformer.text.cleaning.ngrams import HashedTexts, hash_ngrams, hash_words
from minitransformer.text.cleaning.personal import Span
from minitransformer.text.cleaning.quality import Judged
from minitransformer.text.cleaning.scripts import SCRIPTS
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

    def __init__(self, config: CleaningConfig, folder: Path, sampled: float) -> None:
        self.config, self.changes = config, Changes(config)
        self.rules = [rule.make() for rule in config.rules]
        self.held_out = HeldOut.open(folder) if config.against else None
        self.sampled = sampled

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose tokens are counted."""
        assert self.config.tokenizer is not None
        return Tokenizer.load(Path(self.config.tokenizer))

    def examine(self, block: BlockOfFile) -> Examined:
        """What there is to know of the documents of `block`."""
        read = [unit.text for unit in block.file.parse(block.content)]
        changed = [self.changes.of(text) for text in read]
        texts = [text for text, _, _ in changed]
        records = np.zeros(len(texts), RECORD)
        records["read"] = sizes = [len(text.encode()) for text in texts]
        for number, (text, old) in enumerate(zip(texts, read, strict=True)):
            if text is not old:
                records["read"][number] = len(old.encode())
        stripped = [text.strip() for text in texts]
        records["fingerprint"] = fingerprints(stripped)
        records["bytes"], records["characters"] = sizes, list(map(len, texts))
        measures = measure_texts(texts)
        records["words"], records["script"] = measures.words, measures.main_scripts
        records["lines"] = [text.count("\n") + 1 for text in texts]
        records["verdict"] = list(map(self._verdict, stripped))
        records["changed"] = [bits for _, bits, _ in changed]
        records["personal"] = [self._kinds(spans) if spans else 0 for _, _, spans in changed]
        totals = {
            "letters": _named(SCRIPTS, measures.scripts.sum(0)),
            "personal": Counter(span.kind for _, _, spans in changed for span in spans),
            **self._tokens(texts, records),
        }
        return Examined({"documents": records, **self._compared(texts)}, totals)

    def _verdict(self, stripped: str) -> int:
        if not stripped:
            return EMPTY
        if self.rules:
            document = Judged(stripped)
            return next((RULES + i for i, rule in enumerate(self.rules) if rule.refuses(document)), KEPT)
        return KEPT

    def _kinds(self, spans: Sequence[Span]) -> int:
        """The kinds of personal data as a bit set, by their order."""
        found = {span.kind for span in spans}
        return sum(1 << bit for bit, kind in enumerate(self.changes.kinds) if kind.name in found)

    def _tokens(self, texts: Sequence[str], records: npt.NDArray[Any]) -> dict[str, int]:
        """Tokens and bytes of the documents that are sampled; their hashes decide which these are."""
        if self.config.tokenizer is None:
            return {}
        chosen = np.flatnonzero(records["fingerprint"][:, 0] / 2**64 < self.sampled)
        tokens = sum(len(self.tokenizer.encode_array(texts[number])) for number in chosen.tolist())
        return {"sampled_tokens": tokens, "sampled_bytes": int(records["bytes"][chosen].sum(dtype=np.int64))}

    def _compared(self, texts: Sequence[str]) -> dict[str, npt.NDArray[Any]]:
        """What is needed to compare documents with each other, and with held-out texts."""
        near, held_out = self.config.duplicates == "near", self.held_out
        if not near and held_out is None:
            return {}
        words = hash_words(texts)
        found = {"signatures": signatures(hash_ngrams(words, SHINGLE))} if near else {}
        return found if held_out is None else found | held_out.found(hash_ngrams(words, self.config.leak_words))


def _named(names: Sequence[str], counts: npt.NDArray[np.int64]) -> dict[str, int]:
    """The counts that are not 0, by name."""
    return {name: count for name, count in zip(names, counts.tolist(), strict=True) if count}


def fingerprints(texts: Sequence[str]) -> npt.NDArray[np.uint64]:
    """[texts, 2] hashes of 128 bits, which differ for different texts."""
    digests = (hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


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
def _examiner(config: CleaningConfig, folder: Path, sampled: float) -> Examiner:
    """The examiner of a process, which makes it once."""
    return Examiner(config, folder, sampled)


def examine_block(config: CleaningConfig, folder: Path, sampled: float, block: BlockOfFile) -> Examined:
    """What `Examiner` finds out about `block`, of the job with this `folder`."""
    return _examiner(config, folder, sampled).examine(block)


def reason_of(verdict: int, rules: Sequence[str]) -> str:
    """The verdict in words; `rules` are the names of the quality rules."""
    return REASONS[verdict] if verdict < RULES else rules[verdict - RULES]
