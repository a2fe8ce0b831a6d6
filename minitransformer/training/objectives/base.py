"""The interface of objectives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from minitransformer.errors import UserError
from minitransformer.registry import Registered
from minitransformer.text.token_files import Tokens
from minitransformer.text.tokenizers import Tokenizer

if TYPE_CHECKING:
    from minitransformer.training.config import DataConfig, RunConfig


class TrainingBatch(Protocol):
    """What the loop must know of a batch, whatever is in it."""

    @property
    def num_targets(self) -> int:
        """How many predictions count in the loss."""
        ...

    @property
    def num_tokens(self) -> int:
        """How many tokens the model reads."""
        ...

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self: ...


class Batches(Protocol):
    """Batches by number, each the same whenever it is asked for."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...

    def batch(self, index: int) -> Any: ...


@dataclass(frozen=True)
class MadeBatches:
    """`count` batches, of which `batch` makes any by its number."""

    count: int
    batch: Callable[[int], Any]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return map(self.batch, range(self.count))


class Prepared(Protocol):
    """Data as token ids, in a folder of its own that is named after its content."""

    @property
    def folder(self) -> Path: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def target_tokenizer(self) -> Tokenizer:
        """Of what the model writes; for most data, `tokenizer`."""
        ...

    def summary(self) -> str:
        """Lines for the terminal."""
        ...


@dataclass(frozen=True)
class Score:
    """The loss of a batch in nats, summed over its targets; if it is asked, how many of them were guessed.

    For whole answers, `exact` says of each text [texts] whether all of it was guessed.
    """

    nats: Tensor
    correct: Tensor | None = None
    exact: Tensor | None = None


class Objective(Registered, kind="objective"):
    """Batches of prepared data, and the loss of a model on them, for runs of some topologies."""

    topologies: ClassVar[frozenset[str]]
    special_tokens: ClassVar[Sequence[str]] = ()
    """tokens that the vocabulary has beside those of the text"""
    fixed_shapes: ClassVar[bool] = True
    """whether all training batches have the same shapes"""
    cuts_text: ClassVar[bool] = True
    """whether it learns from sequences of any length that text is cut into"""

    def __init__(self, prepared: Any, config: RunConfig) -> None:
        self.prepared, self.config = prepared, config

    @classmethod
    def prepare(cls, config: RunConfig, tokenizers: Sequence[Tokenizer] = ()) -> Prepared:
        """The data that `config` names; `tokenizers` are those that a run has already, otherwise they are fitted.

        Raises `UserError` for data that cannot be used.
        """
        raise NotImplementedError

    @classmethod
    def tokens_per_step(cls, config: RunConfig) -> int:
        """How many tokens a step reads, about."""
        training = config.training
        return training.batch_size * training.grad_accumulation * config.sequence_length

    def training_batches(self, step: int) -> Sequence[TrainingBatch]:
        """The micro-batches of a step: the same ones whenever they are asked for."""
        raise NotImplementedError

    def validation_batches(self) -> Batches:
        """The whole validation split, once."""
        raise NotImplementedError

    @property
    def validates(self) -> bool:
        """Whether there is a validation split."""
        return self.validation_tokens > 0

    @property
    def validation_tokens(self) -> int:
        """How many tokens the validation split has."""
        return len(self.prepared.validation)

    @property
    def validation_targets(self) -> Tokens:
        """The ids that `validation_bytes` are the bytes of."""
        return self.prepared.validation

    @property
    def validation_bytes(self) -> int | None:
        """Bytes of text that the targets of validation stand for; None if they stand for no whole text."""
        return None

    @property
    def blind_accuracy(self) -> float | None:
        """Share of the targets of validation that one would guess without looking; None if accuracy is not asked."""
        return None

    def loss_sum(self, model: nn.Module, batch: Any) -> Tensor:
        """What training makes small: in nats, summed over the targets of `batch` that count."""
        return self.score(model, batch).nats

    def score(self, model: nn.Module, batch: Any) -> Score:
        """How well `model` predicts the targets of `batch`."""
        raise NotImplementedError

    def examples(self, count: int) -> list[list[int]]:
        """Some inputs of validation (else of training), for who wants to see what the model makes of them."""
        return []


def refuse_other_files(data: DataConfig, names: Sequence[str]) -> None:
    """Raises `UserError` if `data` has a file in one of its fields `names`, which would be left unread in silence."""
    for name in names:
        if (value := getattr(data, name)) is not None:
            raise UserError(
                f"{name} is {value!r}, and nothing would read it: it is for files of pairs and --objective seq2seq, "
                "as in the preset transformer-mini"
            )
