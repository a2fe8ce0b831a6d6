"""The state of optimizers by the names of parameters, which any number of ranks can load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from minitransformer.errors import StorageError
from minitransformer.training.light import LightOptimizer
from minitransformer.training.shards import is_sharded, sharded_like


def optimizer_states(optimizers: Sequence[LightOptimizer], model: nn.Module) -> list[dict[str, Any]]:
    """The `state_dict` of each optimizer of `model`, with the names of parameters instead of their numbers."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    states = []
    for optimizer in optimizers:
        numbered, order = optimizer.state_dict(), [names[id(parameter)] for parameter in _parameters(optimizer)]
        states.append(
            {
                "state": {order[number]: state for number, state in numbered["state"].items()},
                "param_groups": [
                    {**group, "params": [order[number] for number in group["params"]]}
                    for group in numbered["param_groups"]
                ],
            }
        )
    return states


def load_optimizer_states(
    optimizers: Sequence[LightOptimizer], model: nn.Module, saved: Sequence[Mapping[str, Any]]
) -> None:
    """Continue from the states `saved`, which old checkpoints have by number; settings keep their new values.

    Raises `StorageError` if they belong to other parameters.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    if len(saved) != len(optimizers):
        raise StorageError(f"the checkpoint has the state of {len(saved)} optimizers, not {len(optimizers)}")
    for optimizer, states in zip(optimizers, saved, strict=True):
        parameters = _parameters(optimizer)
        numbers = {names[id(parameter)]: number for number, parameter in enumerate(parameters)}
        loaded = {}
        for key, state in states["state"].items():
            number = key if isinstance(key, int) else numbers.get(key, -1)
            if not 0 <= number < len(parameters):
                raise StorageError(
                    f"the checkpoint has the optimizer state of a parameter {key!r}, which is not trained"
                )
            parameter = parameters[number]
            if any(isinstance(value, Tensor) and value.numel() > parameter.numel() for value in state.values()):
                raise StorageError(f"the checkpoint has an optimizer state that is larger than its parameter {key!r}")
            loaded[number] = _placed(state, parameter)
        optimizer.load_state_dict({"state": loaded, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: LightOptimizer) -> list[nn.Parameter]:
    """The parameters of `optimizer`, in the order of their numbers."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _placed(state: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """`state`, with tensors of the shape of `parameter` divided over the ranks as it is."""

    def wanted(value: Any) -> bool:
        return isinstance(value, Tensor) and value.shape == parameter.shape and is_sharded(parameter)

    return {
        name: sharded_like(value, parameter) if wanted(value) and not is_sharded(value) else value
        for name, value in state.items()
    }
