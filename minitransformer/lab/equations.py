"""Reference implementations of residual placements: equations and initial weights in plain tensor code.

They share no code with the classes that they are compared with. A model is its weights by checkpoint name; a
placement is a function from the input to the output of a stack. Those of the package are in `statements`; a
placement in a plugin is stated next to its class:

    @states("mine")
    def mine(x, stack):
        for branch in stack.branches:
            x = x + branch.f(branch.norm(x))
        return stack.norm(x)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

StatedWeights = Mapping[str, Tensor]
HEADS = 4
EPS = 1e-5


def normalise(x: Tensor, gain: Tensor, eps: float = EPS) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * gain


@dataclass(frozen=True)
class StatedBranch:
    """A sublayer f, with the weights of its connection by name; layers are counted from 1.

    `f(x, mix_values)` of self-attention has mix_values(V) in place of its values V.
    """

    f: Callable[..., Tensor]
    sublayer: str
    layer: int
    weight: Callable[[str], Tensor]

    def norm(self, x: Tensor, name: str = "norm") -> Tensor:
        return normalise(x, self.weight(f"{name}.weight"))


@dataclass(frozen=True)
class Depth:
    """The layers of a stack and of the other stack (0: none), and whether it has cross-attention."""

    layers: int
    other_layers: int = 0
    has_memory: bool = False

    @property
    def sublayers(self) -> int:
        return self.layers * (3 if self.has_memory else 2)


@dataclass(frozen=True)
class StatedStack:
    """The branches of a stack, in order, and the weights of the stack's own norms."""

    branches: Sequence[StatedBranch]
    depth: Depth
    weight: Callable[[str], Tensor]

    def norm(self, x: Tensor, name: str = "final_norm", eps: float = EPS) -> Tensor:
        return normalise(x, self.weight(f"{name}.weight"), eps)


Equation = Callable[[Tensor, StatedStack], Tensor]
"""A function from the input of a stack, [batch, length, d_model], to its output."""


StartingWeight = float | Callable[[str, Depth], Tensor]
"""An initial value for all elements, or a function from a weight's full name to its initial tensor."""


@dataclass(frozen=True)
class Statement:
    """A placement's equation, with its authors' initialisation and other settings."""

    equation: Equation
    gains: Callable[[Depth], tuple[float, float]] | None = None
    """factors of the initial weights: of queries and keys, and of all other matrices of a sublayer"""
    init: str = "xavier"
    attention_norms: Mapping[str, str] = field(default_factory=dict)
    """of "query", "key" and "value": whether the features of a "head" or of "all" heads are normalised"""
    published_norms: Mapping[str, str] = field(default_factory=dict)
    """norms of the paper that are not part of the equation"""
    starts: Mapping[str, StartingWeight] = field(default_factory=dict)
    """initial values of weights that are not random, by the last part of their names; 1 for other vectors, scalars"""


STATEMENTS: dict[str, Statement] = {}
"""statements by placement name"""


def states(name: str, **about: Any) -> Callable[[Equation], Equation]:
    """A decorator that registers a function as the equation of the placement `name`; `about` as in `Statement`."""

    def keep(equation: Equation) -> Equation:
        STATEMENTS[name] = Statement(equation, **about)
        return equation

    return keep


def stated_stack(
    statement: Statement, weights: StatedWeights, name: str, depth: Depth, memory: Tensor | None = None
) -> StatedStack:
    """The stack called `name` of a model; all but an encoder is causal. Attends to `memory` where `depth` says so."""
    sublayers = ["attention", *(["cross_attention"] if depth.has_memory else []), "feedforward"]
    branches = [
        _branch(statement, weights, f"{name}.blocks.{layer}", sublayer, layer + 1, memory, name != "encoder")
        for layer in range(depth.layers)
        for sublayer in sublayers
    ]
    return StatedStack(branches, depth, lambda weight: weights[f"{name}.{weight}"])


