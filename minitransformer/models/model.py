"""The base class of all models, and how one is built from its configuration."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minitransformer.amounts import amount, size
from minitransformer.architecture.attention import MultiHeadAttention
from minitransformer.architecture.block import Stack
from minitransformer.architecture.cache import ChosenSlots, KVCache
from minitransformer.architecture.embeddings import TokensOrEmbeddings
from minitransformer.architecture.feedforward import MixtureOfExperts
from minitransformer.architecture.init import initialise
from minitransformer.architecture.positions import token_positions
from minitransformer.errors import UserError
from minitransformer.models.adapters.lora import LowRankUpdate
from minitransformer.models.config import TOPOLOGIES, ModelConfig
from minitransformer.models.stored import StoredLinear, in_full
from minitransformer.registry import Registered

Readout = Callable[[nn.Module, Float[Tensor, "*batch d_model"]], Any]
"""A function of a head and the hidden states that it reads, in place of the logits."""


def apply_head(head: nn.Module, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab_size"]:
    """The logits. A loss is another readout, which need not materialise all logits at once."""
    return head(hidden)


class Model(Registered, nn.Module, kind="topology"):
    """A whole model with its configuration."""

    base: Any = None
    """the checkpoint with the weights that an adapter leaves as they are; None for a model that holds all of its own"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def initialise(self, complete: Callable[[nn.Module], object] = lambda module: None) -> None:
        """Initialise every weight as configured; `complete` is called with each block, then with the model."""
        initialise(self, self.config.init.make(), complete)
        self.end_step()  # an invariant after every step holds before the first one too

    def calibrate(self, run: Callable[[], object]) -> None:
        """Let the placement set what depends on data, before the first step: `run` is a forward pass over a batch.

        Dropout is active, and depends on torch's generators alone.
        """
        was_training = self.training
        self.train()
        for stack in [module for module in self.modules() if isinstance(module, Stack)]:
            stack.shared.calibrate(stack.connections, run)
        self.train(was_training)

    def begin_step(self, step: int) -> None:
        """Call `begin_step(step)` of every module that has one, before training step `step`, counted from 0."""
        for begin in self._begin_step:
            begin(step)

    def end_step(self) -> None:
        """Call `end_step(model)` of every module that has one, after a training step; it may change weights."""
        for end in self._end_step:
            end(self)

    @cached_property
    def _begin_step(self) -> list[Callable[..., object]]:
        return _methods_inside(self, "begin_step")

    @cached_property
    def _end_step(self) -> list[Callable[..., object]]:
        return _methods_inside(self, "end_step")

    def num_parameters(self) -> int:
        """The number of parameters; tied ones count once, and several in a byte each."""
        several = [part for part in self.modules() if isinstance(part, StoredLinear)]
        packed = sum((part.weights_per_element - 1) * part.weight.numel() for part in several)
        return packed + sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, length: int) -> int:
        """FLOPs of one training step per token of a sequence of `length` tokens.

        6 per weight of a matrix product, 12 per feature of each attention score: Chowdhery et al. 2022 (PaLM,
        arXiv 2204.02311), appendix B. A frozen weight has no gradient, and counts 4. Experts that do not process the
        token are not counted.
        """
        products = _flops_of_products(self)
        for mixture in self.modules():
            if isinstance(mixture, MixtureOfExperts):
                idle = len(mixture.experts) - mixture.experts_per_token
                products -= idle * _flops_of_products(mixture.experts[0])
        attentions = sum(isinstance(module, MultiHeadAttention) for module in self.modules())
        return products + 12 * attentions * self.config.num_heads * self.config.features_per_head * length


def _methods_inside(model: nn.Module, name: str) -> list[Callable[..., object]]:
    """The method called `name` of every module inside `model` that has one."""
    inside = (module for module in model.modules() if not isinstance(module, Model))
    return [getattr(module, name) for module in inside if hasattr(module, name)]


def _flops_of_products(module: nn.Module) -> int:
    matrices = [
        weight
        for part in module.modules()
        if isinstance(part, nn.Linear | LowRankUpdate)
        for name, weight in part.named_parameters(recurse=False)
        if weight.dim() == 2
    ]
    stored = [part for part in module.modules() if isinstance(part, StoredLinear)]
    frozen = sum(4 * part.in_features * part.out_features for part in stored)
    return frozen + sum((6 if weight.requires_grad else 4) * weight.numel() for weight in matrices)


def next_positions(
    tokens: TokensOrEmbeddings,
    is_token: Bool[Tensor, "batch length"] | None = None,
    cache: KVCache | ChosenSlots | None = None,
) -> Int[Tensor, "#batch length"]:
    """Consecutive positions for `tokens`, starting after those in `cache`; padding is not counted."""
    positions = token_positions(tokens.size(1), is_token, tokens.device)
    return positions if cache is None else positions + cache.next_position()


