"""The request and the result of a look at a model, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class LookRequest:
    """What to inspect. Raises `UserError` for invalid numbers."""

    prompt: str
    target: str | None = None
    """target text of an encoder-decoder; None is its own greedy output"""
    last: int | None = None
    """keep only this many tokens at the end of the prompt"""
    layers: Sequence[int] = ()
    """layers whose attention is kept, counted from 0; empty is all"""

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise UserError(f"last is {self.last}: it must be at least 1")

    def layers_of(self, count: int) -> list[int]:
        """The layers among `count` whose attention is kept."""
        return [layer for layer in range(count) if not self.layers or layer in self.layers]


@dataclass(frozen=True)
class Text:
    """The tokens of one input of a model."""

    title: str
    tokens: Sequence[int]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class AttentionMaps:
    """Attention weights from `queries` to `keys`, two names in `Look.texts`; each row sums to 1."""

    title: str
    queries: str
    keys: str
    layers: Sequence[int]
    weights: Float[Tensor, "layers heads query key"]


@dataclass(frozen=True)
class Prediction:
    """The prediction at one position of a text; loss and entropy in nats.

    `place` may be one past the text. `token` is the actual token, or None if unknown: then there is no
    probability and no loss. `guesses` are the likeliest tokens with their probabilities, in descending order.
    """

    place: int
    token: int | None
    probability: float | None
    loss: float | None
    entropy: float
    guesses: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class ResidualNorms:
    """‖x‖₂ of the residual stream for each token, before the first block and after each."""

    title: str
    text: str
    norms: Float[Tensor, "states tokens"]


@dataclass(frozen=True)
class Look:
    """The whole result. `predicted` is the name of the text that the predictions are for."""

    texts: dict[str, Text]
    maps: Sequence[AttentionMaps]
    predicted: str
    predictions: Sequence[Prediction] = ()
    norms: Sequence[ResidualNorms] = ()
    remarks: Sequence[str] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """The losses in nats of the tokens that have one."""
        return [prediction.loss for prediction in self.predictions if prediction.loss is not None]


@dataclass(frozen=True)
class MapPlan:
    """The modules of a group of maps: `modules` is a name with a placeholder for the layer."""

    title: str
    modules: str
    queries: str
    keys: str
    num_layers: int
