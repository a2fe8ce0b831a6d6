"""Embeddings of tokens and segments, and the heads that turn the output of a stack into logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.architecture.cache import LayerCache, Slots
from minitransformer.architecture.dropout import Dropout
from minitransformer.architecture.pooling import POOLINGS

TokensOrEmbeddings = Int[Tensor, "batch length"] | Float[Tensor, "batch length d_model"]
"""Token ids, or their embeddings."""


class TokenEmbedding(nn.Module):
    """E[token] · scale, and S[segment] where there are `num_segments`.

    The original Transformer scales by √d_model (Vaswani et al. 2017, section 3.4), GPT-2 by 1. Segments: Devlin et al.
    2018 (BERT, arXiv 1810.04805), section 3. With `embedding_dim`, the table has that width, which a linear layer
    projects to d_model.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        *,
        scale: float = 1.0,
        num_segments: int | None = None,
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, embedding_dim or d_model)
        self.project = nn.Linear(embedding_dim, d_model, bias=False) if embedding_dim else nn.Identity()
        self.segments = nn.Embedding(num_segments, d_model) if num_segments else None
        self.scale = scale

    def forward(
        self, tokens: TokensOrEmbeddings, segments: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length d_model"]:
        """`segments` default to 0. Tokens given as embeddings replace E[token] · scale."""
        x = tokens if tokens.is_floating_point() else self._look_up(tokens)
        if self.segments is None:
            return x
        return x + (self.segments.weight[0] if segments is None else self.segments(segments))

    def _look_up(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length d_model"]:
        x = self.project(self.table(tokens))
        return x if self.scale == 1.0 else x * self.scale


class TokenSmear(nn.Module):
    """x_t + g ⊙ x_{t−1}: adds the previous token's embedding, with learned gains g, initially 0.

    A token shift of the embeddings only: Peng et al. 2023 (RWKV, arXiv 2305.13048), section 3.1.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(d_model))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gain)

    def forward(
        self, x: Float[Tensor, "batch new d_model"], slots: Slots, cache: LayerCache | None = None
    ) -> Float[Tensor, "batch new d_model"]:
        """`x` are the tokens of `slots.new`; `cache` holds the previous ones. The first of a text has none.

        An empty slot counts as 0.
        """
        held = x if cache is None else cache.write(x[:, None], x[:, None, :, :0], slots)[0][:, 0]  # keys of one head
        before = (slots.new - 1).clamp(min=0)
        known = (slots.new > 0) & (slots.positions[:, before] >= 0) & (slots.positions[:, slots.new] > 0)
        return x + self.gain * held[:, before] * known[..., None]


class LMHead(nn.Linear):
    """Logits of the vocabulary: x Wᵀ + b, where W may be the table of the token embedding.

    Tying the two: Press and Wolf 2016 (arXiv 1608.05859). x is first multiplied by `scale` (Raffel et al. 2019, T5,
    in its public code: d_model^-1/2); `softcap` c turns a logit z into c · tanh(z / c) (Gemma 2, arXiv 2408.00118, 2).
    """

    def __init__(
        self,
        features: int,
        vocab_size: int,
        *,
        tied_to: TokenEmbedding | None = None,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(features, vocab_size, bias=bias)
        if tied_to is not None:
            self.weight = tied_to.table.weight
        self.scale, self.softcap = scale, softcap

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch vocab"]:
        return _scaled_logits(super().forward, x, self.scale, self.softcap)

    @classmethod
    def holding(cls, weight: Any, bias: Any, scale: float = 1.0, softcap: float | None = None) -> LMHead:
        """The head with these parameters; `bias` may be None."""
        head = cls.__new__(cls)
        nn.Module.__init__(head)  # that of `nn.Linear` would draw weights
        head.out_features, head.in_features = weight.shape
        head.weight, head.scale, head.softcap = weight, scale, softcap
        head.register_parameter("bias", bias)
        return head

    def around(self, product: nn.Module) -> HeadAround:
        """This head with another module in place of x Wᵀ + b."""
        return HeadAround(product, self.scale, self.softcap)


class HeadAround(nn.Module):
    """An `LMHead` with `product` in place of x Wᵀ + b."""

    def __init__(self, product: nn.Module, scale: float, softcap: float | None) -> None:
        super().__init__()
        self.product, self.scale, self.softcap = product, scale, softcap

    def forward(self, x: Float[Tensor, "*batch features"]) -> Float[Tensor, "*batch vocab"]:
        return _scaled_logits(self.product, x, self.scale, self.softcap)


def _scaled_logits(product: Callable[[Tensor], Tensor], x: Tensor, scale: float, softcap: float | None) -> Tensor:
    logits = product(x if scale == 1.0 else x * scale)
    return logits if softcap is None else softcap * (logits / softcap).tanh()


class TransformedHead(nn.Module):
    """LMHead(N(act(x W + b))), for masked tokens. Devlin et al. 2018 (BERT, arXiv 1810.04805), its public code."""

    def __init__(
        self,
        d_model: int,
        head: LMHead,
        *,
        activation: Callable[[Tensor], Tensor],
        norm: nn.Module,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.transform = nn.Linear(d_model, d_model, bias=bias)
        self.activation, self.norm, self.head = activation, norm, head

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab"]:
        return self.head(self.norm(self.activation(self.transform(x))))


POOLING_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": F.gelu,
}


class ClassificationHead(nn.Module):
    """N(act(x₀ W + b)) W' + b', where x₀ is the first token, the last one, or the mean: one logit for each class.

    Devlin et al. 2018 (BERT, arXiv 1810.04805), section 4, with the pooling of its public code. The last token of a
    decoder: Radford et al. 2018 (GPT), section 3.2. By default, N is the identity; in ModernBERT
    (arXiv 2412.13663, its public code), it is a norm.
    """

    def __init__(
        self,
        d_model: int,
        num_classes: int,
        *,
        pooled: str = "first",
        pooling: str = "tanh",
        norm: nn.Module | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.reduce = POOLINGS[pooled]
        self.pool = nn.Linear(d_model, d_model, bias=bias)
        self.activation = POOLING_ACTIVATIONS[pooling]
        self.pool_norm = nn.Identity() if norm is None else norm
        self.dropout = Dropout(dropout)
        self.classify = nn.Linear(d_model, num_classes)

    def forward(
        self, x: Float[Tensor, "batch length d_model"], is_token: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """`is_token` is False at padding, which may come before the first token or after the last."""
        if is_token is None:
            is_token = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return self.classify(self.dropout(self.pool_norm(self.activation(self.pool(self.reduce(x, is_token))))))
