"""Scaled dot-product attention by its equation, and multi-head attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from minitransformer.architecture.cache import AttentionCache, KeysAndValues, Slots
from minitransformer.architecture.dropout import apply_dropout
from minitransformer.architecture.linear import OutputProjection, ScoreProjection
from minitransformer.errors import UserError


def attention_weights(
    q: Float[Tensor, "batch heads query head_dim"],
    k: Float[Tensor, "batch kv_heads key head_dim"],
    *,
    causal: bool = False,
    mask: Bool[Tensor, "... #query #key"] | None = None,
    bias: Float[Tensor, "... #query #key"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch heads query key"]:
    """softmax(Q Kᵀ · scale + bias) over the keys that a query may attend to: each row sums to 1.

    The row of a fully masked query is 0. Arguments as in `scaled_dot_product_attention`.
    Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.1.
    """
    scale = q.size(-1) ** -0.5 if scale is None else scale
    scores = (q * scale) @ repeat_heads(k, q.size(1)).transpose(-2, -1)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    allowed = allowed_keys(q, k, causal, mask)
    if allowed is None:
        return scores.softmax(-1)
    # Added to the scores, since the mask is small. Finite, so that a fully masked row has no NaN in its
    # gradient; half of the lowest number, so that the sum is finite too.
    forbidding = torch.zeros_like(allowed, dtype=scores.dtype).masked_fill(~allowed, torch.finfo(scores.dtype).min / 2)
    weights = (scores + forbidding).softmax(-1)
    return weights if every_query_has_a_key(q, k, causal, mask) else weights.masked_fill(~allowed, 0.0)


def scaled_dot_product_attention(
    q: Float[Tensor, "batch heads query head_dim"],
    k: Float[Tensor, "batch kv_heads key head_dim"],
    v: Float[Tensor, "batch kv_heads key value_dim"],
    *,
    causal: bool = False,
    mask: Bool[Tensor, "... #query #key"] | None = None,
    bias: Float[Tensor, "... #query #key"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads query value_dim"]:
    """softmax(Q Kᵀ · scale + bias) V over the keys that `mask` and `causal` allow (True = may attend).

    `scale` defaults to head_dim^-1/2; `mask` and `bias` broadcast over the scores. With `causal`, the last query is
    aligned with the last key. A fully masked query gets zeros. `heads` is a multiple of `kv_heads`, or a
    `UserError` is raised: neighbouring query heads share a key head. `softcap` c bounds scaled scores s, before the
    bias, by c · tanh(s / c).
    Vaswani et al. 2017 (arXiv 1706.03762), equation 1; `bias` as in T5 (1910.10683) and ALiBi (2108.12409);
    shared heads: Ainslie et al. 2023 (2305.13245); `softcap`: Gemma 2 (2408.00118), section 2.
    """
    weights = attention_weights(q, k, causal=causal, mask=mask, bias=bias, scale=scale, softcap=softcap)
    return apply_dropout(weights, dropout).to(v.dtype) @ repeat_heads(v, q.size(1))


def allowed_keys(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> Bool[Tensor, "... #query #key"] | None:
    """`mask` and causality as one mask; None where every query may attend to every key."""
    if not causal or q.size(-2) == 1:
        return mask
    queries, keys = q.size(-2), k.size(-2)
    triangle = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    return triangle if mask is None else mask & triangle


def every_query_has_a_key(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None) -> bool:
    """Whether this is certain without reading the mask."""
    return mask is None and (not causal or q.size(-2) <= k.size(-2))


def repeat_heads(
    x: Float[Tensor, "batch kv_heads length head_dim"], heads: int
) -> Float[Tensor, "batch heads length head_dim"]:
    """Each key (or value) head repeated for the query heads that share it."""
    if x.size(1) == heads:
        return x
    check_heads(heads, x.size(1))
    return x[:, :, None].expand(-1, -1, heads // x.size(1), -1, -1).flatten(1, 2)


def check_heads(heads: int, kv_heads: int) -> None:
    """Raises `UserError` where query heads cannot share key heads evenly."""
    if heads % kv_heads:
        raise UserError(
            f"{heads} query heads cannot share {kv_heads} key and value heads: choose a multiple of {kv_heads}"
        )


AttentionKernel = Callable[..., Tensor]
"""A function with the arguments and the result of `scaled_dot_product_attention`."""
Projection = Callable[..., Sequence[Tensor]]
"""Maps x and linear layers to the output of each."""


def project_each(x: Float[Tensor, "*batch features"], *maps: nn.Module) -> Sequence[Float[Tensor, "*batch _"]]:
    return [linear(x) for linear in maps]


def identity(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class AttentionView:
    """Mask, bias, rotation and slots: everything in an attention call except the tokens' features.

    `slots` are where a cache holds the keys.
    """

    causal: bool = False
    mask: Bool[Tensor, "#batch #heads #query key"] | None = None
    bias: Float[Tensor, "#batch heads query key"] | None = None
    rotate: Callable[[Tensor], Tensor] = identity
    mix_values: Callable[[Tensor], Tensor] = identity
    """maps the values of new tokens, [batch, kv_heads, new, head_dim], to those that are attended to"""
    slots: Slots | None = None


class PerHead(nn.Module):
    """A norm over the features of each head, for queries or keys before they are split into heads."""

    def __init__(self, norm: nn.Module, head_dim: int) -> None:
        super().__init__()
        self.norm, self.head_dim = norm, head_dim

    def forward(self, x: Float[Tensor, "batch length features"]) -> Float[Tensor, "batch length features"]:
        return self.norm(torch.unflatten(x, -1, (-1, self.head_dim))).flatten(2)


class EachHead(nn.Module):
    """A norm for each head, with gains of its own, for queries or keys before they are split into heads."""

    def __init__(self, make_norm: Callable[[int], nn.Module], heads: int, head_dim: int) -> None:
        super().__init__()
        self.norms, self.head_dim = nn.ModuleList(make_norm(head_dim) for _ in range(heads)), head_dim

    def forward(self, x: Float[Tensor, "batch length features"]) -> Float[Tensor, "batch length features"]:
        heads = x.split(self.head_dim, dim=-1)
        return torch.cat([norm(head) for norm, head in zip(self.norms, heads, strict=True)], dim=-1)


# For the norm of queries and keys: from a maker of norms and head_dim to a maker for a projection's features.
QK_NORMS: dict[str, Callable[[Callable[[int], nn.Module], int], Callable[[int], nn.Module] | None]] = {
    "none": lambda make_norm, head_dim: None,
    "head": lambda make_norm, head_dim: lambda features: PerHead(make_norm(head_dim), head_dim),
    "each-head": lambda make_norm, head_dim: lambda features: EachHead(make_norm, features // head_dim, head_dim),
    "full": lambda make_norm, head_dim: make_norm,
}


class MultiHeadAttention(nn.Module):
    """Concat(head₁, …, head_h) W_O with head_i = Attention(x W_Qᵢ, m W_Kᵢ, m W_Vᵢ), where m is `memory` or x itself.

    Key and value heads are shared by neighbouring query heads if there are fewer: `num_kv_heads=1` is multi-query
    attention (Shazeer 2019, arXiv 1911.02150), others are grouped (Ainslie et al. 2023, arXiv 2305.13245). Projected
    queries, keys and values are limited to [−`clip`, `clip`] (MPT and DBRX, their public code). `make_norm`
    makes a norm for the projected queries, and one for the keys, from their number of features (QK-norm: Henry et al.
    2020, arXiv 2010.04245), `make_value_norm` one for the values (QKV-norm: Zhuo et al. 2025, arXiv 2503.04598).
    Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.2.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        output_bias: bool | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        clip: float | None = None,
        dropout: float = 0.0,
        make_norm: Callable[[int], nn.Module] | None = None,
        make_value_norm: Callable[[int], nn.Module] | None = None,
        kernel: AttentionKernel = scaled_dot_product_attention,
        project: Projection = project_each,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        head_dim = head_dim or d_model // num_heads
        check_heads(num_heads, num_kv_heads)
        self.head_dim, self.scale, self.softcap, self.dropout = head_dim, scale, softcap, dropout
        self.kernel, self.project, self.clip = kernel, project, clip
        self.query = ScoreProjection(d_model, num_heads * head_dim, bias=bias)
        self.key = ScoreProjection(d_model, num_kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(d_model, num_kv_heads * head_dim, bias=bias)
        output_bias = bias if output_bias is None else output_bias
        self.output = OutputProjection(num_heads * head_dim, d_model, bias=output_bias)
        self.query_norm = make_norm(self.query.out_features) if make_norm else nn.Identity()
        self.key_norm = make_norm(self.key.out_features) if make_norm else nn.Identity()
        self.value_norm = make_value_norm(self.value.out_features) if make_value_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "batch query d_model"],
        memory: Float[Tensor, "batch key d_model"] | None = None,
        *,
        view: AttentionView,
        cache: AttentionCache | None = None,
    ) -> Float[Tensor, "batch query d_model"]:
        """Attend from `x` to `memory` (default: `x` itself), and to the cached tokens."""
        q, k, v = self._projections(x, memory, view, cache)
        attended = self.kernel(
            q,
            k,
            v,
            causal=view.causal,
            mask=view.mask,
            bias=view.bias,
            scale=self.scale,
            softcap=self.softcap,
            dropout=self.dropout if self.training else 0.0,
        )
        return self.output(attended.transpose(1, 2).flatten(2))  # batch, query, heads · head_dim

    def _projections(
        self, x: Tensor, memory: Tensor | None, view: AttentionView, cache: AttentionCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if memory is None:
            query, key, value = self.project(x, self.query, self.key, self.value)
            new = self._keys_and_values(key, value, view)
            k, v = new if cache is None else cache.update(lambda: new, view.slots)
        else:
            query = self.query(x)

            def project() -> KeysAndValues:
                return self._keys_and_values(self.key(memory), self.value(memory), view)

            k, v = project() if cache is None else cache.update(project, view.slots)
        return view.rotate(self._split_heads(self.query_norm(self._clipped(query)))), k, v

    def _keys_and_values(self, key: Tensor, value: Tensor, view: AttentionView) -> KeysAndValues:
        key, value = self._clipped(key), self._clipped(value)
        k, v = self._split_heads(self.key_norm(key)), self._split_heads(self.value_norm(value))
        return view.rotate(k), view.mix_values(v)

    def _clipped(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def _split_heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (-1, self.head_dim)).transpose(1, 2)  # batch, heads, length, head_dim
