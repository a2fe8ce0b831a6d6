"""Position schemes: one class each, registered by name.

Positions enter a model in one of three places: they are added to the embeddings (`embed`), they
rotate queries and keys (`rotation`), or they are added to the attention scores (`score_bias`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.architecture.attention import identity
from minitransformer.architecture.rotary_scaling import RotaryScaling
from minitransformer.errors import UserError
from minitransformer.registry import Registered
from minitransformer.settings import Choice, setting


def token_positions(
    length: int, is_token: Bool[Tensor, "batch length"] | None = None, device: torch.device | None = None
) -> Int[Tensor, "#batch length"]:
    """0, 1, 2, … for each token; with `is_token`, padding is not counted."""
    if is_token is None:
        return torch.arange(length, device=device)[None]
    return (is_token.long().cumsum(-1) - 1).clamp(min=0)


def positions_in_documents(documents: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """0, 1, 2, … for each token of a document; `documents` are their numbers, of tokens that stand together."""
    places = torch.arange(documents.size(1), device=documents.device).expand_as(documents)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    return places - places.masked_fill(~begins, 0).cummax(-1).values


@dataclass(frozen=True)
class PositionSpace:
    """The dimensions and causality of the stack that a position scheme is for."""

    d_model: int
    num_heads: int
    head_dim: int
    max_length: int
    causal: bool


class PositionScheme(Registered, nn.Module, kind="position scheme"):
    """A position scheme for a stack with the given `PositionSpace`."""

    table_per_position = False
    """whether it has a table of context_length × d_model"""

    def __init__(self, settings: Any, space: PositionSpace) -> None:
        super().__init__()

    def embed(
        self, x: Float[Tensor, "batch length d_model"], positions: Int[Tensor, "#batch length"]
    ) -> Float[Tensor, "batch length d_model"]:
        """The token embeddings, with positions if the scheme adds them here."""
        return x

    def rotation(self, positions: Int[Tensor, "#batch length"]) -> Callable[[Tensor], Tensor]:
        """The map applied to queries and keys, [batch, heads, length, head_dim], in every layer."""
        return identity

    def rotations(
        self, positions: Int[Tensor, "#batch length"], windows: Sequence[int | None]
    ) -> tuple[Sequence[Callable[[Tensor], Tensor]], Sequence[int]]:
        """The rotations that there are, and the place of each layer's among them, by its attention window.

        There is one `rotation` for all layers, but for some schemes.
        """
        return [self.rotation(positions)], [0] * len(windows)

    def score_bias(
        self, query_positions: Int[Tensor, "#batch query"], key_positions: Int[Tensor, "#batch key"]
    ) -> Float[Tensor, "#batch heads query key"] | None:
        """The bias added to the attention scores of every layer."""
        return None


def row_of_each(
    look_up: Callable[[Tensor], Tensor], positions: Int[Tensor, "#batch length"], max_length: int
) -> Float[Tensor, "#batch length d_model"]:
    """The rows of a table of `max_length` positions by `look_up`; raises `UserError` for a position beyond it.

    On a GPU, to avoid synchronising, only the number of positions is checked.
    """
    if positions.is_cuda and positions.size(1) > max_length and (positions >= max_length).any():
        raise _past_the_context(positions, max_length)
    try:
        return look_up(positions)
    except IndexError:
        raise _past_the_context(positions, max_length) from None


def _past_the_context(positions: Tensor, max_length: int) -> UserError:
    missing = int(positions[(positions >= max_length) | (positions < 0)][0])
    return UserError(
        f"there is no position {missing}, as context_length is {max_length} (positions are 0 to {max_length - 1}): "
        "give fewer tokens, or use a model with a longer context"
    )


class NoPositions(PositionScheme, name="none"):
    """No positions: a causal model can still count (Haviv et al. 2022, arXiv 2203.16634), an encoder sees a set."""


class Sinusoidal(PositionScheme, name="sinusoidal"):
    """x + PE with PE[p, 2i] = sin(p / 10000^(2i/d)) and PE[p, 2i+1] = cos(p / 10000^(2i/d)).

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.5.
    """

    table_per_position = True

    def __init__(self, settings: Any, space: PositionSpace) -> None:
        super().__init__(settings, space)
        pairs = torch.arange(0, space.d_model, 2, dtype=torch.float64) / space.d_model
        angles = torch.arange(space.max_length)[:, None] / 10000.0**pairs
        table = self.arrange(angles.sin(), angles.cos())[:, : space.d_model].to(torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)

    def arrange(
        self, sin: Float[Tensor, "length half"], cos: Float[Tensor, "length half"]
    ) -> Float[Tensor, "length d_model"]:
        """Sine and cosine of each angle as features of the table."""
        return torch.stack([sin, cos], dim=-1).flatten(1)

    def embed(
        self, x: Float[Tensor, "batch length d_model"], positions: Int[Tensor, "#batch length"]
    ) -> Float[Tensor, "batch length d_model"]:
        return x + row_of_each(self.table.__getitem__, positions, len(self.table))  # type: ignore[arg-type]


class SinusoidalHalves(Sinusoidal, name="sinusoidal-halves"):
    """`Sinusoidal`, all sines before all cosines. Junczys-Dowmunt et al. 2018 (Marian, arXiv 1804.00344), its code."""

    def arrange(
        self, sin: Float[Tensor, "length half"], cos: Float[Tensor, "length half"]
    ) -> Float[Tensor, "length d_model"]:
        return torch.cat([sin, cos], dim=-1)


class Learned(PositionScheme, name="learned"):
    """x + E[p] with a learned table E for `max_length` positions. Radford et al. 2018 (GPT), section 3.1."""

    def __init__(self, settings: Any, space: PositionSpace) -> None:
        super().__init__(settings, space)
        self.table = nn.Embedding(space.max_length, space.d_model)

    def embed(
        self, x: Float[Tensor, "batch length d_model"], positions: Int[Tensor, "#batch length"]
    ) -> Float[Tensor, "batch length d_model"]:
        return x + row_of_each(self.table, positions, self.table.num_embeddings)


def rotate_half(
    x: Float[Tensor, "batch heads length head_dim"],
    cos: Float[Tensor, "#batch 1 length head_dim"],
    sin: Float[Tensor, "#batch 1 length head_dim"],
) -> Float[Tensor, "batch heads length head_dim"]:
    """x ⊙ cos + swap(x) ⊙ sin, where swap exchanges the halves of each head; sin is negative in the first half.

    This rotates each pair (x[i], x[i + head_dim/2]) by its angle: the half-split layout of public weights.
    """
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin).to(x.dtype)


class Rotary(PositionScheme, name="rotary"):
    """R(p) q · R(p') k depends on p − p' alone, where R(p) rotates feature pair i by p · base^(−2i/head_dim).

    Su et al. 2021 (arXiv 2104.09864), section 3.2.2. Only the first `fraction` of each head's features is rotated
    (Black et al. 2022, GPT-NeoX, arXiv 2204.06745, section 2.1), with frequencies rescaled by `scaling`. Layers with a
    sliding window may have a base of their own (Gemma 3, arXiv 2503.19786, section 2), and some `layers` no rotation
    (Yang et al. 2025, arXiv 2501.18795, section 3).
    """

    @dataclass(frozen=True)
    class Settings:
        base: float = setting(10000.0, above=0, help="base of the rotation frequencies base^(−2i/head_dim)")
        fraction: float = setting(1.0, above=0, at_most=1, help="fraction of each head's features that is rotated")
        scaling: Choice[RotaryScaling] = Choice(RotaryScaling, "none", help="rescaling of the rotary frequencies")
        window_base: float | None = setting(
            None,
            above=0,
            needs="attention_window",
            help="base in layers with a sliding window, where nothing is rescaled; None is as in all other layers",
        )
        layers: tuple[bool, ...] = setting(
            (True,), help="which layers rotate queries and keys; the pattern repeats over all layers"
        )

    def __init__(self, settings: Settings, space: PositionSpace) -> None:
        super().__init__(settings, space)
        self.rotated = int(space.head_dim * settings.fraction)
        if self.rotated % 2 or not self.rotated:
            raise UserError(
                f"rotary positions rotate pairs of features, but head_dim {space.head_dim} times rotary_fraction "
                f"{settings.fraction} is {self.rotated}: make it even"
            )
        if not settings.layers:
            raise UserError("rotary_layers is empty: give True or False for at least one layer")
        self.whole_head = self.rotated == space.head_dim
        self.base, self.window_base, self.layers = settings.base, settings.window_base, settings.layers
        self.scaling = settings.scaling.make(settings.base, space.max_length)
        self.scaling.rescale(torch.ones(self.rotated // 2))  # raises `UserError` for settings that do not fit

    def rotation(self, positions: Int[Tensor, "#batch length"]) -> Callable[[Tensor], Tensor]:
        frequencies = self.scaling.rescale(self._frequencies(self.base, positions))
        return self._rotation(positions, frequencies, self.scaling.magnitude)

    def rotations(
        self, positions: Int[Tensor, "#batch length"], windows: Sequence[int | None]
    ) -> tuple[Sequence[Callable[[Tensor], Tensor]], Sequence[int]]:
        turns = [self.layers[layer % len(self.layers)] for layer in range(len(windows))]
        found = [identity, self.rotation(positions)]
        if self.window_base is not None:
            found.append(self._rotation(positions, self._frequencies(self.window_base, positions), 1.0))
        places = [1 if window is None else len(found) - 1 for window in windows]
        return found, [place if turn else 0 for place, turn in zip(places, turns, strict=True)]

    def _frequencies(self, base: float, positions: Tensor) -> Float[Tensor, "half"]:
        # Computed here, since a buffer of a bfloat16 model would be rounded, and large positions need the precision.
        pairs = torch.arange(0, self.rotated, 2, dtype=torch.float32, device=positions.device)
        return base ** (-pairs / self.rotated)

    def _rotation(self, positions: Tensor, frequencies: Tensor, magnitude: float) -> Callable[[Tensor], Tensor]:
        angles = positions[:, None, :, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        if magnitude != 1.0:
            cos, sin = cos * magnitude, sin * magnitude
        cos, sin = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
        if self.whole_head:
            return lambda x: rotate_half(x, cos, sin)
        return lambda x: torch.cat([rotate_half(x[..., : self.rotated], cos, sin), x[..., self.rotated :]], dim=-1)


def alibi_slopes(num_heads: int) -> Float[Tensor, "heads"]:
    """2^(−8i/n) for n heads, a power of two; for other n, with every second slope of the next power of two.

    Press et al. 2021 (arXiv 2108.12409), section 3; for other head counts, the code that the authors published.
    """
    n = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    between = [2 ** (-4 * i / n) for i in range(1, 2 * n + 1, 2)]
    return torch.tensor(slopes + between[: num_heads - n])


class ALiBi(PositionScheme, name="alibi"):
    """score − slope · |p_query − p_key|, one slope for each head. Press et al. 2021 (arXiv 2108.12409), section 3."""

    def __init__(self, settings: Any, space: PositionSpace) -> None:
        super().__init__(settings, space)
        self.register_buffer("slopes", alibi_slopes(space.num_heads), persistent=False)

    def score_bias(
        self, query_positions: Int[Tensor, "#batch query"], key_positions: Int[Tensor, "#batch key"]
    ) -> Float[Tensor, "#batch heads query key"]:
        distance = (query_positions[:, None, :, None] - key_positions[:, None, None, :]).abs()
        return -self.slopes[:, None, None] * distance  # type: ignore[index]


class FalconALiBi(ALiBi, name="alibi-falcon"):
    """score + (b(p_key) − b(p_query)) / √head_dim with b(p) = slope · p, in bfloat16: ALiBi as Falcon rounds it.

    From 256 positions, b is a staircase. Almazrouei et al. 2023 (arXiv 2311.16867), its public code.
    """

    def __init__(self, settings: Any, space: PositionSpace) -> None:
        super().__init__(settings, space)
        self.scale = space.head_dim**-0.5

    def score_bias(
        self, query_positions: Int[Tensor, "#batch query"], key_positions: Int[Tensor, "#batch key"]
    ) -> Float[Tensor, "#batch heads query key"]:
        return self._rounded(key_positions)[:, :, None, :] - self._rounded(query_positions)[:, :, :, None]

    def _rounded(self, positions: Int[Tensor, "#batch length"]) -> Float[Tensor, "#batch heads length"]:
        slopes: Tensor = self.slopes  # type: ignore[assignment]
        return (slopes.bfloat16()[:, None] * positions[:, None, :]).to(slopes.dtype) * self.scale


def t5_bucket(
    offset: Int[Tensor, "*shape"], *, causal: bool, num_buckets: int, max_distance: int
) -> Int[Tensor, "*shape"]:
    """The bucket of key position − query position: one per small distance, then logarithmically wider ones.

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

    @dataclass(frozen=True)
    class Settings:
        buckets: int = setting(32, at_least=1, most=1 << 27, help="number of distance buckets, each with a bias")
        max_distance: int = setting(128, at_least=1, most=1 << 27, help="distance from which all share the last bucket")

    def __init__(self, settings: Settings, space: PositionSpace) -> None:
        super().__init__(settings, space)
        self.causal, self.num_buckets, self.max_distance = space.causal, settings.buckets, settings.max_distance
        self.table = nn.Embedding(self.num_buckets, space.num_heads)

    def score_bias(
        self, query_positions: Int[Tensor, "#batch query"], key_positions: Int[Tensor, "#batch key"]
    ) -> Float[Tensor, "#batch heads query key"]:
        offset = key_positions[:, None, :] - query_positions[:, :, None]
        buckets = t5_bucket(offset, causal=self.causal, num_buckets=self.num_buckets, max_distance=self.max_distance)
        return self.table(buckets).permute(0, 3, 1, 2)
