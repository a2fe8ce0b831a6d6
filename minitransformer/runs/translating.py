"""The translations that a run's model makes of the sources of pairs."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.samples import translations
from minitransformer.models.encoder_decoder import Seq2SeqLM
from minitransformer.runs.evaluating import HeldOutData


def translate_all(data: HeldOutData, model: Seq2SeqLM, sampling: SamplingConfig) -> list[str]:
    """Every source of `data`, in order, translated by beam search, or greedily with one beam."""
    device, batches = next(model.parameters()).device, data.loader.validation_batches()
    made: dict[int, str] = {}
    for index in tqdm(range(len(batches)), desc="translations", unit="", leave=False, disable=None):
        rows: Any = batches.batch(index).to(device)
        sources = [row[kept].tolist() for row, kept in zip(rows.source, rows.source_is_token, strict=True)]
        found = translations(model, sources, sampling, data.prepared.target_tokenizer)
        for number, [best, *_] in zip(batches.items(index).tolist(), found, strict=True):
            made[number] = data.prepared.target_tokenizer.decode(best)
    return [made[number] for number in range(len(made))]
