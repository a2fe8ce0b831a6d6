"""Module surgery: a model in which some modules are others, and are trained, saved, loaded and exported like any.

Low-rank adapters, quantised weights and pruning masks are such modules: what they hold are parameters and buffers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from minitransformer.architecture.embeddings import LMHead
from minitransformer.errors import UserError

M = TypeVar("M", bound=nn.Module)


def replaced(model: M, pattern: str, make: Callable[[nn.Linear], nn.Module]) -> M:
    """A copy of `model` in which linear maps are `make(linear)`, where the regular expression matches their whole name.

    Such as r".*attention\\.(query|value)". All that is not replaced is shared, so that training the copy trains
    `model`, which is left as it is. Raises `UserError` if no linear map has such a name.
    """
    names = [name for name, module in model.named_modules() if is_linear_map(module) and re.fullmatch(pattern, name)]
    if not names:
        some = ", ".join([name for name, module in model.named_modules() if is_linear_map(module)][:3])
        raise UserError(f"no linear map of the model matches {pattern!r}: they have names such as {some}")

    def replace(name: str, module: nn.Module) -> nn.Module | None:
        if name not in names:
            return None
        assert isinstance(module, nn.Linear)
        return module.around(make(module)) if isinstance(module, LMHead) else make(module)

    return copied(model, replace)


def is_linear_map(module: nn.Module) -> bool:
    """Whether it is x Wᵀ + b, but for what a head does around that; a class with a `forward` of its own is not."""
    return isinstance(module, nn.Linear) and type(module).forward in (nn.Linear.forward, LMHead.forward)


def copied(model: M, replace: Callable[[str, nn.Module], nn.Module | None]) -> M:
    """A copy of `model`, with the same parameters and buffers, in which some modules have a replacement.

    `replace` takes the name of a module, and the module, and returns another one, or None to keep it. A module with
    several names is asked about by the first of them, and stays one module.
    """
    return _copied(model, "", replace, {})  # type: ignore[return-value]


def _copied(
    module: nn.Module, name: str, replace: Callable[[str, nn.Module], nn.Module | None], copies: dict[int, nn.Module]
) -> nn.Module:
    if id(module) in copies:
        return copies[id(module)]
    found = replace(name, module)
    if found is None:
        found = _shallow_copy(module)
        for key, child in module._modules.items():
            full_name = f"{name}.{key}" if name else key
            found._modules[key] = None if child is None else _copied(child, full_name, replace, copies)
    copies[id(module)] = found
    return found


def _shallow_copy(module: M) -> M:
    """A module with the same parameters, buffers and children, to which others can be given without changing these."""
    clone = object.__new__(type(module))
    for key, value in vars(module).items():
        vars(clone)[key] = value.copy() if isinstance(value, dict) else value
    return clone
