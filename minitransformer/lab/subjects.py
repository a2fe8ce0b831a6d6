"""Models at initialisation and random batches, for experiments that need no data.

Embeddings are N(0, 1) in each feature, as Xiong et al. 2020 (arXiv 2002.04745), section 3.3, assume of a stack's input.
Tokens and targets are uniform over a vocabulary of size d_model; the head is linear and untied, N(0, 1/d_model);
the loss is the mean cross-entropy. All other matrices have Xavier initialisation; there are no biases and no dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minitransformer.architecture.linear import ScoreProjection
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_model

WIDTH = 128
"""d_model, and the size of the vocabulary"""
BATCH, LENGTH = 4, 32
MakeModel = Callable[[ModelConfig, int], Model]
"""A function from a configuration and a seed to a model, which the audit replaces by one with a defect."""


@dataclass(frozen=True)
class Placement:
    """A residual placement with an initialisation, as a row of a table."""

    residual: str
    init: str = "xavier"

    @property
    def label(self) -> str:
        return self.residual if self.init == "xavier" else f"{self.residual}, scaled init"


def make_model(config: ModelConfig, seed: int) -> Model:
    """The model of `config`, initialised by `seed`, without changing torch's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_model(config)


def real_config(placement: Placement, num_layers: int, **choices: object) -> ModelConfig:
    """A causal decoder of four heads with feed-forward networks of 4 d_model ReLUs."""
    settings: dict = {
        "num_heads": 4,
        "d_model": WIDTH,
        "vocab_size": WIDTH,
        "context_length": LENGTH,
        "feedforward": "relu",
        "positions": "none",
        "scaled_embeddings": True,  # from N(0, 1/d_model), which is Xavier's, to N(0, 1)
        "tied_embeddings": False,
    }
    return ModelConfig(residual=placement.residual, init=placement.init, num_layers=num_layers, **settings | choices)


def theory_config(placement: Placement, num_layers: int, **choices: object) -> ModelConfig:
    """The setting of theorem 1 of Xiong et al. 2020: one head and square matrices; see `blind`."""
    return real_config(placement, num_layers, **{"num_heads": 1, "d_ff": WIDTH} | choices)


@torch.no_grad()
def blind(model: Model) -> Model:
    """The model with W_Q = W_K = 0: attention is the mean over all unmasked tokens."""
    for module in model.modules():
        if isinstance(module, ScoreProjection):
            module.weight.zero_()
    return model


MODES: dict[str, Callable[[MakeModel, Placement, int, int], Model]] = {
    "theory": lambda make, placement, num_layers, seed: blind(make(theory_config(placement, num_layers), seed)),
    "real": lambda make, placement, num_layers, seed: make(real_config(placement, num_layers), seed),
}
"""A function from a maker, a placement, a depth and a seed to a model, in theory mode or real mode."""


def random_tokens(seed: int, texts: int, vocab_size: int = WIDTH) -> list[Int[Tensor, "batch length"]]:
    """`texts` different random batches of tokens, independent of the weights."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)
    return list(torch.randint(vocab_size, (texts, BATCH, LENGTH), generator=generator))


def loss(logits: Float[Tensor, "batch length vocab_size"], targets: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
    """The mean cross-entropy."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def feedforward_outputs(stack: nn.Module) -> list[Tensor]:
    """W₂ of each feed-forward network of a stack, from the first layer to the last."""
    return [block.feedforward.down.weight for block in stack.blocks]  # type: ignore[union-attr]