def _branch(
    statement: Statement,
    weights: StatedWeights,
    block: str,
    sublayer: str,
    layer: int,
    memory: Tensor | None,
    causal: bool,
) -> StatedBranch:
    module = f"{block}.{sublayer}"

    def f(x: Tensor, mix_values: Callable[[Tensor], Tensor] = lambda v: v) -> Tensor:
        if sublayer == "feedforward":
            return feedforward(x, weights, module)
        norms = statement.attention_norms
        if sublayer == "attention":
            return attention(x, x, weights, module, norms, causal, mix_values)
        assert memory is not None
        return attention(x, memory, weights, module, norms, causal=False)

    return StatedBranch(f, sublayer, layer, lambda name: weights[f"{block}.{sublayer}_residual.{name}"])


def attention(
    x: Tensor,
    memory: Tensor,
    weights: StatedWeights,
    module: str,
    norms: Mapping[str, str],
    causal: bool,
    mix_values: Callable[[Tensor], Tensor] = lambda v: v,
) -> Tensor:
    """Multi-head attention from `x` to `memory`; `norms` as in `Statement`."""
    size = x.size(-1) // HEADS
    heads = [slice(head * size, (head + 1) * size) for head in range(HEADS)]
    projected = {}
    for name, source in (("query", x), ("key", memory), ("value", memory)):
        projection = source @ weights[f"{module}.{name}.weight"].T
        if norms.get(name) == "all":
            projection = normalise(projection, weights[f"{module}.{name}_norm.weight"])
        elif norms.get(name) == "head":
            gain = weights[f"{module}.{name}_norm.norm.weight"]
            projection = torch.cat([normalise(projection[..., head], gain) for head in heads], -1)
        projected[name] = projection
    projected["value"] = mix_values(projected["value"])
    outputs = []
    for head in heads:
        q, k, v = (projected[name][..., head] for name in ("query", "key", "value"))
        scores = q @ k.transpose(1, 2) / math.sqrt(size)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, -1) @ weights[f"{module}.output.weight"].T


def feedforward(x: Tensor, weights: StatedWeights, module: str) -> Tensor:
    hidden = (x @ weights[f"{module}.up.weight"].T).clamp(min=0)
    return hidden @ weights[f"{module}.down.weight"].T


def embed(tokens: Tensor, weights: StatedWeights) -> Tensor:
    table = weights["embedding.table.weight"]
    return table[tokens] * math.sqrt(table.size(1))


def stated_logits(
    statement: Statement, weights: StatedWeights, depths: Mapping[str, Depth], texts: Sequence[Tensor]
) -> Tensor:
    """The logits of a model with the stacks `depths`, in order, each of which reads one of `texts`."""
    x = None
    for (name, depth), tokens in zip(depths.items(), texts, strict=True):
        x = statement.equation(embed(tokens, weights), stated_stack(statement, weights, name, depth, memory=x))
    assert x is not None
    return x @ weights["head.weight"].T


def initial_weights(
    statement: Statement, shapes: Mapping[str, Sequence[int]], depths: Mapping[str, Depth], init: str
) -> dict[str, Tensor]:
    """The initial weights of a model, drawn from torch's generator in order.

    `init` is "xavier", or "xavier-scaled", which starts the outputs of sublayers 1/√sublayers times as large where the
    placement has no gains of its own.
    """
    weights = {}
    for name, shape in shapes.items():
        weight = torch.empty(tuple(shape), dtype=torch.float64)
        stack = name.split(".")[0]
        start = statement.starts.get(name.split(".")[-1], 1.0 if weight.dim() < 2 else None)
        if callable(start):
            weight = start(name, depths[stack]).double()
        elif start is not None:
            weight = torch.full(tuple(shape), start).double()  # rounded to float32, as in models
        elif stack not in depths:
            weight = weight.normal_() / math.sqrt(shape[1])
        else:
            bound = math.sqrt(6 / (shape[0] + shape[1]))
            weight = weight.uniform_(-bound, bound) * _initial_gain(statement, name, depths[stack], init)
        weights[name] = weight
    return weights


def _initial_gain(statement: Statement, name: str, depth: Depth, init: str) -> float:
    if statement.gains is not None:
        scores, values = statement.gains(depth)
        return scores if name.endswith(("query.weight", "key.weight")) else values
    is_output = name.endswith(("output.weight", "down.weight"))
    return 1 / math.sqrt(depth.sublayers) if init == "xavier-scaled" and is_output else 1.0
