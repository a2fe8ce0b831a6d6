"""How a model knows where a token stands: one scheme is one class, found by its name.

Position can enter in three places, and each scheme uses one of them: it is added to the embeddings (`embed`), it
rotates queries and keys (`rotation`), or it is added to the attention scores (`score_bias`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.architecture.attention import identity
from minitransformer.errors import UserError
from minitransformer.registry import Registered


def token_positions(
    length: int, is_token: Bool[Tensor, "batch length"] | None = None, device: torch.device | None = None
) -> Int[Tensor, "#batch length"]:
    """0, 1, 2, … for each token; where `is_token` is given, only real tokens count, so that padding shifts nothing."""
    if is_token is None:
        return torch.arange(length, device=device)[None]
    return (is_token.long().cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class PositionSpace:
    """The numbers that position schemes are made from: of the stack and, last, whether keys may lie ahead."""

    d_model: int
    num_heads: int
    head_dim: int
    max_length: int
    causal: bool


class PositionScheme(Registered, nn.Module, kind="position scheme"):
    """A scheme for stacks of the given `PositionSpace`."""

    def __init__(self, space: PositionSpace) -> None:
        super().__init__()

    def embed(
        self, x: Float[Tensor, "batch length d_model"], positions: Int[Tensor, "#batch length"]
    ) -> Float[Tensor, "batch length d_model"]:
        """The token embeddings, with their positions where the scheme puts them there."""
        return x

    def rotation(self, positions: Int[Tensor, "#batch length"]) -> Callable[[Tensor], Tensor]:
        """The map that this call's queries and keys, [batch, heads, length, head_dim], go through in every layer."""
        return identity

    def score_bias(
        self, query_positions: Int[Tensor, "#batch query"], key_positions: Int[Tensor, "#batch key"]
    ) -> Float[Tensor, "#batch heads query key"] | None:
        """What is added to the attention scores of every layer."""
        return None


class NoPositions(PositionScheme, name="none"):
    """No positions: a causal model can still count (Haviv et al. 2022, arXiv 2203.16634), an encoder sees a set."""


class Sinusoidal(PositionScheme, name="sinusoidal"):
    """x + PE with PE[p, 2i] = sin(p / 10000^(2i/d)) and PE[p, 2i+1] = cos(p / 10000^(2i/d)).

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.5.
    """

    def __init__(self, space: PositionSpace) -> None:
        super().__init__(space)
        angles = torch.arange(space.max_length)[:, None] / 10000.0 ** (
            torch.arange(0, space.d_model, 2) / space.d_model
        )
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, : space.d_model]
        self.register_buffer("table", table, persistent=False)

    def embed(
        self, x: Float[Tensor, "batch length d_model"], positions: Int[Tensor, "#batch length"]
    ) -> Float[Tensor, "batch length d_model"]:
        return x + self.table[positions]  # type: ignore[index]


class Learned(PositionScheme, name="learned"):
    """x + E[p] with a learned table E for `max_length` positions. Radford et al. 2018 (GPT), section 3.1."""

    def __init__(self, space: PositionSpace) -> None:
        super().__init__(space)
        self.table = nn.Embedding(space.max_length, space.d_model)

    def embed(
        self, x: Float[Tensor, "batch length d_model"], positions: Int[Tensor, "#batch length"]
    ) -> Float[Tensor, "batch length d_model"]:
        return x + self.table(positions)


def rotate_half(
    x: Float[Tensor, "batch heads length head_dim"],
    cos: Float[Tensor, "#batch 1 length half"],
    sin: Float[Tensor, "#batch 1 length half"],
) -> Float[Tensor, "batch heads length head_dim"]:
    """Turn the pair (x[i], x[i + head_dim/2]) by its angle, for every i: the half-split layout of public weights."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Rotary(PositionScheme, name="rotary"):
    """R(p) q · R(p') k depends on p − p' alone, where R(p) turns the i-th pair of features by p · base^(−2i/head_dim).

    Su et al. 2021 (arXiv 2104.09864), section 3.2.2.
    """

    base = 10000.0

    def __init__(self, space: PositionSpace) -> None:
        super().__init__(space)
        if space.head_dim % 2:
            raise UserError(f"rotary positions turn pairs of features, but head_dim is {space.head_dim}: make it even")
        self.head_dim = space.head_dim

    def rotation(self, positions: Int[Tensor, "#batch length"]) -> Callable[[Tensor], Tensor]:
        # Made here rather than kept in a buffer, which a model in bfloat16 would round: far positions need the digits.
        pairs = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=positions.device)
        angles = positions[:, None, :, None] * self.base ** (-pairs / self.head_dim)
        cos, sin = angles.cos(), angles.sin()
        return lambda x: rotate_half(x, cos, sin)


def alibi_slopes(num_heads: int) -> Float[Tensor, "heads"]:
    """2^(−8i/n) for n heads, a power of two; the missing ones of another count from every second slope of 2n.

    Press et al. 2021 (arXiv 2108.12409), section 3; for other head counts, the code that the authors published.
    """
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    between = [2 ** (-4 * i / n) for i in range(1, 2 * n + 1, 2)]
    return torch.tensor(slopes + between[: num_heads - n])


class ALiBi(PositionScheme, name="alibi"):
    """score − slope · |p_query − p_key|, one slope for each head. Press et al. 2021 (arXiv 2108.12409), section 3."""

    def __init__(self, space: PositionSpace) -> None:
        super().__init__(space)
        self.register_buffer("slopes", alibi_slopes(space.num_heads), persistent=False)

    def score_bias(
        self, query_positions: Int[Tensor, "#batch query"], key_positions: Int[Tensor, "#batch key"]
    ) -> Float[Tensor, "#batch heads query key"]:
        distance = (query_positions[:, None, :, None] - key_positions[:, None, None, :]).abs()
        return -self.slopes[:, None, None] * distance  # type: ignore[index]


def t5_bucket(
    offset: Int[Tensor, "*shape"], *, causal: bool, num_buckets: int, max_distance: int
) -> Int[Tensor, "*shape"]:
    """The bucket of key position − query position: one for each small distance, then logarithmically wider ones.

    Without causality, the upper half of the buckets is for keys ahead. Raffel et al. 2019 (arXiv 1910.10683), 2.1.
    """
    ahead = torch.zeros_like(offset)
    if causal:
        distance = (-offset).clamp(min=0)
    else:
        num_buckets //= 2
        ahead = (offset > 0).long() * num_buckets
        distance = offset.abs()
    exact = num_buckets // 2
    growth = (distance.clamp(min=1).float() / exact).log() / math.log(max_distance / exact)
    wide = exact + (growth * (num_buckets - exact)).long()
    return ahead + torch.where(distance < exact, distance, wide.clamp(max=num_buckets - 1))


class T5Relative(PositionScheme, name="t5"):
    """score + b[bucket(p_key − p_query)], with learned biases for each head, shared by all layers.

    Raffel et al. 2019 (arXiv 1910.10683), section 2.1.
    """

    num_buckets, max_distance = 32, 128

    def __init__(self, space: PositionSpace) -> None:
        super().__init__(space)
        self.causal = space.causal
        self.table = nn.Embedding(self.num_buckets, space.num_heads)

    def score_bias(
        self, query_positions: Int[Tensor, "#batch query"], key_positions: Int[Tensor, "#batch key"]
    ) -> Float[Tensor, "#batch heads query key"]:
        offset = key_positions[:, None, :] - query_positions[:, :, None]
        buckets = t5_bucket(offset, causal=self.causal, num_buckets=self.num_buckets, max_distance=self.max_distance)
        return self.table(buckets).permute(0, 3, 1, 2)
