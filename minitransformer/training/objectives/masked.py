"""Filling in masked tokens, and telling whether one sentence follows another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int64
from torch import Tensor

from minitransformer.text.batches import IGNORE, Batch, SequentialWindows, ShuffledWindows
from minitransformer.text.datasets.text import PreparedText
from minitransformer.text.tokenizers import MASK, Tokenizer
from minitransformer.training.objectives.base import MadeBatches, Objective, Score
from minitransformer.training.objectives.causal import prepare_text
from minitransformer.training.objectives.cross_entropy import score_tokens, summed_loss

if TYPE_CHECKING:
    from minitransformer.training.config import RunConfig


EXCERPT = 24
TRAINING, VALIDATION = 1, 3
"""for the seeds, which should not be those of one another's batches, nor of other objectives"""


@dataclass(frozen=True)
class MaskedBatch:
    """Token ids some of which are hidden, the hidden ones as targets (IGNORE elsewhere), segments if there are two.

    `follows` is 1 where the second segment follows the first in the text, and 0 where it comes from elsewhere;
    `is_token` is False at padding (None: there is none).
    """

    inputs: Int64[Tensor, "batch length"]
    targets: Int64[Tensor, "batch length"]
    segments: Int64[Tensor, "batch length"] | None = None
    follows: Int64[Tensor, "batch"] | None = None
    is_token: Bool[Tensor, "batch length"] | None = None

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORE).sum())

    @property
    def num_tokens(self) -> int:
        return self.inputs.numel() if self.is_token is None else int(self.is_token.sum())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def split(self, size: int) -> list[Self]:
        """Micro-batches of `size` sequences."""
        return [self._each(lambda tensor, i=i: tensor[i : i + size]) for i in range(0, len(self.inputs), size)]

    def _each(self, change: Any) -> Self:
        tensors = (self.inputs, self.targets, self.segments, self.follows, self.is_token)
        changed: list[Any] = [None if tensor is None else change(tensor) for tensor in tensors]
        return type(self)(*changed)


def hide(
    tokens: Int64[Tensor, "batch length"],
    *,
    mask: int,
    vocab_size: int,
    probability: float,
    generator: torch.Generator,
    keep: int = 0,
) -> tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]:
    """Inputs with a share `probability` of the tokens chosen, and those as targets.

    Of the chosen, 80 % become `mask`, 10 % any token below `vocab_size`, and 10 % stay. The first `keep` tokens of each
    row are never chosen. Devlin et al. 2018 (arXiv 1810.04805), section 3.1.
    """
    chance = torch.rand(tokens.shape, generator=generator)
    chosen = chance < probability
    chosen[:, :keep] = False
    how = torch.rand(tokens.shape, generator=generator)
    strangers = torch.randint(vocab_size, tokens.shape, generator=generator)
    inputs = torch.where(chosen & (how < 0.8), mask, tokens)
    inputs = torch.where(chosen & (how >= 0.9), strangers, inputs)
    return inputs, torch.where(chosen, tokens, IGNORE)


