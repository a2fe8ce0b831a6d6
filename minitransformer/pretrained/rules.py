"""Convert the tensors of a checkpoint to the weights of a model and back, by tables of rules.

A rule names a module on each side. Its transform is invertible, so the same table imports and exports. The table is
checked to be a bijection: every tensor is used once, every weight is filled once, and shapes match. All violations are
reported together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig


class Transform:
    """An invertible map from a tensor of the file to one or more weights; this one is the identity."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        return (tensor,)

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return weights[0]


SAME = Transform()


class Transposed(Transform):
    """A matrix is stored as [in, out]; a bias as it is."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        return (tensor.mT if tensor.dim() == 2 else tensor,)

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return weights[0].mT if weights[0].dim() == 2 else weights[0]


class TransposedThirds(Transform):
    """Queries, keys and values side by side, a matrix as [in, 3 · out]: GPT-2."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        thirds = tensor.unflatten(-1, (3, -1)).unbind(-2)
        return tuple(part.mT if tensor.dim() == 2 else part for part in thirds)

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return torch.cat([weight.mT if weight.dim() == 2 else weight for weight in weights], dim=-1)


class GroupedHeads(Transform):
    """For each key head in turn: its query heads, the key head, the value head. GPT-NeoX, Bloom, Falcon."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        groups = config.num_kv_heads or config.num_heads
        heads = tensor.unflatten(0, (groups, -1, config.features_per_head))
        q, k, v = heads.split([config.num_heads // groups, 1, 1], dim=1)
        return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        groups = config.num_kv_heads or config.num_heads
        heads = [weight.unflatten(0, (groups, -1, config.features_per_head)) for weight in weights]
        return torch.cat(heads, dim=1).flatten(0, 2)


class StackedHeads(Transform):
    """All query heads, then all key heads, then all value heads: Phi-3, DBRX."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        groups = config.num_kv_heads or config.num_heads
        return tensor.split([heads * config.features_per_head for heads in (config.num_heads, groups, groups)])

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return torch.cat(weights)


class Halves(Transform):
    """Two maps of the same size, one after the other."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        return tensor.unflatten(0, (2, -1)).unbind()

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return torch.cat(weights)


class InterleavedPairs(Transform):
    """Rotary pairs are features 2i and 2i + 1, and ours are i and i + half: GPT-J, Cohere."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        heads = tensor.unflatten(0, (-1, config.features_per_head))
        return (heads[:, self._order(config)].flatten(0, 1),)

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        heads = weights[0].unflatten(0, (-1, config.features_per_head))
        return heads[:, self._order(config).argsort()].flatten(0, 1)

    def _order(self, config: ModelConfig) -> Tensor:
        turned = int(config.features_per_head * config.positions.settings.fraction)
        rest = torch.arange(turned, config.features_per_head)
        return torch.cat([torch.arange(0, turned, 2), torch.arange(1, turned, 2), rest])


class InterleavedHeads(InterleavedPairs):
    """Gains of each head, one row for each, whose pairs are interleaved: Cohere."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        return tensor[:, self._order(config)].unbind()

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return torch.stack(weights)[:, self._order(config).argsort()]


@dataclass(frozen=True)
class WithoutFirst(Transform):
    """A position table with unused first `rows`; these are exported as zeros."""

    rows: int

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        return (tensor[self.rows :],)

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return torch.cat([weights[0].new_zeros(self.rows, weights[0].size(1)), weights[0]])


class Row(Transform):
    """A vector is stored as a matrix of one row."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        return (tensor.flatten(),)

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return weights[0][None]


class Reversed(Transform):
    """The rows in reverse order."""

    def load(self, tensor: Tensor, config: ModelConfig) -> tuple[Tensor, ...]:
        return (tensor.flip(0),)

    def save(self, weights: tuple[Tensor, ...], config: ModelConfig) -> Tensor:
        return weights[0].flip(0)


