"""Masked language modelling and next-sentence prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from torch import Tensor

from minitransformer.models.config import ModelConfig
from minitransformer.settings import setting
from minitransformer.text.batches import IGNORE, Batch, TrainingBatch
from minitransformer.text.datasets import PlainText, PreparedData
from minitransformer.text.tokenizers import MASK, Tokenizer
from minitransformer.training.objectives.base import BatchKey, Objective, Score, torch_seed
from minitransformer.training.objectives.cross_entropy import score_tokens, summed_loss

EXCERPT = 24
STREAM = 1
"""the objective's stream of random numbers"""


@dataclass(frozen=True)
class MaskedBatch(TrainingBatch):
    """Token ids with masks, the masked tokens as targets (IGNORE elsewhere), and segments if there are two.

    `follows` is 1 where the second segment follows the first in the text, and 0 where it comes from elsewhere;
    `is_token` is False at padding (None: there is none).
    """

    inputs: Int64[Tensor, "batch length"]
    targets: Int64[Tensor, "batch length"]
    segments: Int64[Tensor, "batch length"] | None = None
    follows: Int64[Tensor, "batch"] | None = None
    is_token: Bool[Tensor, "batch length"] | None = None

    @property
    def item_tokens(self) -> Tensor:
        return super().item_tokens if self.is_token is None else self.is_token.sum(1)

    def without_targets(self) -> Self:
        emptied = super().without_targets()
        return emptied if self.follows is None else replace(emptied, follows=torch.full_like(self.follows, IGNORE))


def mask_tokens(
    tokens: Int64[Tensor, "batch length"],
    *,
    mask: int,
    vocab_size: int,
    probability: float,
    generator: torch.Generator,
    keep: int = 0,
) -> tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]:
    """Inputs with tokens chosen with `probability`, and the chosen tokens as targets.

    Of those, 80 % become `mask`, 10 % a random token below `vocab_size`, and 10 % stay. The first `keep` tokens of each
    row are never chosen. Devlin et al. 2018 (arXiv 1810.04805), section 3.1.
    """
    chance = torch.rand(tokens.shape, generator=generator)
    chosen = chance < probability
    chosen[:, :keep] = False
    how = torch.rand(tokens.shape, generator=generator)
    random_tokens = torch.randint(vocab_size, tokens.shape, generator=generator)
    inputs = torch.where(chosen & (how < 0.8), mask, tokens)
    inputs = torch.where(chosen & (how >= 0.9), random_tokens, inputs)
    return inputs, torch.where(chosen, tokens, IGNORE)


