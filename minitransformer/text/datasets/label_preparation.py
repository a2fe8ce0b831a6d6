"""Tokenization of labelled texts, and the numbers of their classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minitransformer.errors import UserError
from minitransformer.settings import Chosen
from minitransformer.text.datasets.overlap import shared_warning
from minitransformer.text.datasets.pair_data import PreparedPairs
from minitransformer.text.datasets.pair_preparation import EncodedPair, PairPreparation, PairScan, place_of
from minitransformer.text.datasets.pipeline import SPLITS
from minitransformer.text.pairs import Pair
from minitransformer.text.tokenizers import Tokenizer

MOST_CLASSES = 10_000
"""more are texts, not labels"""
SHOWN = 8


@dataclass(frozen=True)
class LabelScan(PairScan):
    """Statistics of labelled texts; `labels` are sorted."""

    labels: tuple[str, ...]


@dataclass(frozen=True)
class PreparedLabels(PreparedPairs):
    """Texts, and as the target of each the number of its class in `class_names`."""

    class_names: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        return self.class_names

    @cached_property
    def class_counts(self) -> npt.NDArray[np.int64]:
        """[classes] number of training texts of each class."""
        return np.bincount(self.train.targets.tokens, minlength=len(self.classes))

    @property
    def majority_baseline(self) -> float | None:
        labels = self.validation.targets.tokens
        return float((labels == self.class_counts.argmax()).mean()) if len(labels) else None

    def num_tokens(self, split: str) -> int:
        pairs = self.pairs(split)
        return len(pairs.sources.tokens) + len(pairs)

    def summary(self) -> str:
        lines = [f"tokens     {self.tokenizer.name} tokenizer, {self.tokenizer.vocab_size:,} tokens"]
        lines.append(f"classes    {len(self.classes):,}: {_some(self.classes)}")
        for split in SPLITS:
            count = f"{len(self.pairs(split)):,} texts of {self.num_tokens(split):,} tokens"
            lines.append(f"{split:10} {count if len(self.pairs(split)) else 'none: overfitting goes unnoticed'}")
        if self.shared:
            lines.append(shared_warning(self.shared, len(self.validation), "texts"))
        if self.skipped or self.cut:
            lines.append(f"too long   {self.skipped:,} texts skipped, {self.cut:,} cut")
        return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    """The first names, of which a line has room for a few."""
    return ", ".join(names[:SHOWN]) + (f", and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


class _Noted:
    """A corpus that notes which labels it has had."""

    def __init__(self, corpus: Any) -> None:
        self.corpus, self.labels = corpus, set[str]()

    def pairs(self, on_read: Callable[[int], object]) -> Iterator[Pair]:
        for pair in self.corpus.pairs(on_read):
            self.labels.add(pair.label)
            yield pair


@dataclass
class LabelPreparation(PairPreparation):
    """Tokenize labelled texts; a label becomes its place in `classes`, by default all labels, sorted."""

    classes: tuple[str, ...] = ()
    for_training: bool = True
    """whether each class must have an example"""

    scan_type = LabelScan
    key = ("labels",)

    def scan_key(self, corpus: Any) -> list[Any]:
        labels = [[source.label, source.whole] for source in corpus.sources]
        return [corpus.fields, corpus.encoding, labels]

    def scan(self, corpus: Any, on_read: Callable[[int], object]) -> LabelScan:
        noted: Any = _Noted(corpus)
        scan = super().scan(noted, on_read)
        return LabelScan(**vars(scan), labels=tuple(sorted(noted.labels)))

    def choose_tokenizers(self) -> tuple[Tokenizer, ...]:
        self.classes = self._checked_classes()
        chosen = self.tokenizer
        return ((self._fitted(chosen, 0) if isinstance(chosen, Chosen) else chosen).check_vocab_size(self.vocab_size),)

    def _checked_classes(self) -> tuple[str, ...]:
        scans: Any = self.scans
        classes = self.classes or scans[0].labels
        if len(classes) < 2:
            raise UserError(f"{self.corpus.name} has one class only, {classes[0]!r}: give texts of two or more classes")
        if len(classes) > MOST_CLASSES:
            raise UserError(
                f"{self.corpus.name} has {len(classes):,} labels, and at most {MOST_CLASSES:,} can be classes: "
                "name the field of labels with --label-field"
            )
        for corpus, scan in zip(self.corpora, scans, strict=True):
            if unknown := [label for label in scan.labels if label not in classes]:
                raise UserError(
                    f"{corpus.name} has the unknown label {unknown[0]!r}: the classes are {_some(classes)}; "
                    "correct it, or train on examples of it"
                )
        return classes

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def identity(self, division: str) -> list[Any]:
        return [*super().identity(division), self.classes]

    def _encode(self, pair: Pair) -> EncodedPair:
        """The text as ids, truncated to the context with `too_long` "cut", and the number of its class."""
        text, label = pair
        framing = self.tokenizers[0].label_framing
        tokens = self.tokenizers[0].encode_array(text)
        room = self.context_length - framing.length
        too_long = len(tokens) > room
        if self.too_long == "cut":
            tokens = tokens[: max(0, room)]
        framed = np.array(framing.around(tokens.tolist())[:-1], tokens.dtype)  # batches add the last token
        target = np.array([self._numbers[label]], tokens.dtype)
        return EncodedPair(place_of(pair), (framed, target), too_long, sum(len(side.encode()) for side in pair))

    def write(self, division: str, folder: Path) -> dict[str, Any]:
        return {**super().write(division, folder), "classes": list(self.classes)}

    @classmethod
    def load(cls, folder: Path, meta: dict[str, Any], tokenizers: Sequence[Tokenizer]) -> PreparedLabels:
        pairs = super().load(folder, meta, tokenizers)
        return PreparedLabels(**vars(pairs), class_names=tuple(meta["classes"]))

    def fault(self, prepared: Any) -> UserError | None:
        if (error := super().fault(prepared)) is not None:
            return error
        for name, count in zip(prepared.classes, prepared.class_counts, strict=True):
            if not count and self.for_training:
                return UserError(
                    f"class {name!r} has no example to train on in {self.corpus.name}: give more of it, or leave it out"
                )
        return None
