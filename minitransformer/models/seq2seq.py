"""The base of encoder-decoders: the source is encoded once, and target tokens are predicted from it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.architecture.block import Memory
from minitransformer.architecture.embeddings import TokensOrEmbeddings
from minitransformer.models.build import build_embedding
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, Readout, apply_head


class Seq2SeqLM(Model):
    """p(target | source) = Πᵢ p(yᵢ | y₁ … yᵢ₋₁, encode(source)). Sutskever et al. 2014 (arXiv 1409.3215), equation 1.

    One vocabulary has one embedding, unless `shared_embeddings` says otherwise.
    """

    head: nn.Module

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = build_embedding(config, config.vocab_size)
        own = config.target_vocab_size is not None or not config.shared_embeddings
        target_vocab_size = config.target_vocab_size or config.vocab_size
        self.target_embedding = build_embedding(config, target_vocab_size) if own else self.embedding

    def encode(
        self, source: Int[Tensor, "batch source"], *, is_token: Bool[Tensor, "batch source"] | None = None
    ) -> Memory:
        """The encoder's output, which the decoder attends to; `is_token` is False at padding."""
        raise NotImplementedError

    def hidden_states(
        self, tokens: TokensOrEmbeddings, memory: Memory, *, is_token: Bool[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length d_model"]:
        """The decoder's last hidden states, [batch, length, d_model]."""
        raise NotImplementedError

    def forward(
        self,
        source: Int[Tensor, "batch source"],
        inputs: Int[Tensor, "batch length"],
        *,
        source_is_token: Bool[Tensor, "batch source"] | None = None,
        is_token: Bool[Tensor, "batch length"] | None = None,
        readout: Readout = apply_head,
    ) -> Any:
        """Logits of the next target token, [batch, length, vocab_size], or the result of `readout`.

        `inputs` begin with the start token.
        """
        memory = self.encode(source, is_token=source_is_token)
        return readout(self.head, self.hidden_states(inputs, memory, is_token=is_token))
