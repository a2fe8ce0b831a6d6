"""Soft prompts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.architecture.block import Stack
from minitransformer.architecture.embeddings import TokenEmbedding
from minitransformer.architecture.masks import OF_ALL
from minitransformer.models.adapters.base import Adapter, M, frozen
from minitransformer.settings import setting


class SoftPrompt(Adapter, name="soft-prompt"):
    """Embeddings before every text, or every source, which alone are trained.

    Lester et al. 2021 (arXiv 2104.08691), section 2. They belong to virtual tokens after the vocabulary, which begin
    every window, and have no logits.
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
        prompted: Any = frozen(model)
        stack = getattr(prompted, "encoder", None) or getattr(prompted, "stack", None)
        assert isinstance(stack, Stack)
        tokens, first = self.settings.tokens, prompted.embedding.table.num_embeddings
        # A source has no embedding of its own; that of targets, which may be the same, stays as it is.
        prompted.embedding = PromptEmbedding(prompted.embedding, tokens)
        stack.register_forward_pre_hook(partial(_after_prompt, prompted.embedding), with_kwargs=True)
        if hasattr(prompted, "stack"):
            stack.register_forward_hook(partial(_without_prompt, tokens), with_kwargs=True)
        if hasattr(prompted, "prefix"):
            prompted.prefix = tuple(range(first, first + tokens))
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


def _after_prompt(
    embedding: PromptEmbedding, stack: nn.Module, args: tuple[Tensor], given: dict[str, Any]
) -> tuple[tuple[Tensor], dict[str, Any]] | None:
    """The arguments of a forward pass of `stack` with the prompt before each row; with a cache, it stands in there."""
    if given.get("cache") is not None:
        return None
    (x,), count = args, len(embedding.prompt)
    prompt = embedding(embedding.prompt[None]).expand(len(x), -1, -1)
    positions, is_token, documents = (given.get(name) for name in ("positions", "is_token", "documents"))
    assert positions is not None
    first = torch.arange(count, device=positions.device).expand(len(positions), -1)
    after = {"positions": torch.cat([first, positions + count], dim=1)}
    if is_token is not None:
        after["is_token"] = F.pad(is_token, (count, 0), value=True)
    if documents is not None:
        after["documents"] = F.pad(documents, (count, 0), value=OF_ALL)
    return (torch.cat([prompt.to(x.dtype), x], dim=1),), given | after


def _without_prompt(count: int, stack: nn.Module, args: Any, given: dict[str, Any], hidden: Tensor) -> Tensor:
    return hidden if given.get("cache") is not None else hidden[:, count:]
