"""The translations of a run's model, beside the references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.samples import translations
from minitransformer.models.encoder_decoder import Seq2SeqLM
from minitransformer.runs.evaluating import HeldOutData
from minitransformer.text.batches import IGNORE
from minitransformer.text.datasets.pair_data import PairData
from minitransformer.training.loader import Loader


class Translated(NamedTuple):
    """A source, what the model makes of it, and its target."""

    source: str
    translation: str
    reference: str


def has_references(data: HeldOutData) -> bool:
    """Whether `data` are pairs, whose targets a model may be asked for."""
    return isinstance(data.prepared, PairData)


def translate_all(data: HeldOutData, model: Seq2SeqLM, sampling: SamplingConfig) -> Iterator[Translated]:
    """Every source of `data`, translated by beam search, or greedily with one beam."""
    prepared: Any = data.prepared
    source_tokenizer, tokenizer = prepared.tokenizer, prepared.target_tokenizer
    device = next(model.parameters()).device
    for batch in Loader.of_run(data.run.config, prepared, data.split).validation_batches():
        rows: Any = batch.to(device)
        sources = [row[kept].tolist() for row, kept in zip(rows.source, rows.source_is_token, strict=True)]
        targets = [row[row != IGNORE].tolist() for row in rows.targets]
        found = translations(model, sources, sampling, tokenizer)
        for source, [best, *_], target in zip(sources, found, targets, strict=True):
            yield Translated(source_tokenizer.decode(source), tokenizer.decode(best), tokenizer.decode(target))
