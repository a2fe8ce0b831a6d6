"""Span corruption (T5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.settings import setting
from minitransformer.text.batches import Batch
from minitransformer.text.datasets import PlainText, PreparedData
from minitransformer.text.pair_batches import PairBatch
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.objectives.base import BatchKey, Objective, Score
from minitransformer.training.objectives.seq2seq import SmoothedLoss, pair_loss, score_pairs

STREAM = 2
"""the objective's stream of random numbers"""
SENTINELS = tuple(f"<|extra_{i}|>" for i in range(100))


def random_composition(total: int, parts: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """A uniformly random composition of `total` into `parts` positive integers."""
    cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def random_spans(
    length: int, density: float, mean_span: float, generator: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Mask of the corrupted among `length` tokens: a fraction `density`, in spans of mean length `mean_span`.

    Raffel et al. 2019 (T5, arXiv 1910.10683), section 3.1.4. The first token is never corrupted.
    """
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise)
    kept, cut = (random_composition(total, spans, generator) for total in (length - noise, noise))
    return np.repeat(np.tile([False, True], spans), np.stack([kept, cut], 1).flatten())


class SpanCorruption(Objective, name="span-corruption"):
    """−Σ log p(corrupted spans | remaining text): a sentinel replaces each span, and precedes it in the target.

    "Thank you <X> me to your party <Y> week." → "<X> for inviting <Y> last <end>". Raffel et al. 2019 (T5, arXiv
    1910.10683), section 3.1.4, by default 15 % in spans of 3 tokens, as there; fresh spans in every epoch.
    """

    @dataclass(frozen=True)
    class Settings(SmoothedLoss):
        density: float = setting(
            0.15,
            flag="span_density",
            above=0,
            below=1,
            changes_task=True,
            help="fraction of the tokens that are corrupted",
        )
        mean_length: float = setting(
            3.0, flag="mean_span", at_least=1, changes_task=True, help="mean span length, in tokens"
        )

    settings: Settings
    topologies = frozenset({"encoder-decoder", "rnn"})
    dataset = PlainText
    batch_type = PairBatch
    special_tokens = SENTINELS
    predicts_text = False
    whole_windows = True

    def __init__(self, settings: Settings, tokenizer: Tokenizer, model: ModelConfig, sequence_length: int) -> None:
        super().__init__(settings, tokenizer, model, sequence_length)
        self.framing, self.start = tokenizer.pair_framing, tokenizer.target_start
        spans = self.window * settings.density / settings.mean_length
        if spans > len(SENTINELS):
            name = "context_length" if sequence_length == model.context_length else "sequence_length"
            raise UserError(
                f"{name} {sequence_length} gives {spans:.0f} corrupted spans, and there are only "
                f"{len(SENTINELS)} sentinels: lower it, or raise mean_span"
            )
        self.sentinels = np.array([tokenizer.special_tokens[name] for name in SENTINELS])

    @property
    def window(self) -> int:
        # The corrupted text is shorter than the window; framing tokens count too.
        return self.sequence_length - self.framing.length

    def make_batch(self, batch: Batch, data: PreparedData, key: BatchKey) -> PairBatch:
        # Validation always corrupts the same spans, so that results are comparable.
        generator = np.random.default_rng(key.numbers(STREAM))
        sources, targets = [], []
        for window in batch.inputs.numpy():
            cut = random_spans(len(window), self.settings.density, self.settings.mean_length, generator)
            sources.append(self.framing.around(self._with_sentinels(window, cut).tolist()))
            targets.append(self.framing.around(self._with_sentinels(window, ~cut).tolist()))
        # Every window has the same number of corrupted tokens and spans, so there is no padding.
        source, target = torch.tensor(sources), torch.tensor(targets)
        inputs = torch.cat([target.new_full((len(target), 1), self.start), target[:, :-1]], dim=1)
        return PairBatch(source, torch.ones_like(source, dtype=torch.bool), inputs, target)

    def _with_sentinels(self, window: npt.NDArray[np.int64], cut: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """`window` with each span of `cut` tokens replaced by the next sentinel."""
        begins = cut & ~np.concatenate([[False], cut[:-1]])
        replaced = np.where(begins, self.sentinels[begins.cumsum() - 1], window)
        return replaced[~cut | begins]

    def score(self, model: nn.Module, batch: PairBatch) -> Score:
        return score_pairs(model, batch)

    def loss_sum(self, model: nn.Module, batch: PairBatch) -> Tensor:
        return pair_loss(model, batch, self.settings.label_smoothing)

    def examples(self, data: PreparedData, batch: PairBatch, count: int) -> list[list[int]]:
        sources: list[list[int]] = batch.source[:count].tolist()
        return sources
