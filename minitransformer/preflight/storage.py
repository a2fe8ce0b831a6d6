"""Bytes that a computation would take, counted on tensors without storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
MOST_VALUES = 1 << 22
"""elements of the largest tensor whose values are computed"""


class StorageCount(TorchDispatchMode):
    """Counts the bytes of all storages on `device`, from creation to release, in operations on fake tensors.

    Enter it inside a `FakeTensorMode`. Integers that follow from given ones are computed, because shapes may depend on
    them; where a shape depends on other values, they are those of experts, of which each gets an even share.
    """

    def __init__(self, device: torch.device, experts: int = 1) -> None:
        super().__init__()
        self.device, self.experts = device, experts
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it does the same with its local part
        kwargs = kwargs or {}
        shaped = SHAPED_BY_VALUES.get(func)
        result = func(*args, **kwargs) if shaped is None else shaped(self, *args, **kwargs)
        if shaped is None:
            _keep_values(func, args, kwargs, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                self._add(tensor.untyped_storage())
        if func.namespace == "fsdp":
            self.measure_again()
        self.peak = max(self.peak, self.live)
        return result

    def _add(self, storage: Any) -> None:
        if id(storage) not in self._sizes:
            self._sizes[id(storage)] = size = storage.nbytes()
            self._storages[id(storage)] = weakref.ref(storage)
            self.live += size
            weakref.finalize(storage, self._remove, id(storage))

    def _remove(self, key: int) -> None:
        del self._storages[key]
        self.live -= self._sizes.pop(key)

    def measure_again(self) -> None:
        """Follow `fully_shard`, which empties the storages of gathered weights, and fills them when it needs them."""
        for key, reference in self._storages.items():
            if (storage := reference()) is not None:
                self.live += storage.nbytes() - self._sizes[key]
                self._sizes[key] = storage.nbytes()


def each_tensor(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The dataclass `batch` with `change` applied to its tensors."""
    tensors = {each.name: getattr(batch, each.name) for each in fields(batch)}
    return replace(batch, **{name: change(value) for name, value in tensors.items() if isinstance(value, Tensor)})


def with_values(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor of known values."""
    fake: Any = mode.from_tensor(tensor)
    fake.values_known = tensor.clone()
    return fake


def _values(tensor: Tensor) -> Tensor | None:
    return getattr(tensor, "values_known", None)


def _keep_values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
    """Compute the values of integers whose inputs are known."""
    results: list[Any] = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
    inputs = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    if any(each.is_floating_point() or each.numel() > MOST_VALUES for each in results):
        return
    if not results or any(_values(each) is None for each in inputs):
        return
    with unset_fake_temporarily():
        known = func(*tree_map_only(Tensor, _values, args), **tree_map_only(Tensor, _values, dict(kwargs)))
    for each, values in zip(results, tree_leaves(known), strict=True):
        each.values_known = values


# --- operations whose result has a shape that depends on values


def _nonzero(count: StorageCount, x: Tensor) -> Tensor:
    if not isinstance(x, FakeTensor):
        return x.nonzero()
    values = _values(x)
    if values is None:
        return x.new_empty((x.numel() // count.experts, x.dim()), dtype=torch.int64)
    with unset_fake_temporarily():
        rows = values.nonzero()
    result: Any = x.new_empty(rows.shape, dtype=torch.int64)
    result.values_known = rows
    return result


def _index(count: StorageCount, x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    whole: list[Tensor | None] = []
    for each in indices:
        is_mask = each is not None and each.dtype in (torch.bool, torch.uint8)
        whole += _nonzero(count, each).unbind(1) if is_mask and each is not None else [each]
    return aten.index.Tensor(x, whole)


def _bincount(count: StorageCount, x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    return x.new_empty((minlength,))


SHAPED_BY_VALUES: dict[Any, Callable[..., Any]] = {
    aten.nonzero.default: _nonzero,
    aten.index.Tensor: _index,
    aten.bincount.default: _bincount,
}
