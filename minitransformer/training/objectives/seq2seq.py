"""Turning one text into another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from minitransformer.errors import UserError
from minitransformer.text.batches import IGNORE
from minitransformer.text.datasets.generated_pairs import generate_pairs, generates_pairs
from minitransformer.text.datasets.pairs import PairPreparation
from minitransformer.text.pair_batches import PairBatch, SequentialPairs
from minitransformer.text.pairs import PairCorpus, open_pairs
from minitransformer.text.token_files import Tokens
from minitransformer.text.tokenizers import Tokenizer
from minitransformer.training.objectives.base import Objective, Prepared, Score, refuse_other_files
from minitransformer.training.objectives.cross_entropy import score_tokens, summed_loss

if TYPE_CHECKING:
    from minitransformer.training.config import DataConfig, RunConfig


class Seq2Seq(Objective, name="seq2seq"):
    """−Σ log p(target token | target before it, source): teacher forcing.

    In training, targets are smoothed: 1 − ε of the probability for the true token, ε for all alike (Szegedy et al.
    2015, arXiv 1512.00567, section 7; Vaswani et al. 2017, section 5.4). Validation measures without smoothing.
    """

    topologies = frozenset({"encoder-decoder", "rnn"})
    fixed_shapes = False
    cuts_text = False

    @classmethod
    def prepare(cls, config: RunConfig, tokenizers: Sequence[Tokenizer] = ()) -> Prepared:
        data = config.data
        names = [data.data, *([] if data.validation_data is None else [data.validation_data])]
        if several := [name for name in names if isinstance(name, tuple)]:
            raise UserError(f"pairs come from one file, and there are {', '.join(several[0])}: join them into one")
        if generates_pairs(str(data.data)):
            return _generated(config, tokenizers)
        validation = None
        if data.validation_data is not None:
            validation = _opened(data, str(data.validation_data), data.validation_target_data)
        return PairPreparation(
            _opened(data, str(data.data), data.target_data),
            tokenizers[0] if tokenizers else data.tokenizer,
            target_tokenizer=tokenizers[1] if len(tokenizers) > 1 else None,
            separate=data.separate_vocabularies,
            vocab_size=config.model.vocab_size,
            validation=validation,
            validation_fraction=data.validation_fraction,
            context_length=config.model.context_length,
            too_long=data.too_long,
        ).run()

    @classmethod
    def tokens_per_step(cls, config: RunConfig) -> int:
        return 2 * config.training.batch_tokens * config.training.grad_accumulation

    def training_batches(self, step: int) -> list[PairBatch]:
        training = self.config.training
        batches = self.prepared.training_batches(training.batch_tokens, training.seed)
        accumulation = training.grad_accumulation
        return [batches.batch(step * accumulation + i) for i in range(accumulation)]

    def validation_batches(self) -> SequentialPairs:
        return self.prepared.validation_batches(self.config.training.batch_tokens)

    @property
    def validation_tokens(self) -> int:
        sources, targets = self.prepared.validation.sources, self.prepared.validation.targets
        return len(sources.tokens) + len(targets.tokens)

    @property
    def validation_targets(self) -> Tokens:
        return self.prepared.validation.targets.tokens

    @property
    def validation_bytes(self) -> int | None:
        return self.prepared.validation_bytes

    def score(self, model: nn.Module, batch: PairBatch) -> Score:
        return score_pairs(model, batch)

    def loss_sum(self, model: nn.Module, batch: PairBatch) -> Tensor:
        return pair_loss(model, batch, self.config.training.label_smoothing)

    def examples(self, count: int) -> list[list[int]]:
        batch = next(iter(self.validation_batches() if self.validates else self.training_batches(0)))
        rows = list(zip(batch.source, batch.source_is_token, strict=True))[:count]
        return [source[is_token].tolist() for source, is_token in rows]


def _generated(config: RunConfig, tokenizers: Sequence[Tokenizer]) -> Prepared:
    """Pairs that a recipe makes up without end; there is no text to fit a tokenizer to, but bytes need none."""
    name = str(config.data.data)
    refuse_other_files(config.data, ("target_data", "validation_data", "validation_target_data"))
    if not tokenizers and config.data.tokenizer != "bytes":
        raise UserError(f"{name} makes pairs up as bytes, not {config.data.tokenizer}: --tokenizer bytes")
    if config.data.separate_vocabularies:
        raise UserError(f"{name} has one vocabulary, bytes, for both sides: leave --separate-vocabularies out")
    return generate_pairs(name, tokenizers[0] if tokenizers else None, context_length=config.model.context_length)


def _opened(data: DataConfig, name: str, target_name: str | None) -> PairCorpus:
    return open_pairs(
        name,
        target_name,
        source_field=data.source_field,
        target_field=data.target_field,
        lowercase=data.lowercase,
    )


def pair_loss(model: Any, batch: PairBatch, label_smoothing: float) -> Tensor:
    """−Σ log p of the targets, smoothed, each predicted from the source and the true tokens before it."""
    readout = partial(summed_loss, targets=batch.targets, label_smoothing=label_smoothing)
    return model(batch.source, batch.inputs, source_is_token=batch.source_is_token, readout=readout)


def score_pairs(model: Any, batch: PairBatch) -> Score:
    """How well `model` predicts the targets, each from the source and the true tokens before it.

    An exact answer is what greedy decoding would write: as long as it is right, it sees the true tokens too.
    """
    readout = partial(score_tokens, targets=batch.targets)
    nats, right = model(batch.source, batch.inputs, source_is_token=batch.source_is_token, readout=readout)
    return Score(nats, right.sum(), (right | (batch.targets == IGNORE)).all(-1))
