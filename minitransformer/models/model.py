"""What all models have in common, and the way from a configuration to any of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minitransformer.architecture.attention import MultiHeadAttention
from minitransformer.architecture.block import Stack
from minitransformer.architecture.cache import ChosenSlots, KVCache
from minitransformer.architecture.embeddings import TokensOrEmbeddings
from minitransformer.architecture.feedforward import MixtureOfExperts
from minitransformer.architecture.init import initialise
from minitransformer.architecture.positions import token_positions
from minitransformer.errors import UserError
from minitransformer.models.config import TOPOLOGIES, ModelConfig
from minitransformer.registry import Registered

Readout = Callable[[nn.Module, Float[Tensor, "*batch d_model"]], Any]
"""What a forward pass makes of a head and of what it reads."""


def apply_head(head: nn.Module, hidden: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch vocab_size"]:
    """Logits. A loss is another readout, which need not hold all logits at once."""
    return head(hidden)


class Model(Registered, nn.Module, kind="topology"):
    """A whole model, with the configuration that it is made from."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def initialise(self) -> None:
        """Draw every weight as the configuration says."""
        initialise(self, self.config.init.make())
        self.end_step()  # what holds after every update holds before the first

    def calibrate(self, run: Callable[[], object]) -> None:
        """What the placement sets by a look at real data, before the first step: `run` passes a batch through.

        With dropout, as in the first step; what it drops depends on torch's generators alone.
        """
        was_training = self.training
        self.train()
        for stack in [module for module in self.modules() if isinstance(module, Stack)]:
            stack.shared.calibrate(stack.connections, run)
        self.train(was_training)

    def begin_step(self, step: int) -> None:
        """Tell every module that has a `begin_step` that update `step`, counted from 0, comes next."""
        for begin in self._begin_step:
            begin(step)

    def end_step(self) -> None:
        """Tell every module that has an `end_step(model)`, which may change weights, that an update is done."""
        for end in self._end_step:
            end(self)

    @cached_property
    def _begin_step(self) -> list[Callable[..., object]]:
        return _methods_inside(self, "begin_step")

    @cached_property
    def _end_step(self) -> list[Callable[..., object]]:
        return _methods_inside(self, "end_step")

    def num_parameters(self) -> int:
        """How many weights there are; tied ones count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, length: int) -> int:
        """Floating-point operations of one training step for a token of a sequence of `length` tokens.

        Six for each weight of a matrix product, twelve for each feature of each score: Chowdhery et al. 2022 (PaLM,
        arXiv 2204.02311), appendix B. Experts that do not see the token cost nothing.
        """
        matrices = _matrix_weights(self)
        for mixture in self.modules():
            if isinstance(mixture, MixtureOfExperts):
                idle = len(mixture.experts) - mixture.experts_per_token
                matrices -= idle * _matrix_weights(mixture.experts[0])
        attentions = sum(isinstance(module, MultiHeadAttention) for module in self.modules())
        return 6 * matrices + 12 * attentions * self.config.num_heads * self.config.features_per_head * length


def _methods_inside(model: nn.Module, name: str) -> list[Callable[..., object]]:
    """The method called `name` of every module inside `model` that has one."""
    inside = (module for module in model.modules() if not isinstance(module, Model))
    return [getattr(module, name) for module in inside if hasattr(module, name)]


def _matrix_weights(module: nn.Module) -> int:
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))


def next_positions(
    tokens: TokensOrEmbeddings,
    is_token: Bool[Tensor, "batch length"] | None = None,
    cache: KVCache | ChosenSlots | None = None,
) -> Int[Tensor, "#batch length"]:
    """0, 1, 2, … for `tokens`, from the first position after those that `cache` holds; padding is not counted."""
    positions = token_positions(tokens.size(1), is_token, tokens.device)
    return positions if cache is None else positions + cache.next_position()


def build_model(config: ModelConfig) -> Model:
    """The model that `config` describes, with weights that are drawn as it says."""
    import_module(f"minitransformer.models.{TOPOLOGIES[config.topology]}")
    return Model.named("encoder-pretraining" if config.next_sentence else config.topology)(config)


class _Unmade(TorchFunctionMode):
    """Weights that have a shape alone, and are not drawn.

    `torch.device("meta")` would do, but for the draws and sums there torch loads its compiler, which takes seconds.
    """

    makers = frozenset({torch.empty, torch.ones, torch.zeros})
    draws = frozenset(
        {nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, nn.init.orthogonal_, Tensor.normal_}
    )

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in self.draws:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs | ({"device": "meta"} if function in self.makers else {})))


def check_size(config: ModelConfig, tensors: int, size: int, origin: str) -> None:
    """Raises `UserError` if weights of `size` bytes in `tensors` tensors, in `origin`, cannot be those of `config`.

    A model that is much larger than its weights would fill the memory before it turned out not to fit them.
    """
    layers = config.num_layers + (config.decoder_layers if config.topology == "encoder-decoder" else 0)
    if layers * (config.num_experts or 1) > tensors:
        raise UserError(
            f"{origin} has {tensors} tensors, too few for {layers} layers: its config.json is of another one"
        )
    # Eight bits are the least that a weight has on disk.
    if (parameters := count_parameters(config)) > size:
        raise UserError(
            f"{origin} has {size:,} bytes, too few for {parameters:,} weights: config.json is of another model"
        )


def count_parameters(config: ModelConfig) -> int:
    """The number of weights of the model that `config` describes, without making them."""
    with _Unmade():
        return build_model(config).num_parameters()


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the weights of the model that `config` describes, without making them."""
    with _Unmade():
        return {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}
