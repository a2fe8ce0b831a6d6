"""The decoder-only language model: GPT and its descendants."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minitransformer.architecture.cache import KVCache
from minitransformer.architecture.embeddings import LMHead, TokenEmbedding
from minitransformer.architecture.init import Initialisation, initialise
from minitransformer.architecture.positions import token_positions
from minitransformer.errors import UserError
from minitransformer.models.build import build_stack
from minitransformer.models.config import ModelConfig


class DecoderLM(nn.Module):
    """p(next token | tokens so far) = softmax(head(stack(embedding(tokens)))).

    Radford et al. 2018 and 2019 (GPT, GPT-2); with a `ModelConfig` of its choices, Llama and its kin.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise UserError("vocab_size is not set: give the number of tokens that the tokenizer has")
        self.config = config
        scale = config.d_model**0.5 if config.scaled_embeddings else 1.0
        self.embedding = TokenEmbedding(config.vocab_size, config.d_model, scale=scale)
        self.stack = build_stack(config, causal=True)
        self.head = LMHead(
            config.d_model, config.vocab_size, tied_to=self.embedding if config.tied_embeddings else None
        )
        initialise(self, Initialisation.named(config.init)(num_sublayers=2 * config.num_layers))

    def hidden_states(
        self,
        tokens: Int[Tensor, "batch length"],
        *,
        is_token: Bool[Tensor, "batch all"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """What the head reads: the output of the stack for each of `tokens`, which follow those in `cache`.

        `is_token` is False at padding and covers all tokens, those in the cache included; positions count real ones.
        """
        read = 0 if cache is None else cache.length
        positions = token_positions(read + tokens.size(1), is_token, tokens.device)
        return self.stack(self.embedding(tokens), positions=positions, is_token=is_token, cache=cache)

    def forward(
        self,
        tokens: Int[Tensor, "batch length"],
        *,
        is_token: Bool[Tensor, "batch all"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch length vocab_size"]:
        """Logits of the token after each of `tokens`; the arguments are those of `hidden_states`."""
        return self.head(self.hidden_states(tokens, is_token=is_token, cache=cache))

    def new_cache(self, max_length: int | None = None) -> KVCache:
        """An empty cache for `max_length` tokens (default: the context length)."""
        return KVCache(self.config.num_layers, max_length or self.config.context_length)

    def num_parameters(self) -> int:
        """How many weights there are; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of one training step for a token of a sequence of `length` tokens.

        Six for each weight of a matrix product, twelve for each feature of each score: Chowdhery et al. 2022 (PaLM,
        arXiv 2204.02311), appendix B.
        """
        matrices = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        scores = self.config.num_layers * self.config.num_heads * self.config.features_per_head * length
        return 6 * matrices + 12 * scores


def count_parameters(config: ModelConfig) -> int:
    """The number of weights of the model that `config` describes, without making them."""
    with torch.device("meta"):
        return DecoderLM(config).num_parameters()
