"""Restoring spans that were cut out of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from minitransformer.errors import UserError
from minitransformer.text.batches import Batch, SequentialWindows, ShuffledWindows
from minitransformer.text.datasets.text import PreparedText
from minitransformer.text.pair_batches import PairBatch
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.objectives.base import MadeBatches, Objective, Score
from minitransformer.training.objectives.causal import prepare_text
from minitransformer.training.objectives.seq2seq import pair_loss, score_pairs

if TYPE_CHECKING:
    from minitransformer.training.config import RunConfig

SENTINELS = tuple(f"<|extra_{i}|>" for i in range(100))


def random_composition(total: int, parts: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """`parts` whole numbers of at least 1 that sum to `total`, each way of doing so as likely as any other."""
    cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def random_spans(
    length: int, density: float, mean_span: float, generator: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Which of `length` tokens are cut out: a share `density`, in spans of `mean_span` tokens on average.

    Raffel et al. 2019 (T5, arXiv 1910.10683), section 3.1.4. The first token always stays.
    """
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise)
    kept, cut = (random_composition(total, spans, generator) for total in (length - noise, noise))
    return np.repeat(np.tile([False, True], spans), np.stack([kept, cut], 1).flatten())


class SpanCorruption(Objective, name="span-corruption"):
    """−Σ log p(what was cut out | what is left): a sentinel replaces each span, and stands before it in the target.

    "Thank you <X> me to your party <Y> week." → "<X> for inviting <Y> last <end>". Raffel et al. 2019 (T5, arXiv
    1910.10683), section 3.1.4, with its 15 % in spans of 3 tokens by default; other spans each time a text is seen.
    """

    topologies = frozenset({"encoder-decoder", "rnn"})
    special_tokens = SENTINELS
    prepared: PreparedText

    def __init__(self, prepared: PreparedText, config: RunConfig) -> None:
        super().__init__(prepared, config)
        self.framing, self.start = prepared.tokenizer.pair_framing, prepared.tokenizer.target_start
        # What is left is shorter than the window; what stands around it takes its places too.
        self.length = config.sequence_length - self.framing.length
        spans = self.length * config.training.span_density / config.training.mean_span
        if spans > len(SENTINELS):
            name = "context_length" if config.training.sequence_length is None else "sequence_length"
            raise UserError(
                f"{name} {config.sequence_length} has {spans:.0f} spans to cut out, and there are "
                f"{len(SENTINELS)} sentinels: lower it, or raise mean_span"
            )
        self.sentinels = np.array([prepared.tokenizer.special_tokens[name] for name in SENTINELS])

    @classmethod
    def prepare(cls, config: RunConfig, tokenizers: Sequence[Tokenizer] = ()) -> PreparedText:
        return prepare_text(config, tokenizers, cls.special_tokens)

    def training_batches(self, step: int) -> list[PairBatch]:
        training = self.config.training
        rows = training.batch_size * training.grad_accumulation
        windows = ShuffledWindows(self.prepared.train, self.length, rows, training.seed).batch(step).inputs.numpy()
        generator = np.random.default_rng([training.seed, step, 2])
        size = training.batch_size
        return [self._corrupted(windows[i : i + size], generator) for i in range(0, rows, size)]

    def validation_batches(self) -> MadeBatches:
        tokens = self.prepared.validation
        whole = max(1, (len(tokens) - 1) // self.length) * self.length  # not the last window where that is shorter
        windows = SequentialWindows(tokens[: whole + 1], self.length, self.config.training.batch_size)
        return MadeBatches(len(windows), lambda index: self._validation_batch(windows.batch(index), index))

    def _validation_batch(self, batch: Batch, index: int) -> PairBatch:
        # The same spans are cut every time, so that validations can be compared.
        return self._corrupted(batch.inputs.numpy(), np.random.default_rng([self.config.training.seed, index, 4]))

    def _corrupted(self, windows: npt.NDArray[np.int64], generator: np.random.Generator) -> PairBatch:
        training = self.config.training
        sources, targets = [], []
        for window in windows:
            cut = random_spans(len(window), training.span_density, training.mean_span, generator)
            sources.append(self.framing.around(self._with_sentinels(window, cut).tolist()))
            targets.append(self.framing.around(self._with_sentinels(window, ~cut).tolist()))
        # Every window loses the same number of tokens in the same number of spans, so there is no padding.
        source, target = torch.tensor(sources), torch.tensor(targets)
        inputs = torch.cat([target.new_full((len(target), 1), self.start), target[:, :-1]], dim=1)
        return PairBatch(source, torch.ones_like(source, dtype=torch.bool), inputs, target)

    def _with_sentinels(self, window: npt.NDArray[np.int64], cut: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        """`window` with each run of `cut` tokens replaced by the next sentinel."""
        begins = cut & ~np.concatenate([[False], cut[:-1]])
        replaced = np.where(begins, self.sentinels[begins.cumsum() - 1], window)
        return replaced[~cut | begins]

    def score(self, model: nn.Module, batch: PairBatch) -> Score:
        return score_pairs(model, batch)

    def loss_sum(self, model: nn.Module, batch: PairBatch) -> Tensor:
        return pair_loss(model, batch, self.config.training.label_smoothing)

    def examples(self, count: int) -> list[list[int]]:
        batches = self.validation_batches() if self.validates else self.training_batches(0)
        sources = next(iter(batches)).source[:count]
        return sources.tolist()