class Masked(Objective, name="masked"):
    """−Σ log p(hidden token | all that is not hidden), with other tokens hidden each time a text is seen.

    Devlin et al. 2018 (BERT, arXiv 1810.04805), section 3.1; fresh masks: Liu et al. 2019 (RoBERTa, arXiv 1907.11692),
    section 4.1. Around every window stands what the tokenizer says, by default the end-of-text token before it, from
    which classes are told. A model with `next_sentence` also learns whether the second half of a window follows the
    first: half of them do not.
    """

    topologies = frozenset({"encoder"})
    special_tokens = (MASK,)
    fixed_shapes = False  # the head reads as many tokens as happen to be hidden
    prepared: PreparedText

    def __init__(self, prepared: PreparedText, config: RunConfig) -> None:
        super().__init__(prepared, config)
        self.mask, self.framing = prepared.tokenizer.mask, prepared.tokenizer.masked_framing
        self.length = config.sequence_length - self.framing.length

    @classmethod
    def prepare(cls, config: RunConfig, tokenizers: Sequence[Tokenizer] = ()) -> PreparedText:
        return prepare_text(config, tokenizers, cls.special_tokens)

    def training_batches(self, step: int) -> list[MaskedBatch]:
        training = self.config.training
        rows = training.batch_size * training.grad_accumulation
        windows = ShuffledWindows(self.prepared.train, self.length, rows, training.seed).batch(step).inputs
        generator = torch.Generator().manual_seed(_seed(training.seed, step, TRAINING))
        return self._hidden(windows, self.prepared.train, generator).split(training.batch_size)

    def validation_batches(self) -> MadeBatches:
        windows = SequentialWindows(self.prepared.validation, self.length, self.config.training.batch_size)
        return MadeBatches(len(windows), lambda index: self._validation_batch(windows.batch(index), index))

    def _validation_batch(self, batch: Batch, index: int) -> MaskedBatch:
        # The same tokens are hidden every time, so that validations can be compared.
        generator = torch.Generator().manual_seed(_seed(self.config.training.seed, index, VALIDATION))
        hidden = self._hidden(batch.inputs, self.prepared.validation, generator)
        padding = F.pad(batch.targets == IGNORE, (len(self.framing.before), len(self.framing.after)))
        if padding.any():
            hidden = replace(hidden, targets=hidden.targets.masked_fill(padding, IGNORE), is_token=~padding)
        return hidden

    def _hidden(self, windows: Tensor, tokens: Any, generator: torch.Generator) -> MaskedBatch:
        follows = segments = None
        if self.config.model.next_sentence:
            windows, segments, follows = self._pairs(windows, tokens, generator)
        before, after = (
            windows.new_tensor(ids).expand(len(windows), -1) for ids in (self.framing.before, self.framing.after)
        )
        inputs, targets = hide(
            torch.cat([before, windows], dim=1),
            mask=self.mask,
            vocab_size=self.prepared.tokenizer.vocab_size,
            probability=self.config.training.mask_probability,
            generator=generator,
            keep=before.size(1),
        )
        targets = F.pad(targets, (0, after.size(1)), value=IGNORE)
        return MaskedBatch(torch.cat([inputs, after], dim=1), targets, segments, follows)

    def _pairs(self, windows: Tensor, tokens: Any, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Windows whose second half is, in half of them, from another place; their segments, and which are whole."""
        rows, half = len(windows), windows.size(1) // 2
        follows = torch.randint(2, (rows,), generator=generator)
        rest = windows.size(1) - half
        starts = torch.randint(len(tokens) - rest, (rows,), generator=generator).numpy()
        elsewhere = torch.from_numpy(np.asarray(tokens)[starts[:, None] + np.arange(rest)].astype(np.int64))
        second = torch.where(follows[:, None] == 1, windows[:, half:], elsewhere)
        segments = torch.zeros(rows, windows.size(1) + self.framing.length, dtype=torch.long)
        segments[:, len(self.framing.before) + half :] = 1
        return torch.cat([windows[:, :half], second], dim=1), segments, follows

    @cached_property
    def blind_accuracy(self) -> float:
        """Of always guessing the token that is the most frequent one in training."""
        most_frequent = np.bincount(np.asarray(self.prepared.train)).argmax()
        return float((np.asarray(self.prepared.validation) == most_frequent).mean())

    def score(self, model: Any, batch: MaskedBatch) -> Score:
        output = self._output(model, batch, score_tokens)
        nats, right = output if batch.follows is None else output.tokens
        return Score(nats, right.sum())

    def loss_sum(self, model: Any, batch: MaskedBatch) -> Tensor:
        output = self._output(model, batch, summed_loss)
        if batch.follows is None:
            return output
        loss, follows = output
        # A window counts as much as its hidden tokens together: the sum of two means, as in BERT.
        weight = self.config.training.mask_probability * self.length
        return loss + weight * F.cross_entropy(follows, batch.follows, reduction="sum")

    def _output(self, model: Any, batch: MaskedBatch, measure: Callable[..., Any]) -> Any:
        """What `measure` makes of the hidden tokens; of a model with `next_sentence`, as the first of a pair."""
        places = batch.targets != IGNORE
        readout = partial(measure, targets=batch.targets[places])
        return model(batch.inputs, is_token=batch.is_token, segments=batch.segments, places=places, readout=readout)

    def examples(self, count: int) -> list[list[int]]:
        """Excerpts from all over the validation text (else of training), each with two masks."""
        tokens = np.asarray(self.prepared.validation if self.validates else self.prepared.train)
        length = min(EXCERPT, self.length, len(tokens))
        starts = np.linspace(0, len(tokens) - length, count, dtype=np.int64)
        excerpts = tokens[starts[:, None] + np.arange(length)].astype(np.int64)
        excerpts[:, [length // 3, 2 * length // 3]] = self.mask
        return [self.framing.around(excerpt) for excerpt in excerpts.tolist()]


def _seed(seed: int, index: int, what: int) -> int:
    return int(np.random.SeedSequence([seed, index, what]).generate_state(1, np.uint64)[0] >> 1)
