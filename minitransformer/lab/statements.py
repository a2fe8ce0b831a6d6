"""Reference implementations of all residual placements of the package: equations, constants and initial weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minitransformer.lab.equations import Depth, StatedStack, states


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


@states("pre-scaled")
def pre_scaled(x: Tensor, stack: StatedStack) -> Tensor:
    for branch in stack.branches:
        x = x + branch.f(branch.norm(x)) * 22 / 100
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
    """Admin's calibrated ω of each branch, and the resulting output of the stack."""
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
    """ResiDual with the y stream scaled by η."""
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


@states("gpas", starts={"gates": 0.0})
def gpas(x: Tensor, stack: StatedStack) -> Tensor:
    for branch in stack.branches:
        x = x + branch.f(branch.norm(x))
        gate = stack.weight("shared.gates")[branch.layer - 1]
        x = x - gate / (1 + (-gate).exp()) * x.detach()
    return stack.norm(x)


STREAMS = 4
ORDERS = list(itertools.permutations(range(STREAMS)))


def mhc_lite_biases(name: str, depth: Depth) -> Tensor:
    """Of reading, writing and mixing: the k-th sublayer is for stream k mod n, and streams stay apart."""
    _, _, layer, connection, _ = name.split(".")
    sublayers = ["attention", *(["cross_attention"] if depth.has_memory else []), "feedforward"]
    k = int(layer) * len(sublayers) + sublayers.index(connection.removesuffix("_residual"))
    favourite = [1.0 if stream == k % STREAMS else -1.0 for stream in range(STREAMS)]
    return torch.tensor([*favourite, *favourite, 0.0, *[-8.0] * (len(ORDERS) - 1)])


@states("mhc-lite", starts={"maps": 0.0, "scales": 0.01, "biases": mhc_lite_biases})
def mhc_lite(x: Tensor, stack: StatedStack) -> Tensor:
    streams = [x] * STREAMS
    for branch in stack.branches:
        every = root_mean_square_normed(torch.cat(streams, -1))
        scales = branch.weight("scales").repeat_interleave(torch.tensor([STREAMS, STREAMS, len(ORDERS)]))
        logits = (every @ branch.weight("maps") * scales + branch.weight("biases"))[..., None].unbind(-2)
        gates = [1 / (1 + (-logit).exp()) for logit in logits[: 2 * STREAMS]]
        o = branch.f(branch.norm(weighted(gates[:STREAMS], streams)))
        shares = [logit.exp() for logit in logits[2 * STREAMS :]]
        total = torch.stack(shares).sum(0)
        mixed = [weighted(shares, [streams[order[i]] for order in ORDERS]) / total for i in range(STREAMS)]
        streams = [mixed[i] + 2 * gates[STREAMS + i] * o for i in range(STREAMS)]
    return stack.norm(torch.stack(streams).sum(0))


def root_mean_square_normed(x: Tensor) -> Tensor:
    return x / ((x**2).mean(-1, keepdim=True) + 1e-6).sqrt()


def weighted(weights: Sequence[Tensor], terms: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * term for weight, term in zip(weights, terms, strict=True)]).sum(0)


@states("attention-residuals", starts={"query": 0.0})
def attention_residuals(x: Tensor, stack: StatedStack) -> Tensor:
    outputs = [x]

    def attended(query: Tensor) -> Tensor:
        weights = [(root_mean_square_normed(v) @ query).exp()[..., None] for v in outputs]
        return weighted(weights, outputs) / torch.stack(weights).sum(0)

    for branch in stack.branches:
        h = attended(branch.weight("query")) if len(outputs) > 1 else x
        outputs.append(branch.f(branch.norm(h)))
    return stack.norm(attended(stack.weight("shared.query")))


@states("value-residual")
def value_residual(x: Tensor, stack: StatedStack) -> Tensor:
    values: list[Tensor] = []

    def mixed(own: Tensor) -> Tensor:
        values.append(own)
        return own if len(values) == 1 else (values[0] + own) / 2

    for branch in stack.branches:
        y = branch.norm(x)
        x = x + (branch.f(y, mixed) if branch.sublayer == "attention" else branch.f(y))
    return stack.norm(x)
