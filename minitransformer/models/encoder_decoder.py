"""Encoder-decoders: the source is encoded once, and target tokens are predicted from it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.architecture.block import Memory
from minitransformer.architecture.cache import ChosenSlots, KVCache
from minitransformer.architecture.embeddings import TokensOrEmbeddings
from minitransformer.models.build import build_embedding, build_head, build_stack
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, Readout, apply_head, next_positions


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


class EncoderDecoder(Seq2SeqLM, name="encoder-decoder"):
    """p(next target token | target so far, source) = softmax(head(decoder(target, encoder(source)))).

    Vaswani et al. 2017 (arXiv 1706.03762), section 3; with a `ModelConfig` of its choices, T5, BART and Marian.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.encoder = build_stack(config, causal=False, partner_layers=config.decoder_layers)
        self.decoder = build_stack(
            config, causal=True, num_layers=config.decoder_layers, partner_layers=config.num_layers, has_memory=True
        )
        self.head = build_head(config, self.target_embedding)

    def encode(
        self,
        source: Int[Tensor, "batch source"],
        *,
        is_token: Bool[Tensor, "batch source"] | None = None,
        positions: Int[Tensor, "#batch source"] | None = None,
    ) -> Memory:
        """The encoder's output, which the decoder attends to; `is_token` is False at padding."""
        if positions is None:
            positions = next_positions(source, is_token)
        states = self.encoder(self.embedding(source), positions=positions, is_token=is_token)
        if is_token is not None:  # a prompt that an adapter sets before the source is no padding
            is_token = F.pad(is_token, (states.size(1) - is_token.size(1), 0), value=True)
        return Memory(states, is_token)

    def hidden_states(
        self,
        tokens: TokensOrEmbeddings,
        memory: Memory,
        *,
        is_token: Bool[Tensor, "batch length"] | None = None,
        positions: Int[Tensor, "#batch length"] | None = None,
        cache: KVCache | ChosenSlots | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """The decoder's last hidden states, [batch, length, d_model]; `tokens` are target ids or embeddings.

        Tokens attend to `memory`, to each other and to those in `cache`, to which they are added. `is_token` is
        False at padding. `positions` default to the number of real tokens before each, including those in the cache.
        """
        if positions is None:
            positions = next_positions(tokens, is_token, cache)
        x = self.target_embedding(tokens)
        return self.decoder(x, positions=positions, is_token=is_token, memory=memory, cache=cache)

    def new_cache(self, max_length: int | None = None) -> KVCache:
        """An empty cache for `max_length` target tokens (default: the context length)."""
        return KVCache(self.config.decoder_layers, max_length or self.config.context_length)
