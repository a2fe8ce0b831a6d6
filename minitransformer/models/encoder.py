"""Bidirectional encoders: every token sees every other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from minitransformer.architecture.embeddings import ClassificationHead, TokensOrEmbeddings
from minitransformer.models.build import build_classification_head, build_embedding, build_head, build_stack
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, Readout, apply_head, next_positions


class Encoder(Model):
    """Embeddings and a bidirectional stack: the base class of encoders with different heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.embedding = build_embedding(config, config.vocab_size)
        self.stack = build_stack(config, causal=False)

    def hidden_states(
        self,
        tokens: TokensOrEmbeddings,
        *,
        is_token: Bool[Tensor, "batch length"] | None = None,
        segments: Int[Tensor, "batch length"] | None = None,
        positions: Int[Tensor, "#batch length"] | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """The last hidden states, [batch, length, d_model]; `tokens` are ids or embeddings.

        `is_token` is False at padding. `segments` default to 0, `positions` to the number of real tokens before each.
        """
        if positions is None:
            positions = next_positions(tokens, is_token)
        return self.stack(self.embedding(tokens, segments), positions=positions, is_token=is_token)


class EncoderLM(Encoder, name="encoder"):
    """p(masked token | unmasked tokens). Devlin et al. 2018 (BERT, arXiv 1810.04805), section 3.1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head = build_head(config, self.embedding)
        self.next_sentence = ClassificationHead(config.d_model, 2) if config.next_sentence else None

    def token_logits(
        self,
        tokens: TokensOrEmbeddings,
        *,
        places: Bool[Tensor, "batch length"] | None = None,
        readout: Readout = apply_head,
        **inputs: Any,
    ) -> Any:
        """Logits of the token at each position, [batch, length, vocab_size], or the result of `readout`.

        With `places`, only those positions are computed, [places, vocab_size], since few are masked. `inputs` are the
        keyword arguments of `hidden_states`.
        """
        hidden = self.hidden_states(tokens, **inputs)
        return readout(self.head, hidden if places is None else hidden[places])

    forward: Callable[..., Any] = token_logits


class PretrainingLogits(NamedTuple):
    """The outputs of BERT's two pretraining heads: masked tokens and next-sentence prediction."""

    tokens: Any
    follows: Float[Tensor, "batch 2"]


class EncoderPretraining(EncoderLM, name="encoder-pretraining"):
    """An encoder with a next-sentence prediction head on the first token.

    Devlin et al. 2018, section 3.1. `token_logits` gives the logits of tokens alone.
    """

    def forward(
        self,
        tokens: TokensOrEmbeddings,
        *,
        places: Bool[Tensor, "batch length"] | None = None,
        readout: Readout = apply_head,
        **inputs: Any,
    ) -> PretrainingLogits:
        """Logits of both heads; for tokens, as in `token_logits`."""
        assert self.next_sentence is not None
        hidden = self.hidden_states(tokens, **inputs)
        tokens_read = readout(self.head, hidden if places is None else hidden[places])
        return PretrainingLogits(tokens_read, self.next_sentence(hidden))


class EncoderClassifier(Encoder, name="encoder-classifier"):
    """p(class | tokens), from the first token or the mean of all. Devlin et al. 2018, section 4.1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head = build_classification_head(config, pooled=config.pooled)

    def forward(
        self, tokens: TokensOrEmbeddings, *, is_token: Bool[Tensor, "batch length"] | None = None, **inputs: Any
    ) -> Float[Tensor, "batch classes"]:
        """One logit for each class; `inputs` are the other keyword arguments of `hidden_states`."""
        return self.head(self.hidden_states(tokens, is_token=is_token, **inputs), is_token)


class HeadlessEncoder(Encoder, name="encoder-headless"):
    """The last hidden states alone, to embed texts. Reimers and Gurevych 2019 (arXiv 1908.10084), section 3."""

    forward: Callable[..., Tensor] = Encoder.hidden_states
