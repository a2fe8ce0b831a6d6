"""What a model is made of: one frozen, validated record, and presets by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Annotated

from typing_extensions import Doc

from minitransformer.architecture.attention import KERNELS
from minitransformer.architecture.feedforward import FEEDFORWARDS
from minitransformer.architecture.init import Initialisation
from minitransformer.architecture.norms import Norm
from minitransformer.architecture.positions import PositionScheme
from minitransformer.architecture.residual import Residual
from minitransformer.errors import UserError
from minitransformer.registry import lookup


def choice(what: str, names: Iterable[str]) -> Doc:
    """The description of a field that holds one of `names`."""
    return Doc(f"{what}: {', '.join(names)}")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model and the choice of its parts. Raises `UserError` for a value that no model can have."""

    d_model: int = 256
    """features of the residual stream"""
    num_layers: int = 4
    """transformer blocks"""
    num_heads: int = 4
    """attention heads"""
    num_kv_heads: int | None = None
    """heads of keys and values, shared by the query heads where there are fewer; None is num_heads"""
    head_dim: int | None = None
    """features of a head; None is d_model / num_heads"""
    d_ff: int | None = None
    """hidden features of the feed-forward network; None is 4 d_model, or 8/3 d_model if gated"""
    context_length: int = 256
    """tokens that the model can see at once"""
    vocab_size: int | None = None
    """tokens of the vocabulary: what BPE is trained to, at least what others have; None is 4096 or theirs"""
    residual: Annotated[str, choice("where the norm stands", Residual.registry)] = "pre"
    norm: Annotated[str, choice("norm", Norm.registry)] = "layer"
    norm_eps: float = 1e-5
    """added to the variance inside a norm"""
    positions: Annotated[str, choice("position scheme", PositionScheme.registry)] = "rotary"
    feedforward: Annotated[str, choice("feed-forward network", FEEDFORWARDS)] = "gelu-tanh"
    bias: bool = False
    """biases in linear maps and in LayerNorm"""
    qk_norm: bool = False
    """normalise each query and key"""
    attention_scale: float | None = None
    """what scores are multiplied by; None is head_dim^-1/2"""
    attention_window: int | None = None
    """a token sees this many tokens at most, itself included; None is all of them"""
    attention_kernel: Annotated[str, choice("how attention is computed", KERNELS)] = "auto"
    tied_embeddings: bool = True
    """the head uses the weights of the token embedding"""
    scaled_embeddings: bool = False
    """multiply token embeddings by the square root of d_model"""
    dropout: float = 0.0
    """share of embeddings, attention weights and sublayer outputs that training drops"""
    init: Annotated[str, choice("how weights start", Initialisation.registry)] = "gpt2"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "int | None") and value is not None and value < 1:
                raise UserError(f"{field.name} is {value}: it must be at least 1")
        if self.head_dim is None and self.d_model % self.num_heads:
            nearest = self.num_heads * max(1, round(self.d_model / self.num_heads))
            raise UserError(
                f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}: "
                f"choose a multiple, such as {nearest}, or give head_dim"
            )
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise UserError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads {self.num_kv_heads}: choose a divisor"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: it must be at least 0 and below 1")
        if not self.norm_eps > 0:
            raise UserError(f"norm_eps is {self.norm_eps}: it must be above 0")
        for family, name in (
            (Residual, self.residual),
            (Norm, self.norm),
            (PositionScheme, self.positions),
            (Initialisation, self.init),
        ):
            family.named(name)
        lookup("feed-forward network", self.feedforward, FEEDFORWARDS)
        lookup("attention kernel", self.attention_kernel, KERNELS)

    @property
    def features_per_head(self) -> int:
        return self.head_dim or self.d_model // self.num_heads


MODERN = ModelConfig(feedforward="squared-relu", qk_norm=True, tied_embeddings=False, init="zero-output")

PRESETS: dict[str, ModelConfig] = {
    "gpt-nano": replace(MODERN, d_model=64, num_layers=3, num_heads=4, context_length=256),
    "gpt-micro": replace(MODERN, d_model=128, num_layers=4, num_heads=4, context_length=256),
    "gpt-mini": replace(MODERN, d_model=256, num_layers=4, num_heads=4, context_length=256),
    "gpt-small": replace(MODERN, d_model=384, num_layers=6, num_heads=6, context_length=256),
    "gpt-medium": replace(MODERN, d_model=512, num_layers=8, num_heads=8, context_length=512),
    "gpt2-124m": ModelConfig(
        d_model=768,
        num_layers=12,
        num_heads=12,
        context_length=1024,
        vocab_size=50257,
        positions="learned",
        bias=True,
        dropout=0.1,
    ),
    # The shape that nanoGPT's README trains on a CPU: characters, no biases, no dropout, exact GELU.
    "nanogpt-cpu": ModelConfig(
        d_model=128, num_layers=4, num_heads=4, context_length=64, positions="learned", feedforward="gelu"
    ),
}
