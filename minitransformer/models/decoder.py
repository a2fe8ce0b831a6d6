"""Decoders: the language model (GPT and its descendants), and a classifier."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitransformer.architecture.cache import ChosenSlots, KVCache
from minitransformer.architecture.embeddings import TokensOrEmbeddings
from minitransformer.architecture.positions import positions_in_documents
from minitransformer.models.build import build_classification_head, build_embedding, build_head, build_stack
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, Readout, apply_head, next_positions


class Decoder(Model):
    """Embeddings and a causal stack: the base class of decoders with different heads."""

    prefix: tuple[int, ...] = ()
    """virtual tokens that begin every window"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = build_embedding(config, config.vocab_size)
        self.stack = build_stack(config, causal=True)

    def hidden_states(
        self,
        tokens: TokensOrEmbeddings,
        *,
        is_token: Bool[Tensor, "batch length"] | None = None,
        positions: Int[Tensor, "#batch length"] | None = None,
        documents: Int[Tensor, "batch length"] | None = None,
        cache: KVCache | ChosenSlots | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """The last hidden states, [batch, length, d_model]; `tokens` are ids or embeddings.

        Tokens attend to each other and to those in `cache`, to which they are added. `is_token` is False at
        padding. `positions` default to the number of real tokens before each, including those in the cache.
        `documents` are the numbers of the documents that tokens belong to where a row has several: each is read as if
        it were alone.
        """
        if positions is None and documents is not None:
            positions = positions_in_documents(documents)
        elif positions is None:
            positions = next_positions(tokens, is_token, cache)
        return self.stack(
            self.embedding(tokens), positions=positions, is_token=is_token, documents=documents, cache=cache
        )


class DecoderLM(Decoder, name="decoder"):
    """p(next token | tokens so far) = softmax(head(stack(embedding(tokens)))).

    Radford et al. 2018 and 2019 (GPT, GPT-2); with a `ModelConfig` of its choices, Llama and its kin.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head = build_head(config, self.embedding)

    def forward(self, tokens: TokensOrEmbeddings, *, readout: Readout = apply_head, **inputs: Any) -> Any:
        """Logits of the next token, [batch, length, vocab_size], or the result of `readout`.

        `inputs` are the keyword arguments of `hidden_states`.
        """
        return readout(self.head, self.hidden_states(tokens, **inputs))

    def new_cache(self, max_length: int | None = None) -> KVCache:
        """An empty cache for `max_length` tokens (default: the context length)."""
        return KVCache(self.config.num_layers, max_length or self.config.context_length)


class DecoderClassifier(Decoder, name="decoder-classifier"):
    """p(class | tokens), from the hidden state of the last token. Radford et al. 2018 (GPT), section 3.2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head = build_classification_head(config, pooled="last")

    def forward(
        self, tokens: TokensOrEmbeddings, *, is_token: Bool[Tensor, "batch length"] | None = None, **inputs: Any
    ) -> Float[Tensor, "batch classes"]:
        """One logit for each class; `inputs` are the other keyword arguments of `hidden_states`."""
        return self.head(self.hidden_states(tokens, is_token=is_token, **inputs), is_token)
