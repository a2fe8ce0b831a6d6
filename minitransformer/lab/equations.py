"""The second statement: the equation and the initial weights of every residual placement, in plain tensor code.

Nothing here comes from the classes that it is compared with. A model is its weights by the names of its checkpoint; a
placement is a function from what enters a stack to what leaves it. A placement of your own is stated beside its class:

    @states("mine")
    def mine(x, stack):
        for branch in stack.branches:
            x = x + branch.f(branch.norm(x))
        return stack.norm(x)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

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
    """A sublayer f, with the weights of its connection by name; layers count from 1."""

    f: Callable[[Tensor], Tensor]
    sublayer: str
    layer: int
    weight: Callable[[str], Tensor]

    def norm(self, x: Tensor, name: str = "norm") -> Tensor:
        return normalise(x, self.weight(f"{name}.weight"))


@dataclass(frozen=True)
class Depth:
    """The layers of a stack, those of the other stack (0: there is none), and whether it attends to that one."""

    layers: int
    other_layers: int = 0
    has_memory: bool = False

    @property
    def sublayers(self) -> int:
        return self.layers * (3 if self.has_memory else 2)


@dataclass(frozen=True)
class StatedStack:
    """The branches of a stack, in their order, and the weights of the stack's own norms."""

    branches: Sequence[StatedBranch]
    depth: Depth
    weight: Callable[[str], Tensor]

    def norm(self, x: Tensor, name: str = "final_norm", eps: float = EPS) -> Tensor:
        return normalise(x, self.weight(f"{name}.weight"), eps)


Equation = Callable[[Tensor, StatedStack], Tensor]
"""From what enters a stack, [batch, length, d_model], to what leaves it."""


@dataclass(frozen=True)
class Statement:
    """What a placement is, with what its authors made beside it."""

    equation: Equation
    gains: Callable[[Depth], tuple[float, float]] | None = None
    """how many times as large initial weights are: of queries and keys, and of all other matrices of a sublayer"""
    init: str = "xavier"
    attention_norms: Mapping[str, str] = field(default_factory=dict)
    """of "query", "key" and "value": whether the features of a "head" or of "all" heads are normalised"""
    published_norms: Mapping[str, str] = field(default_factory=dict)
    """those that belong to its paper, and not to its equation"""
    starts: Mapping[str, float] = field(default_factory=dict)
    """where vectors and scalars start, by the last part of their names; 1 for all others"""


STATEMENTS: dict[str, Statement] = {}
"""by the name of the placement"""


def states(
    name: str,
    *,
    gains: Callable[[Depth], tuple[float, float]] | None = None,
    init: str = "xavier",
    attention_norms: Mapping[str, str] | None = None,
    published_norms: Mapping[str, str] | None = None,
    starts: Mapping[str, float] | None = None,
) -> Callable[[Equation], Equation]:
    """Makes a function the equation of the placement called `name`; the rest is as in `Statement`."""

    def keep(equation: Equation) -> Equation:
        STATEMENTS[name] = Statement(equation, gains, init, attention_norms or {}, published_norms or {}, starts or {})
        return equation

    return keep


@states("post")
def post(x: Tensor, stack: StatedStack) -> Tensor:
    for branch in stack.branches:
        x = branch.norm(x + branch.f(x))
    return x


@states("pre")
def pre(x: Tensor, stack: StatedStack) -> Tensor:
    for branch in stack.branches:
        x = x + branch.f(branch.norm(x))
    return stack.norm(x)


@states("sandwich")
def sandwich(x: Tensor, stack: StatedStack) -> Tensor:
    for branch in stack.branches:
        x = x + branch.norm(branch.f(branch.norm(x)), "output_norm")
    return stack.norm(x)


@states("peri")
def peri(x: Tensor, stack: StatedStack) -> Tensor:
    return sandwich(stack.norm(x, "embedding_norm"), stack)


@states("olmo2", published_norms={"query": "all", "key": "all"})
def olmo2(x: Tensor, stack: StatedStack) -> Tensor:
    for branch in stack.branches:
        x = x + branch.norm(branch.f(x))
    return stack.norm(x)


@states("none")
def no_norm(x: Tensor, stack: StatedStack) -> Tensor:
    for branch in stack.branches:
        x = x + branch.f(x)
    return x


def deepnorm_constants(depth: Depth) -> tuple[float, float]:
    """α and β of Wang et al. 2022 (arXiv 2203.00555), figure 2."""
    if not depth.other_layers:
        return (2 * depth.layers) ** (1 / 4), (8 * depth.layers) ** (-1 / 4)
    if depth.has_memory:
        return (3 * depth.layers) ** (1 / 4), (12 * depth.layers) ** (-1 / 4)
    product = depth.layers**4 * depth.other_layers
    return 0.81 * product ** (1 / 16), 0.87 * product ** (-1 / 16)


@states("deepnorm", gains=lambda depth: (1.0, deepnorm_constants(depth)[1]))
def deepnorm(x: Tensor, stack: StatedStack) -> Tensor:
    alpha, _ = deepnorm_constants(stack.depth)
    for branch in stack.branches:
        x = branch.norm(alpha * x + branch.f(x))
    return x


@states("admin")
def admin(x: Tensor, stack: StatedStack) -> Tensor:
    for branch in stack.branches:
        x = branch.norm(branch.weight("omega") * x + branch.f(x))
    return x


