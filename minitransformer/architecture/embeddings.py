"""Token embeddings and the language-model head."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn


class TokenEmbedding(nn.Module):
    """E[token] · scale. The original Transformer scales by √d_model (Vaswani et al. 2017, section 3.4), GPT-2 by 1."""

    def __init__(self, vocab_size: int, d_model: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, d_model)
        self.scale = scale

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length d_model"]:
        x = self.table(tokens)
        return x if self.scale == 1.0 else x * self.scale


class LMHead(nn.Linear):
    """One logit for each token of the vocabulary: x Wᵀ, where W may be the table of the token embedding.

    Tying the two: Press and Wolf 2016 (arXiv 1608.05859).
    """

    def __init__(self, d_model: int, vocab_size: int, *, tied_to: TokenEmbedding | None = None) -> None:
        super().__init__(d_model, vocab_size, bias=False)
        if tied_to is not None:
            self.weight = tied_to.table.weight