@dataclass(frozen=True)
class Rule:
    """A module of the file, the model's modules that it becomes, and the transform; rules without weights are skipped.

    `{layer}`, `{decoder_layer}`, `{expert}`, `{head}` and `{kv_head}` are expanded. With `tensors`, the
    names are those of tensors rather than modules. A missing `optional` one means zeros.

    A later rule for weights that are already filled, such as tied ones, is for a copy, which a file may omit, and an
    export does.
    """

    source: str
    target: str | tuple[str, ...]
    transform: Transform = SAME
    tensors: bool = False
    optional: bool = False

    def expanded(self, config: ModelConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The names of each tensor and of its weights, for every layer, expert, weight and bias."""
        targets = (self.target,) if isinstance(self.target, str) else self.target
        ranges = {
            "{layer}": config.num_layers,
            "{decoder_layer}": config.decoder_layers,
            "{expert}": config.num_experts or 0,
            "{head}": config.num_heads,
            "{kv_head}": config.num_kv_heads or config.num_heads,
        }
        places = [place for place in ranges if place in self.source + targets[0]]
        for numbers in product(*(range(ranges[place]) for place in places)):
            for suffix in ("",) if self.tensors else (".weight", ".bias"):
                yield (
                    _filled(self.source, places, numbers) + suffix,
                    tuple(_filled(target, places, numbers) + suffix for target in targets),
                )


def _filled(name: str, places: Sequence[str], numbers: Sequence[int]) -> str:
    for place, number in zip(places, numbers, strict=True):
        name = name.replace(place, str(number))
    return name


def load_weights(
    model: nn.Module, config: ModelConfig, tensors: Mapping[str, Tensor], rules: Sequence[Rule], ignored: Sequence[str]
) -> None:
    """Load `tensors` into `model`; raises `UserError` with all missing, unexpected or mismatched ones.

    Tensors whose names match one of the patterns `ignored` may be left over. The file may contain equal copies of a
    weight.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    problems: list[str] = []
    filled: set[int] = set()
    used: set[str] = set()
    for rule in rules:
        for source, targets in rule.expanded(config):
            parts = {target: weights[target] for target in targets if target in weights}
            if not parts:
                continue
            is_copy = filled.issuperset(map(id, parts.values()))
            filled.update(map(id, parts.values()))
            if source in tensors:
                used.add(source)
                change = _compare if is_copy else _fill
                problems += change(parts, source, rule.transform, tensors[source], config)
            elif rule.optional and not is_copy:
                for weight in parts.values():
                    weight.data.zero_()
            elif not is_copy:
                problems.append(f"{source} is missing")
    left_over = [name for name in tensors if name not in used and not any(re.search(p, name) for p in ignored)]
    problems += [f"{name} is not expected" for name in left_over]
    problems += [f"nothing fills {name}" for name, weight in weights.items() if id(weight) not in filled]
    if problems:
        raise UserError(
            f"the tensors do not fit config.json ({'; '.join(_summarised(problems))}): "
            "check that both are of the same model"
        )


def _fill(
    weights: Mapping[str, Tensor], source: str, transform: Transform, tensor: Tensor, config: ModelConfig
) -> list[str]:
    """Copy the transformed `tensor` to the weights; returns the problems."""
    try:
        parts = transform.load(tensor, config)
    except (IndexError, RuntimeError):
        return [f"{source} has the shape {list(tensor.shape)}, which does not divide into {', '.join(weights)}"]
    problems = []
    for weight, part in zip(weights.values(), parts, strict=True):
        if part.shape == weight.shape:
            weight.data.copy_(part)
        else:
            problems.append(f"{source} has the shape {list(part.shape)} where {list(weight.shape)} is needed")
    return problems


def _compare(
    weights: Mapping[str, Tensor], source: str, transform: Transform, tensor: Tensor, config: ModelConfig
) -> list[str]:
    """The problems of `tensor` as a copy of the weights."""
    parts = transform.load(tensor, config)
    same = all(torch.equal(part.to(weight.dtype), weight) for part, weight in zip(parts, weights.values(), strict=True))
    return [] if same else [f"{source} differs from the weight that it is tied to"]


def _summarised(problems: Sequence[str]) -> Iterator[str]:
    """Problems that differ only in layer numbers, once, with their count."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(re.sub(r"\.\d+(?=\.)", "", problem), []).append(problem)
    for first, *others in kinds.values():
        yield f"{first} (and {len(others)} more like it)" if others else first


def save_weights(model: nn.Module, config: ModelConfig, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """The tensors of a checkpoint with the weights of `model`; raises `UserError` if the rules omit a weight."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    saved: set[str] = set()
    for rule in rules:
        for source, targets in rule.expanded(config):
            if weights.keys() >= set(targets) and not saved.issuperset(targets):
                tensors[source] = rule.transform.save(tuple(weights[target] for target in targets), config).contiguous()
                saved |= set(targets)
    if left_over := weights.keys() - saved:
        raise UserError(f"the format has no place for {', '.join(sorted(left_over))}: choose another one")
    return tensors
