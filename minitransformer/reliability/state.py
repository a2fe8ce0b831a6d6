"""The state of a run, part by part, and where two states first differ, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from minitransformer.training.learner import Learner
from minitransformer.training.loop import Trainer
from minitransformer.training.shards import local_part

State = dict[str, dict[str, Any]]
"""tensors and numbers by name, in each part of the state"""
LOSSES = "losses"
OF_TIME = {"seconds", "seconds_left", "tokens_per_second", "mfu", "record_begin"}
"""figures that are measured, and differ between equal runs"""


@dataclass(frozen=True)
class Difference:
    """The first difference in a part of the state: a number, or element `index` of a tensor; and how many differ."""

    part: str
    name: str
    index: tuple[int, ...] | None
    whole: Any
    """value without a stop"""
    resumed: Any
    """value with one"""
    count: int
    """differing tensors and numbers in this part"""
    total: int

    def __str__(self) -> str:
        where = f"{self.name} at {list(self.index)}" if self.index else self.name
        return f"{where} is {self.resumed!r} instead of {self.whole!r} ({self.count} of {self.total} differ)"


def state_of(trainer: Trainer) -> State:
    """All that the next step depends on, with its batches, as far as this rank holds it."""
    learner = trainer.learner
    others = {name: part for name, part in learner.state_dict().items() if name not in ("optimizers", "precision")}
    return {
        "data": dict(_tensors_of(learner.next_batches())),
        "weights": {name: local_part(tensor) for name, tensor in learner.model.state_dict().items()},
        "optimizer state": dict(_optimizer_state(learner)),
        "precision state": learner.precision.state_dict(),
        "learner": dict(leaves_of(others)),
        "progress": dict(leaves_of(asdict(trainer.progress))),
    }


def without_times(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if name not in OF_TIME}


def leaves_of(nested: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and numbers in a nested state, without times, each with the path to it."""
    if not isinstance(nested, dict | list | tuple):
        yield name, nested
        return
    parts = without_times(nested) if isinstance(nested, dict) else dict(enumerate(nested))
    for key, part in parts.items():
        yield from leaves_of(part, f"{name}.{key}" if name else str(key))


def _tensors_of(batches: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    for number, batch in enumerate(batches):
        for field in fields(whole := batch.whole):
            if (tensor := getattr(whole, field.name)) is not None:
                yield f"{field.name} of micro-batch {number}", tensor


def _optimizer_state(learner: Learner) -> Iterator[tuple[str, Any]]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in learner.model.named_parameters()}
    for optimizer in learner.optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                yield f"{key} of {names[parameter]}", local_part(value) if isinstance(value, Tensor) else value


def differences(whole: State, resumed: State) -> list[Difference]:
    """The first difference in each part that differs."""
    found = (_difference(part, whole.get(part, {}), resumed.get(part, {})) for part in {**resumed, **whole})
    return [difference for difference in found if difference is not None]


def _difference(part: str, whole: Mapping[str, Any], resumed: Mapping[str, Any]) -> Difference | None:
    names = list({**whole, **resumed})
    differing = [name for name in names if not _same(whole.get(name), resumed.get(name))]
    if not differing:
        return None
    first = differing[0]
    place = _first_place(whole.get(first), resumed.get(first))
    return Difference(part, first, *place, len(differing), len(names))


def _same(left: Any, right: Any) -> bool:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return repr(left) == repr(right)  # NaN is NaN, and 0.0 is not -0.0
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes [elements, bytes of one] of `tensor`, on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1, 1).view(torch.uint8)


def _first_place(left: Any, right: Any) -> tuple[tuple[int, ...] | None, Any, Any]:
    """The index of the first differing element, None unless both are tensors of one kind, and both values."""
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return None, _shown(left), _shown(right)
    if left.shape != right.shape or left.dtype != right.dtype:
        return None, _shown(left), _shown(right)
    first = int((_bytes(left) != _bytes(right)).any(dim=1).nonzero()[0])
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(first), left.shape))
    return index, left[index].item(), right[index].item()


def _shown(value: Any) -> Any:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else value