def admin_profile(x: Tensor, stack: StatedStack) -> tuple[list[Tensor], Tensor]:
    """Admin's ω of each branch as its calibration sets them, and what leaves the stack with them."""
    omegas = []
    variance = torch.ones((), dtype=x.dtype)
    for branch in stack.branches:
        omegas.append(variance.sqrt())
        scaled, o = omegas[-1] * x, branch.f(x)
        variance = ((scaled - scaled.mean()) ** 2).mean() + ((o - o.mean()) ** 2).mean()
        x = branch.norm(scaled + o)
    return omegas, x


@states("lns")
def layer_norm_scaling(x: Tensor, stack: StatedStack) -> Tensor:
    for branch in stack.branches:
        x = x + branch.f(branch.norm(x) / math.sqrt(branch.layer))
    return stack.norm(x)


@states("keel")
def keel(x: Tensor, stack: StatedStack) -> Tensor:
    for branch in stack.branches:
        x = branch.norm(stack.depth.sublayers * x + branch.f(branch.norm(x)), "output_norm")
    return x


@states("mix")
def mix(x: Tensor, stack: StatedStack) -> Tensor:
    post_branches = [branch for branch in stack.branches if branch.layer <= stack.depth.layers // 4]
    x = post(x, replace(stack, branches=post_branches))
    return pre(x, replace(stack, branches=stack.branches[len(post_branches) :]))


HYBRID = {"query": "head", "key": "head", "value": "head"}


@states("hybrid", init="xavier-scaled", attention_norms=HYBRID)
def hybrid(x: Tensor, stack: StatedStack) -> Tensor:
    for branch in stack.branches:
        if branch.sublayer == "feedforward":
            x = branch.norm(x)
        x = x + branch.f(x)
    return stack.norm(x)


@states("hybrid-star", init="xavier-scaled", attention_norms=HYBRID)
def hybrid_star(x: Tensor, stack: StatedStack) -> Tensor:
    first = [branch for branch in stack.branches if branch.layer == 1]
    for branch in first:
        x = x + branch.f(branch.norm(x))
    return hybrid(x, replace(stack, branches=stack.branches[len(first) :]))


@states("b2t", gains=lambda depth: (1 / math.sqrt(depth.layers), 1 / math.sqrt(depth.layers)))
def b2t(x: Tensor, stack: StatedStack) -> Tensor:
    bottom = x
    for branch in stack.branches:
        if branch.sublayer == "feedforward":
            bottom = x = branch.norm(bottom + x + branch.f(x))
        else:
            x = branch.norm(x + branch.f(x))
    return x


@states("residual")
def residual(x: Tensor, stack: StatedStack) -> Tensor:
    return two_streams(x, stack, eta=1.0)


@states("residual-scaled")
def residual_scaled(x: Tensor, stack: StatedStack) -> Tensor:
    return two_streams(x, stack, eta=1 / 20)


def two_streams(x: Tensor, stack: StatedStack, eta: float) -> Tensor:
    """ResiDual, whose y stream is η times as large."""
    y = eta * x
    for branch in stack.branches:
        o = branch.f(x)
        x, y = branch.norm(x + o), y + eta * o
    return x + stack.norm(y, eps=1e-7)


@states("siamese")
def siamese(x: Tensor, stack: StatedStack) -> Tensor:
    y = x
    for branch in stack.branches:
        x = branch.norm(x)
        o = branch.f(branch.norm(x + branch.norm(y, "other_norm"), "input_norm"))
        x, y = x + o / math.sqrt(2 * branch.layer), y + o
    both = stack.norm(x, "final_norm.norm") + stack.norm(y, "final_norm.other_norm")
    return stack.norm(both, "final_norm.output_norm")


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

    def f(x: Tensor) -> Tensor:
        if sublayer == "feedforward":
            return feedforward(x, weights, module)
        norms = statement.attention_norms
        if sublayer == "attention":
            return attention(x, x, weights, module, norms, causal)
        assert memory is not None
        return attention(x, memory, weights, module, norms, causal=False)

    return StatedBranch(f, sublayer, layer, lambda name: weights[f"{block}.{sublayer}_residual.{name}"])


def attention(
    x: Tensor, memory: Tensor, weights: StatedWeights, module: str, norms: Mapping[str, str], causal: bool
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
    """The logits of a model whose stacks, from the first to the last, are `depths`: each reads one of `texts`."""
    x = None
    for (name, depth), tokens in zip(depths.items(), texts, strict=True):
        x = statement.equation(embed(tokens, weights), stated_stack(statement, weights, name, depth, memory=x))
    assert x is not None
    return x @ weights["head.weight"].T


def initial_weights(
    statement: Statement, shapes: Mapping[str, Sequence[int]], depths: Mapping[str, Depth], init: str
) -> dict[str, Tensor]:
    """The weights that a model starts with, drawn from torch's generator in their order.

    `init` is "xavier", or "xavier-scaled", which starts the outputs of sublayers 1/√sublayers times as large where the
    placement has no gains of its own.
    """
    weights = {}
    for name, shape in shapes.items():
        weight = torch.empty(tuple(shape), dtype=torch.float64)
        stack = name.split(".")[0]
        if weight.dim() < 2:
            weight = weight.fill_(statement.starts.get(name.split(".")[-1], 1.0))
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
