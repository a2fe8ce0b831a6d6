"""Weight initialisations: one class each, registered by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer.architecture.block import Block
from minitransformer.architecture.embeddings import LMHead
from minitransformer.architecture.linear import OutputProjection, ScoreProjection
from minitransformer.architecture.residual import BranchGains, Residual
from minitransformer.errors import UserError
from minitransformer.registry import Registered


class Initialisation(Registered, kind="initialisation"):
    """Initialises each kind of weight in place. Biases are 0 and norms the identity under every scheme."""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def linear(self, weight: Tensor) -> None:
        raise NotImplementedError

    def embedding(self, weight: Tensor) -> None:
        raise NotImplementedError

    def output_projection(self, weight: Tensor, num_sublayers: int) -> None:
        """The output projection of one of a stack's `num_sublayers` sublayers."""
        self.linear(weight)

    def head(self, weight: Tensor) -> None:
        """The weights of an untied language-model head."""
        self.embedding(weight)


class GPT2(Initialisation, name="gpt2"):
    """N(0, 0.02²); output projections N(0, (0.02/√num_sublayers)²). Radford et al. 2019 (GPT-2), section 2.3."""

    def linear(self, weight: Tensor) -> None:
        nn.init.normal_(weight, std=0.02)

    embedding = linear

    def output_projection(self, weight: Tensor, num_sublayers: int) -> None:
        nn.init.normal_(weight, std=0.02 * num_sublayers**-0.5)


class Xavier(Initialisation, name="xavier"):
    """U(±√(6 / (fan_in + fan_out))), embeddings N(0, 1/d_model). Glorot and Bengio 2010, equation 16."""

    def linear(self, weight: Tensor) -> None:
        nn.init.xavier_uniform_(weight)

    def embedding(self, weight: Tensor) -> None:
        nn.init.normal_(weight, std=weight.size(1) ** -0.5)


class ScaledXavier(Xavier, name="xavier-scaled"):
    """Xavier, with output projections scaled by 1/√num_sublayers. Shoeybi et al. 2019 (arXiv 1909.08053)."""

    def output_projection(self, weight: Tensor, num_sublayers: int) -> None:
        nn.init.xavier_uniform_(weight, gain=num_sublayers**-0.5)


class Small(Initialisation, name="small"):
    """N(0, 2 / (5 d_model)), embeddings too. Nguyen and Salazar 2019 (arXiv 1910.05895), section 2.2."""

    def linear(self, weight: Tensor) -> None:
        nn.init.normal_(weight, std=(2 / (5 * weight.size(1))) ** 0.5)

    embedding = linear

    def output_projection(self, weight: Tensor, num_sublayers: int) -> None:
        nn.init.normal_(weight, std=(2 / (5 * weight.size(0))) ** 0.5)


class ZeroOutput(GPT2, name="zero-output"):
    """GPT-2, with zero output projections: the stack starts as the identity. Zhang et al. 2019 (arXiv 1901.09321)."""

    def output_projection(self, weight: Tensor, num_sublayers: int) -> None:
        nn.init.zeros_(weight)


def initialise(
    model: nn.Module, scheme: Initialisation, complete: Callable[[nn.Module], object] = lambda module: None
) -> None:
    """Initialise every linear layer and embedding of `model` by `scheme`, scaled by its residual placement.

    Depth scaling is applied once: if the placement has branch gains, `scheme` initialises as for a single sublayer.
    Other parameters keep the values of their constructor. At the end of each block, and of the model, every other
    module in it with a method `reset_parameters` is called, inner modules first, and may also change weights inside
    it. Then `complete` is called with the block, or the model; parameters without storage get it just before. Raises
    `UserError` for parameters of a module that is not a variant and has no such method.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    inside = {part for block in blocks for part in block.modules()}
    outside = [module for module in model.modules() if module not in inside]
    give_storage(outside)
    tables = {id(module.weight) for module in outside if isinstance(module, nn.Embedding)}
    others = []
    for module in list(model.modules()):
        if isinstance(module, Block):
            give_storage(module.modules())
            _initialise_block(module, scheme)
            complete(module)
        elif module not in inside and not _draw(module, scheme, tables, {}):
            others.append(module)
    _reset(others)
    complete(model)


def give_storage(modules: Iterable[nn.Module]) -> None:
    """Give storage on the CPU to the parameters of `modules` that have a shape only; tied ones stay tied."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                empty = made.get(parameter)
                if empty is None:
                    storage = torch.empty_like(parameter, device="cpu")
                    empty = made[parameter] = nn.Parameter(storage, requires_grad=parameter.requires_grad)
                setattr(module, name, empty)


def _initialise_block(block: Block, scheme: Initialisation) -> None:
    num_sublayers = {
        part: branch.residual.place.num_sublayers
        for branch in block.branches
        if branch.residual.branch_gains() is None
        for part in branch.sublayer.modules()
    }
    others = [module for module in block.modules() if not _draw(module, scheme, set(), num_sublayers)]
    for branch in block.branches:
        if (gains := branch.residual.branch_gains()) is not None:
            _scale(branch.sublayer, gains)
    _reset(others)


def _reset(modules: Sequence[nn.Module]) -> None:
    """Initialise `modules`, outer ones first, by their own methods."""
    for module in reversed(modules):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # type: ignore[operator]
        elif list(module.parameters(recurse=False)) and not isinstance(module, Registered | Residual.Shared):
            raise UserError(f"nothing initialises the weights of {module}: give it a method reset_parameters")


def _draw(module: nn.Module, scheme: Initialisation, tables: set[int], num_sublayers: dict[nn.Module, int]) -> bool:
    """Initialise `module` if `scheme` covers its kind; biases are 0."""
    match module:
        case nn.Embedding():
            scheme.embedding(module.weight)
        case LMHead() if id(module.weight) in tables:
            pass
        case LMHead():
            scheme.head(module.weight)
        case OutputProjection():
            scheme.output_projection(module.weight, num_sublayers.get(module, 1))
        case nn.Linear():
            scheme.linear(module.weight)
        case nn.GRU():
            _gru(module, scheme)
        case _:
            return False
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    return True


@torch.no_grad()
def _scale(sublayer: nn.Module, gains: BranchGains) -> None:
    for module in sublayer.modules():
        if isinstance(module, nn.Linear):
            module.weight *= gains.scores if isinstance(module, ScoreProjection) else gains.values


def _gru(module: nn.GRU, scheme: Initialisation) -> None:
    """Each gate's input weights as linear maps, its recurrent ones orthogonal: Bahdanau et al. 2014, appendix B.1."""
    for name, parameter in module.named_parameters():
        for gate in parameter.detach().chunk(3):
            if name.startswith("bias"):
                nn.init.zeros_(gate)
            elif name.startswith("weight_hh"):
                nn.init.orthogonal_(gate)
            else:
                scheme.linear(gate)