def build_model(config: ModelConfig) -> Model:
    """The model that `config` describes, with initialised weights."""
    model = _constructed(config)
    model.initialise()
    return model


def build_in_parts(config: ModelConfig, complete: Callable[[nn.Module], object] = lambda module: None) -> Model:
    """`build_model` with the very same weights and less memory: one block at a time gets storage, and then the rest.

    `complete` is called with each block, then with the model, and may replace the weights by those of one rank.
    """
    with _WithoutStorage():
        model = _constructed(config)
    model.initialise(complete)
    return model


def _constructed(config: ModelConfig) -> Model:
    import_module(f"minitransformer.models.{TOPOLOGIES[config.topology]}")
    plain = Model.named("encoder-pretraining" if config.next_sentence else config.topology)(config)
    return config.adapter.make().applied(config.weight_format.make().applied(plain))


def merged(model: Model) -> Model:
    """The model without an adapter that computes what `model` does; `model` must not be used any more.

    It is `model` itself if it has no adapter, or one that no weight can take in.
    """
    plain = model.config.adapter.make().merged(model)
    return model if plain is model else _as_plain(plain)


def in_full_precision(model: Model) -> Model:
    """`model` without an adapter, and with all of its matrices in full; it is `model` itself if it is that."""
    plain = in_full(model)
    return model if plain is model else _as_plain(plain)


def _as_plain(model: Model) -> Model:
    model.config, model.base = model.config.plain, None
    return model.requires_grad_(True)


class _Unmade(TorchFunctionMode):
    """Parameters with a shape only, without storage or initialisation.

    `torch.device("meta")` would do, but initialising there loads torch's compiler, which takes seconds.
    """

    makers = frozenset({torch.empty, torch.ones, torch.zeros})
    draws = frozenset({nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_})

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in self.draws:
            return self.draw(function, *args, **kwargs)
        return function(*args, **(kwargs | ({"device": "meta"} if function in self.makers else {})))

    def draw(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`tensor`, unchanged, in place of what `function` would draw."""
        return tensor


class _WithoutStorage(_Unmade):
    """Matrices with a shape only, where torch's generator is left as if they had been drawn."""

    makers = frozenset({torch.empty})

    def __init__(self) -> None:
        super().__init__()
        self._memory = torch.empty(0)  # one for all draws: freed ones would leave holes in the heap

    def draw(self, function: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not tensor.is_meta:
            return function(tensor, *args, **kwargs)
        if self._memory.numel() < tensor.numel():
            self._memory = torch.empty(tensor.numel())
        function(self._memory[: tensor.numel()].view(tensor.shape), *args, **kwargs)
        return tensor


def check_size(config: ModelConfig, tensors: int, stored: int, origin: str) -> None:
    """Raises `UserError` if `origin`, of `stored` bytes and `tensors` tensors, is too small for `config`.

    Otherwise a wrong configuration would exhaust memory before the shapes are compared.
    """
    layers = config.num_layers + (config.decoder_layers if config.topology == "encoder-decoder" else 0)
    if layers * (config.num_experts or 1) > tensors:
        raise UserError(f"{origin} has {tensors} tensors, too few for {layers} layers: config.json is of another model")
    # A weight takes at least 8 bits on disk, and two of 4 bits are one number.
    if (parameters := sum(each.numel() for each in model_without_storage(config).parameters())) > stored:
        raise UserError(
            f"{origin} has {stored:,} bytes, too few for {parameters:,} weights: config.json is of another model"
        )


def check_memory(config: ModelConfig, origin: str) -> None:
    """Raises `UserError` if the model in `origin`, of `config`, is larger than the memory of this machine."""
    if not hasattr(os, "sysconf"):  # not on this system
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parameters = count_parameters(config)
    if (needed := parameters * torch.float32.itemsize) > memory:
        raise UserError(
            f"{origin} has {amount(parameters)} weights, which take {size(needed)}, and this machine has "
            f"{size(memory)} of memory: use a larger machine, or a smaller model"
        )


def model_without_storage(config: ModelConfig) -> Model:
    """The model that `config` describes, whose parameters have a shape only."""
    with _Unmade():
        return _constructed(config)


def count_parameters(config: ModelConfig) -> int:
    """The number of parameters of the model that `config` describes, without allocating them."""
    return model_without_storage(config).num_parameters()


def count_trained(config: ModelConfig) -> int:
    """The number of parameters that are trained, without allocating them."""
    return sum(each.numel() for each in model_without_storage(config).parameters() if each.requires_grad)


def count_flops(config: ModelConfig, length: int) -> int:
    """`flops_per_token` of the model that `config` describes, without allocating it."""
    return model_without_storage(config).flops_per_token(length)


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the parameters of the model that `config` describes, without allocating them."""
    return {name: tuple(tensor.shape) for name, tensor in model_without_storage(config).state_dict().items()}
