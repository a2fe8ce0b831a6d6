"""What `memorisation measure` measures and prints, each part with its record as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from minitransformer.commands import table_width
from minitransformer.errors import UserError
from minitransformer.evaluation.memorisation import overlap_record
from minitransformer.models.decoder import DecoderLM
from minitransformer.reporting.tables import Table
from minitransformer.runs.memorising import (
    CanaryResult,
    CanaryScorer,
    LearnedText,
    TokenTexts,
    draw_texts,
    extract,
    write_texts,
)
from minitransformer.text.canaries import Canary
from minitransformer.text.spans import RunCounts, count_spans, covered_share, longest_runs
from minitransformer.text.tokenizers import Tokenizer

USUAL_LENGTH, USUAL_SAMPLE = 50, 256
"""tokens of a text that counts as memorised, as in the papers, and of a sample"""
RUN_LENGTHS = (8, 16, 32, 50, 100, 200)
"""tokens of the runs that are looked for"""
SHOWN = 3
"""examples that are printed"""


@dataclass(frozen=True)
class MeasuredPart:
    """A part of the results: as JSON, as a table, and lines below it."""

    record: dict[str, Any]
    table: Table
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MemorisationMeasures:
    """A model and the text that it has learned; `seed` decides what is drawn."""

    model: DecoderLM
    tokenizer: Tokenizer
    learned: LearnedText
    seed: int

    @property
    def readable(self) -> int:
        """Tokens that the model reads."""
        return self.model.config.text_length

    def extraction(self, count: int, prefix: int | None, length: int | None) -> MeasuredPart:
        """How often greedy decoding continues a prefix of a text by `length` tokens verbatim."""
        usual = min(USUAL_LENGTH, self.readable // 2)
        prefix, length = prefix or usual, length or usual
        if (total := prefix + length) > self.readable:
            raise UserError(
                f"a prefix of {prefix} tokens and {length} more are {total}, and the model reads {self.readable}: "
                "choose a smaller --prefix-length or --length"
            )
        texts = draw_texts(self.learned.training, total, count, self.seed)
        if not len(texts):
            raise UserError(f"the training text has fewer than {total} tokens: choose a smaller --length")
        training = extract(self.model, texts, prefix)
        times = count_spans(texts.tolist(), self.learned.training)
        held_out = draw_texts(self.learned.validation, total, count, self.seed)
        found = {"training": training}
        found |= {f"training, {name}": some for name, some in training.by_repetitions(times)}
        if len(held_out):
            found["validation"] = extract(self.model, held_out, prefix)
        record = {name: each.to_json() for name, each in found.items()}
        title = f"Texts that greedy decoding continues verbatim by {length} tokens, after a prefix of {prefix}"
        columns = ["text", "texts", "continued", "95% interval", "mean length"]
        table = Table(title, columns, [_extraction_row(name, each) for name, each in record.items()])
        return MeasuredPart({"extraction": {"prefix": prefix, "length": length, **record}}, table)

    def overlap(self, count: int, length: int | None, temperature: float) -> MeasuredPart:
        """How much of texts that the model writes unprompted, and of validation text, stands in the training text."""
        length = length or min(USUAL_SAMPLE, self.readable - len(self.tokenizer.separator))
        parts = write_texts(self.model, self.tokenizer, count, length, self.seed, temperature)
        written = np.concatenate(list(tqdm(parts, desc="writing", unit="", leave=False, disable=None)))
        held_out = draw_texts(self.learned.validation, length, count, self.seed)
        lengths = [n for n in RUN_LENGTHS if n <= length] or [length]
        runs = longest_runs(np.concatenate([written, held_out]), self.learned.training, lengths[0])
        record: dict[str, Any] = {"samples": count, "length": length, "temperature": temperature}
        for name, rows in (("written", runs[:count]), ("validation", runs[count:])):
            if len(rows):
                record[name] = {
                    "in_runs": overlap_record({n: covered_share(rows, n) for n in lengths}),
                    "longest": int(rows.max()),
                }
        record["examples"] = list(self._examples(written, runs[:count]))
        names = [name for name in ("written", "validation") if name in record]
        cells = [[n, *(_share(record[name]["in_runs"][str(n)]) for name in names)] for n in lengths]
        title = f"Share of the tokens of {count} texts that are in runs which stand in the training text"
        table = Table(title, ["tokens of a run", *names], cells)
        longest = ", ".join(f"{record[name]['longest']} tokens {name}" for name in names)
        notes = ["", f"longest    {longest}", *(_example(each["tokens"], each["text"]) for each in record["examples"])]
        return MeasuredPart({"overlap": record}, table, notes)

    def _examples(self, written: TokenTexts, runs: RunCounts) -> Iterator[dict[str, Any]]:
        """The longest runs, at most one of each text."""
        for row in np.argsort(-runs.max(1), kind="stable")[:SHOWN]:
            begin = int(runs[row].argmax())
            if length := int(runs[row, begin]):
                yield {"tokens": length, "text": self.tokenizer.decode(written[row, begin : begin + length].tolist())}

    def exposure(self, canaries: Sequence[Canary], others: int) -> MeasuredPart:
        """How exposed planted secrets are, by how often they stand in the training text."""
        scorer = CanaryScorer(self.model, self.tokenizer, others, self.seed)
        results = scorer.results(canaries, self.learned.training)
        found = list(tqdm(results, total=len(canaries), desc="secrets", unit="", leave=False, disable=None))
        columns = ["in training", "secrets", "written", "exposure by rank", "by fit"]
        times = sorted({each.in_training for each in found})
        rows = [_canary_row(count, [each for each in found if each.in_training == count]) for count in times]
        most = max(each.exposure.others for each in found) + 1
        notes = [
            "",
            f"exposure   median bits, by rank at most {math.log2(most):.1f}; a secret that was never seen",
            "           has e bits or more with probability 2^-e",
            *_lost(found),
        ]
        record = {"canaries": [each.to_json() for each in found]}
        return MeasuredPart(record, Table("Secrets, compared with others of their form", columns, rows), notes)


def _share(of: dict[str, Any]) -> str:
    low, high = of["interval"]
    return f"{of['share']:.1%} [{low:.1%}, {high:.1%}]"


def _extraction_row(name: str, of: dict[str, Any]) -> list[Any]:
    low, high = of["interval"]
    shares = [f"{of['share']:.1%}", f"{low:.1%} to {high:.1%}", f"{of['mean_verbatim_tokens']:.1f}"]
    return [name, of["texts"], *shares]


def _example(tokens: int, text: str) -> str:
    line = f"           {tokens}: {json.dumps(text, ensure_ascii=False)}"
    return line if len(line) <= table_width() else f"{line[: table_width() - 1]}…"


def _canary_row(times: int, found: Sequence[CanaryResult]) -> list[Any]:
    bits = [each.exposure.bits for each in found]
    fitted = [each.exposure.fitted for each in found if each.exposure.fitted is not None]
    by_rank = f"{median(bits):.1f} [{min(bits):.1f}, {max(bits):.1f}]"
    written = f"{sum(each.is_written for each in found)} of {len(found)}"
    return [times, len(found), written, by_rank, f"{median(fitted):.1f}" if fitted else None]


def _lost(found: Sequence[CanaryResult]) -> list[str]:
    """A warning if secrets do not stand in the training text as often as they were planted."""
    lost = sum(each.canary.times not in (None, each.in_training) for each in found)
    if not lost:
        return []
    return [
        f"warning    {lost} of {len(found)} secrets do not stand in the training text as often as planted: they may",
        "           be held out for validation, or not among its data",
    ]
