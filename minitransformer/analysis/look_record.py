"""What a look at a model is asked for, and what it holds, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from minitransformer.errors import UserError
from minitransformer.text.tokenizers import Tokenizer


@dataclass(frozen=True)
class LookRequest:
    """What to look at. Raises `UserError` for numbers that make no sense."""

    prompt: str
    target: str | None = None
    """what an encoder-decoder is made to write; None is what it writes itself"""
    last: int | None = None
    """read only so many tokens of the prompt, the last ones"""
    layers: Sequence[int] = ()
    """the layers whose attention is kept, from 0; none is all"""

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise UserError(f"last is {self.last}: it must be at least 1")

    def layers_of(self, count: int) -> list[int]:
        """Of `count` layers, those whose attention is kept."""
        return [layer for layer in range(count) if not self.layers or layer in self.layers]


@dataclass(frozen=True)
class Text:
    """The tokens that a model reads on one side."""

    title: str
    tokens: Sequence[int]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class AttentionMaps:
    """Which tokens of `queries` attend to which of `keys`, two keys of `Look.texts`: each row of weights sums to 1."""

    title: str
    queries: str
    keys: str
    layers: Sequence[int]
    weights: Float[Tensor, "layers heads query key"]


@dataclass(frozen=True)
class Prediction:
    """What is predicted for one place of a text; loss and entropy in nats.

    `place` may be one past the text. `token` is what stands there, or None where that is unknown: then there is no
    probability and no loss. `guesses` are the likeliest tokens with their probabilities, the likeliest first.
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
    """All that was measured. `predicted` is the key of the text that the predictions are about."""

    texts: dict[str, Text]
    maps: Sequence[AttentionMaps]
    predicted: str
    predictions: Sequence[Prediction] = ()
    norms: Sequence[ResidualNorms] = ()
    remarks: Sequence[str] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        """In nats, of the tokens that have one."""
        return [prediction.loss for prediction in self.predictions if prediction.loss is not None]


@dataclass(frozen=True)
class MapPlan:
    """Which modules make a group of maps: `modules` is a name with a place for the layer."""

    title: str
    modules: str
    queries: str
    keys: str
    num_layers: int
