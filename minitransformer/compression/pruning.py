"""Fewer weights: whole heads and hidden units are left out, and the smallest weights are set to 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from minitransformer.architecture.attention import MultiHeadAttention, PerHead
from minitransformer.architecture.block import Block
from minitransformer.architecture.feedforward import GatedFeedForward, PlainFeedForward
from minitransformer.architecture.positions import PositionScheme
from minitransformer.compression.base import Compression
from minitransformer.compression.calibration import Calibration, hooked
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_in_parts
from minitransformer.models.surgery import is_linear_map
from minitransformer.settings import setting
from minitransformer.training.config import RunConfig

NETWORKS = (PlainFeedForward, GatedFeedForward)


class Prune(Compression, name="prune"):
    """Leaves out the heads and hidden units that the loss depends on least, and sets the smallest weights to 0.

    Every layer loses as many. What is left is a model of an ordinary shape; fine-tuning makes up for the loss.
    """

    @dataclass(frozen=True)
    class Settings:
        heads: int = setting(0, at_least=0, help="attention heads that each layer loses")
        units: float = setting(
            0.0, at_least=0, below=1, help="fraction of the hidden units of feed-forward networks that each layer loses"
        )
        weights: float = setting(
            0.0, at_least=0, below=1, help="fraction of the weights of each matrix that are set to 0, and stay so"
        )

    settings: Settings

    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        if not (settings.heads or settings.units or settings.weights):
            raise UserError("prune removes nothing: give --prune-heads, --prune-units or --prune-weights")

    @property
    def label(self) -> str:
        return f"prune {' and '.join(name for name, amount in vars(self.settings).items() if amount)}"

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return bool(self.settings.heads or self.settings.units)

    def check(self, model: Model) -> None:
        config, heads = model.config, self.settings.heads
        groups = config.num_kv_heads or config.num_heads
        shared = config.num_heads // groups
        if heads % shared:
            raise UserError(f"prune_heads is {heads}, and {shared} heads share a key head: give a multiple of {shared}")
        if heads >= config.num_heads:
            raise UserError(f"prune_heads is {heads}, and a layer has {config.num_heads}: give fewer")
        if heads and config.positions.variant.score_bias is not PositionScheme.score_bias:
            raise UserError(
                f"positions {config.positions.name!r} give each head a bias of its own in all layers: "
                "leave --prune-heads out"
            )
        if heads and not all(isinstance(each, nn.Identity | PerHead) for each in _norms_in_attention(model)):
            raise UserError("all heads have one norm of queries or keys, or each its own: leave --prune-heads out")

    def applied(self, model: Model, calibration: Calibration | None) -> Model:
        if calibration is not None:
            model = self._smaller(model, calibration)
        if self.settings.weights:
            _set_smallest_to_zero(model, self.settings.weights)
        return model

    def configured(self, config: RunConfig, model: Model) -> RunConfig:
        config = super().configured(config, model)
        return replace(config, training=replace(config.training, keep_zeros=True)) if self.settings.weights else config

    def _smaller(self, model: Model, calibration: Calibration) -> Model:
        importance = measured_importance(model, calibration)
        kept, d_ff = {}, None
        for name, part in model.named_modules():
            if isinstance(part, MultiHeadAttention):
                heads = importance[name].unflatten(0, (part.key.out_features // part.head_dim, -1)).sum(1)
                groups = len(importance[name]) // len(heads)
                kept[name] = most_important(heads, len(heads) - self.settings.heads // groups)
            elif isinstance(part, NETWORKS):
                d_ff = max(1, round((1 - self.settings.units) * part.up.out_features))
                kept[name] = most_important(importance[name], d_ff)
        config = _with_sizes(model.config, self.settings.heads, d_ff)
        with torch.random.fork_rng(devices=()):
            smaller = build_in_parts(config).eval()
        smaller.load_state_dict(_sliced(model, kept))
        return smaller


def _norms_in_attention(model: nn.Module) -> list[nn.Module]:
    attentions = [part for part in model.modules() if isinstance(part, MultiHeadAttention)]
    return [norm for part in attentions for norm in (part.query_norm, part.key_norm, part.value_norm)]


def _with_sizes(config: ModelConfig, heads: int, d_ff: int | None) -> ModelConfig:
    left = config.num_heads - heads
    of_keys = config.num_kv_heads and config.num_kv_heads * left // config.num_heads
    return replace(config, num_heads=left, num_kv_heads=of_keys, head_dim=config.features_per_head, d_ff=d_ff)


def most_important(importance: Float[Tensor, "parts"], count: int) -> Int64[Tensor, "count"]:
    """The numbers of the `count` parts with the highest importance, in order."""
    return importance.topk(count).indices.sort().values


def measured_importance(model: Model, calibration: Calibration) -> dict[str, Tensor]:
    """The importance of the heads of each attention, and of the hidden units of each feed-forward network, by name.

    Σ |xᵀ ∂L/∂x| over all tokens, where x is what a head gives, or a unit: how much the loss L would change without it,
    to first order. Michel et al. 2019 (arXiv 1905.10650), equation 2; Molchanov et al. 2016 (arXiv 1611.06440), 2.2.
    """
    sums: dict[str, Tensor] = {}
    handles = []

    def add(name: str, size: int, x: Tensor, gradient: Tensor) -> None:
        parts = (x * gradient).detach().flatten(0, -2).unflatten(-1, (-1, size))
        sums[name] = sums[name] + parts.sum(-1).abs().sum(0)

    def watch(name: str, size: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].register_hook(partial(add, name, size, args[0].detach()))

    for name, part in model.named_modules():
        if isinstance(part, MultiHeadAttention):
            last, size = part.output, part.head_dim
        elif isinstance(part, NETWORKS):
            last, size = part.down, 1
        else:
            continue
        sums[name] = torch.zeros(last.in_features // size)
        handles.append(last.register_forward_pre_hook(partial(watch, name, size)))
    model.requires_grad_(True)
    with hooked(handles):
        calibration.run_with_gradients(model)
    return sums


def _sliced(model: Model, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `model` without those of heads and hidden units that are not `kept`."""
    state = dict(model.state_dict())
    modules = dict(model.named_modules())
    for name, numbers in kept.items():
        part: Any = modules[name]
        if isinstance(part, MultiHeadAttention):
            keys = _features(numbers, part.head_dim)
            shared = part.query.out_features // part.key.out_features
            queries = _features(_features(numbers, shared), part.head_dim)
            first, last = {"query": queries, "key": keys, "value": keys}, ("output", queries)
        else:
            first, last = {each: numbers for each in ("up", "gate") if hasattr(part, each)}, ("down", numbers)
        for each, features in first.items():
            for weight in ("weight", "bias"):
                if (key := f"{name}.{each}.{weight}") in state:
                    state[key] = state[key][features]
        key = f"{name}.{last[0]}.weight"
        state[key] = state[key][:, last[1]]
    return state


def _features(numbers: Int64[Tensor, "parts"], size: int) -> Int64[Tensor, "features"]:
    """The features of the parts with these numbers, of `size` features each."""
    return (numbers[:, None] * size + torch.arange(size)).flatten()


@torch.no_grad()
def _set_smallest_to_zero(model: Model, fraction: float) -> None:
    """Set that fraction of each matrix in a block to 0, the smallest. Han et al. 2015 (arXiv 1506.02626), section 3."""
    blocks = [part for part in model.modules() if isinstance(part, Block)]
    for part in [each for block in blocks for each in block.modules() if is_linear_map(each)]:
        weight: Any = part.weight
        count = round(fraction * weight.numel())
        smallest = weight.abs().flatten().topk(count, largest=False).indices
        weight.view(-1)[smallest] = 0.0