class Masked(Objective, name="masked"):
    """−Σ log p(masked token | unmasked tokens), with fresh masks in every epoch.

    Devlin et al. 2018 (BERT, arXiv 1810.04805), section 3.1; fresh masks: Liu et al. 2019 (RoBERTa, arXiv 1907.11692),
    section 4.1. Every window is framed by the tokenizer, by default by a first end-of-text token, from which classes
    are predicted. A model with `next_sentence` also learns whether the second half of a window follows the first: half
    of them are replaced.
    """

    @dataclass(frozen=True)
    class Settings:
        probability: float = setting(
            0.15,
            flag="mask_probability",
            above=0,
            below=1,
            changes_task=True,
            help="fraction of the tokens that are masked",
        )

    settings: Settings
    topologies = frozenset({"encoder"})
    dataset = PlainText
    batch_type = MaskedBatch
    special_tokens = (MASK,)
    fixed_shapes = False  # the number of masked tokens varies
    predicts_text = False
    has_baseline = True

    def __init__(self, settings: Settings, tokenizer: Tokenizer, model: ModelConfig, sequence_length: int) -> None:
        super().__init__(settings, tokenizer, model, sequence_length)
        self.mask, self.framing = tokenizer.mask, tokenizer.masked_framing

    @property
    def window(self) -> int:
        return self.sequence_length - self.framing.length

    def make_batch(self, batch: Batch, data: PreparedData, key: BatchKey) -> MaskedBatch:
        # Validation always masks the same tokens, so that results are comparable.
        generator = torch.Generator().manual_seed(torch_seed(key.numbers(STREAM)))
        masked = self._masked(batch.inputs, data.targets(key.split), generator)
        padding = F.pad(batch.targets == IGNORE, (len(self.framing.prefix), len(self.framing.suffix)))
        if padding.any():
            masked = replace(masked, targets=masked.targets.masked_fill(padding, IGNORE), is_token=~padding)
        return masked

    def _masked(self, windows: Tensor, tokens: Any, generator: torch.Generator) -> MaskedBatch:
        follows = segments = None
        if self.model.next_sentence:
            windows, segments, follows = self._pairs(windows, tokens, generator)
        before, after = (
            windows.new_tensor(ids).expand(len(windows), -1) for ids in (self.framing.prefix, self.framing.suffix)
        )
        inputs, targets = mask_tokens(
            torch.cat([before, windows], dim=1),
            mask=self.mask,
            vocab_size=self.tokenizer.vocab_size,
            probability=self.settings.probability,
            generator=generator,
            keep=before.size(1),
        )
        targets = F.pad(targets, (0, after.size(1)), value=IGNORE)
        return MaskedBatch(torch.cat([inputs, after], dim=1), targets, segments, follows)

    def _pairs(self, windows: Tensor, tokens: Any, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Windows, half of them with a second half from elsewhere; their segments, and which are intact."""
        rows, half = len(windows), windows.size(1) // 2
        follows = torch.randint(2, (rows,), generator=generator)
        rest = windows.size(1) - half
        starts = torch.randint(len(tokens) - rest, (rows,), generator=generator).numpy()
        elsewhere = torch.from_numpy(tokens[starts[:, None] + np.arange(rest)].astype(np.int64))
        second = torch.where(follows[:, None] == 1, windows[:, half:], elsewhere)
        segments = torch.zeros(rows, windows.size(1) + self.framing.length, dtype=torch.long)
        segments[:, len(self.framing.prefix) + half :] = 1
        return torch.cat([windows[:, :half], second], dim=1), segments, follows

    def score(self, model: Any, batch: MaskedBatch) -> Score:
        output = self._output(model, batch, score_tokens)
        nats, right = output if batch.follows is None else output.tokens
        places = batch.targets != IGNORE
        of_targets = nats.new_zeros(places.shape).masked_scatter(places, nats)
        return Score(of_targets, torch.zeros_like(places).masked_scatter(places, right))

    def loss_sum(self, model: Any, batch: MaskedBatch) -> Tensor:
        output = self._output(model, batch, summed_loss)
        if batch.follows is None:
            return output
        loss, follows = output
        # The sum of the mean losses of both heads, as in BERT.
        weight = self.settings.probability * self.window
        return loss + weight * F.cross_entropy(follows, batch.follows, reduction="sum")

    def _output(self, model: Any, batch: MaskedBatch, measure: Callable[..., Any]) -> Any:
        """The result of `measure` on the masked tokens; with `next_sentence`, as the first of a pair."""
        places = batch.targets != IGNORE
        readout = partial(measure, targets=batch.targets[places])
        return model(batch.inputs, is_token=batch.is_token, segments=batch.segments, places=places, readout=readout)

    def examples(self, data: PreparedData, batch: MaskedBatch, count: int) -> list[list[int]]:
        """Excerpts from all over the validation text (else of training), each with two masks."""
        tokens = data.targets("validation" if data.num_tokens("validation") else "train")
        length = min(EXCERPT, self.window, len(tokens))
        starts = np.linspace(0, len(tokens) - length, count, dtype=np.int64)
        excerpts = tokens[starts[:, None] + np.arange(length)].astype(np.int64)
        excerpts[:, [length // 3, 2 * length // 3]] = self.mask
        return [self.framing.around(excerpt) for excerpt in excerpts.tolist()]
