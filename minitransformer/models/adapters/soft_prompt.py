"""Soft prompts of decoders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.architecture.embeddings import TokenEmbedding
from minitransformer.errors import UserError
from minitransformer.models.adapters.base import Adapter, M, frozen
from minitransformer.settings import setting


class SoftPrompt(Adapter, name="soft-prompt"):
    """Embeddings before every text, which alone are trained. Lester et al. 2021 (arXiv 2104.08691), section 2.

    They belong to virtual tokens after the vocabulary, which begin every window, and have no logits.
    """

    @dataclass(frozen=True)
    class Settings:
        tokens: int = setting(20, at_least=1, most=1 << 16, help="number of virtual tokens before every text")

    learning_rate = 1e-2
    merges = False
    settings: Settings

    @property
    def prefix_length(self) -> int:
        return self.settings.tokens

    def applied(self, model: M) -> M:
        embedding = getattr(model, "embedding", None)
        if not isinstance(embedding, TokenEmbedding) or not hasattr(model, "prefix"):
            raise UserError("a soft prompt stands before the texts of a decoder, and this model is none: choose lora")
        decoder: Any = frozen(model)
        decoder.embedding = PromptEmbedding(embedding, self.settings.tokens)
        first = embedding.table.num_embeddings
        decoder.prefix = tuple(range(first, first + self.settings.tokens))
        decoder.register_forward_pre_hook(_after_prompt, with_kwargs=True)
        return model

    @torch.no_grad()
    def begin(self, model: nn.Module) -> None:
        """Set the prompt to embeddings of random tokens: section 3.2."""
        embedding = model.embedding
        assert isinstance(embedding, PromptEmbedding)
        tokens = torch.randint(embedding.table.num_embeddings, (1, self.settings.tokens))
        embedding.prompt.copy_(embedding(tokens)[0])

    def merged(self, model: M) -> M:
        """`model` itself: no weight of its base could do what a prompt does."""
        return model


class PromptEmbedding(TokenEmbedding):
    """The token embedding `embedding`, whose weights keep their names, and those of the virtual tokens."""

    def __init__(self, embedding: TokenEmbedding, tokens: int) -> None:
        nn.Module.__init__(self)  # that of `TokenEmbedding` would make and draw weights
        self.table, self.project, self.segments = embedding.table, embedding.project, embedding.segments
        self.scale = embedding.scale
        features = getattr(embedding.project, "out_features", embedding.table.embedding_dim)
        self.prompt = nn.Parameter(torch.empty(tokens, features))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.prompt, std=0.02)

    def _look_up(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length d_model"]:
        size = self.table.num_embeddings
        known = super()._look_up(tokens.clamp(max=size - 1))
        return torch.where((tokens >= size)[..., None], self.prompt[(tokens - size).clamp(min=0)], known)


def _after_prompt(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a forward pass with the prompt before each row, whose readout gets what follows it."""
    (tokens,), prompt, readout = args, len(model.prefix), kwargs.get("readout", nn.Module.__call__)
    if others := kwargs.keys() - {"readout"}:
        raise UserError(f"a soft prompt cannot stand before texts with {', '.join(sorted(others))}: choose lora")
    prefix = torch.tensor(model.prefix, device=tokens.device).expand(len(tokens), -1)
    return (torch.cat([prefix, tokens], dim=1),), {"readout": lambda head, x: readout(head, x[:, prompt:])}
