"""E3 and E4: the forward pass at initialisation: the size of the stream, the change by each layer, and the
sensitivity of the output to the weights."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitransformer.lab.experiment import (
    Criterion,
    Experiment,
    ExperimentSettings,
    Findings,
    between,
    curve,
    exponent,
    seeds,
    select,
    within,
)
from minitransformer.lab.subjects import MODES, MakeModel, Placement, make_model, random_tokens
from minitransformer.reporting import figures
from minitransformer.reporting.statistics import mean_interval
from minitransformer.reporting.tables import Picture, Table
from minitransformer.tasks.task import Measurement, Result, Task

INDEPENDENT_BRANCH = 2 * (1 - (2 / 3) ** 0.5)
"""ω² of a feed-forward network whose output is independent of x and has half its square: cos² = 1 / (1 + ½)"""


class ForwardStatistics(Experiment, name="E3"):
    """E‖x_l‖² of each layer, and ω² = E‖N(x′) − N(x)‖²/d from before to after its feed-forward network."""

    title = "The stream and what each layer changes of it"
    question = "How does the residual stream grow over the layers at initialisation, and how much does each change it?"
    source = (
        "lemma 2 of Xiong et al. 2020 (arXiv 2002.04745); the representation collapse of Xie et al. 2023 "
        "(ResiDual, arXiv 2304.14802), section 2"
    )
    minutes = 0.1
    placements: Sequence[str] = ("post", "pre", "residual", "deepnorm", "keel")
    num_layers = 12
    make: MakeModel = staticmethod(make_model)

    def __init__(self, settings: ExperimentSettings) -> None:
        super().__init__(settings)
        self.seeds = 40  # also if quick: with fewer, the intervals of single layers are too wide

    def tasks(self) -> Sequence[Task]:
        return [
            {"placement": placement, "num_layers": self.num_layers, "seed": seed}
            for placement in self.placements
            for seed in range(self.seeds)
        ]

    def measure(self, task: Task) -> Measurement:
        return forward_statistics(self.make, task["placement"], task["num_layers"], task["seed"])

    def conclude(self, results: Sequence[Result]) -> Findings:
        names = [name for name in self.placements if select(results, {"placement": name})]
        measured = {name: _stacked(select(results, {"placement": name})) for name in names}
        criteria = [criterion for name in names for criterion in CLAIMS.get(name, lambda _: [])(measured[name])]
        rows = [
            (name, layer + 1, *(_rounded(statistics[kind][:, layer]) for kind in KINDS))
            for name, statistics in measured.items()
            for layer in range(self.num_layers)
        ]
        columns = ["placement", "layer", *KINDS.values()]
        return Findings(
            criteria,
            [Table("Means over seeds by layer", columns, rows)],
            [_picture(measured, kind) for kind in ("output", "change")] if measured else [],
            REMARKS,
        )


KINDS = {"output": "E‖x‖²/d after the layer", "sum": "E‖x + f(x)‖²/d at the feed-forward network", "change": "ω²"}
REMARKS = (
    "Lemma 2's setting, theory mode of E1: d_ff = d, one head with W_Q = W_K = 0, which sees all tokens up to its own.",
    "ω² compares the stream before and after a feed-forward network, both normalised. At initialisation it is no "
    "measure of quality: DeepNorm and KEEL start near 0.001 in every layer by design and train well.",
    "ω² of ResiDual is that of its x stream, which is Post-LN's.",
)


def forward_statistics(make: MakeModel, placement: str, num_layers: int, seed: int) -> Measurement:
    """By layer: E‖x‖²/d after it, the same of the sum x + f(x) at its feed-forward network, before any norm, and ω².

    A layer or sublayer that is never called changes nothing: ω² = 0.
    """
    model: Any = MODES["theory"](make, Placement(placement), num_layers, seed)
    output, total, change = [0.0] * num_layers, [0.0] * num_layers, [0.0] * num_layers
    state = model.stack.shared.state

    def after_block(layer: int, _: nn.Module, inputs: tuple[Any, ...], stream: Any) -> None:
        output[layer] = _mean_square(state(stream))

    def after_feedforward(layer: int, _: nn.Module, inputs: tuple[Any, ...], stream: Any) -> None:
        before, after = state(inputs[0]), state(stream)
        change[layer] = _mean_square(_normalised(after) - _normalised(before))

    def before_feedforward(layer: int, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
        stream, sublayer = inputs

        def recorded(x: Tensor) -> Tensor:
            branch = sublayer(x)
            total[layer] = _mean_square(state(stream) + branch)
            return branch

        return stream, recorded

    for layer, block in enumerate(model.stack.blocks):
        connection = block.residual_of("feedforward")
        block.register_forward_hook(partial(after_block, layer))
        connection.register_forward_pre_hook(partial(before_feedforward, layer))
        connection.register_forward_hook(partial(after_feedforward, layer))
    with torch.no_grad():
        model(*random_tokens(seed, 1))
    return {"output": output, "sum": total, "change": change}


def _normalised(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _mean_square(x: Tensor) -> float:
    return float(x.square().mean())


def _stacked(results: Sequence[Result]) -> dict[str, np.ndarray]:
    """Each kind of statistic (seeds × layers)."""
    return {kind: np.array([result.measured[kind] for result in results]) for kind in KINDS}


def _rounded(values: np.ndarray) -> float:
    return float(f"{values.mean():.4g}")


def _post_claims(measured: dict[str, np.ndarray]) -> list[Criterion]:
    total, change = measured["sum"], measured["change"]
    return [
        between(
            "post: lemma 2, E‖x + f(x)‖² = 3d/2 ± 3 %, mean of layers, in units of d",
            mean_interval(total.mean(1)),
            1.455,
            1.545,
        ),
        _every_layer(
            "post: ω² = 2(1 − √⅔) = 0.367 ± 15 % in every layer",
            change,
            0.85 * INDEPENDENT_BRANCH,
            1.15 * INDEPENDENT_BRANCH,
        ),
    ]


def _pre_claims(measured: dict[str, np.ndarray]) -> list[Criterion]:
    output, change = measured["output"], measured["change"]
    layer = 1 + np.arange(output.shape[1])
    low, high = 0.97 * (1 + layer / 2), 1.03 * (1 + 3 * layer / 2)
    return [
        _every_layer(
            "pre: lemma 2, (1 + l/2) d ≤ E‖x_l‖² ≤ (1 + 3l/2) d at every layer, ± 3 %, in units of d", output, low, high
        ),
        between("pre: ω² of the first layer is 0.35 ± 15 %", mean_interval(change[:, 0]), 0.2975, 0.4025),
        between("pre: ω² of the last of 12 layers is 0.04 ± 25 %", mean_interval(change[:, -1]), 0.03, 0.05),
    ]


CLAIMS = {"post": _post_claims, "pre": _pre_claims}


def _every_layer(claim: str, values: np.ndarray, low: Any, high: Any) -> Criterion:
    """Holds if it does at every layer, by the interval over seeds; fails if it fails at one."""
    means = [mean_interval(column) for column in values.T]
    ends = np.broadcast_to(low, len(means)), np.broadcast_to(high, len(means))
    inside = [within(mean, *map(float, pair)) for mean, *pair in zip(means, *ends, strict=True)]
    text = f"{means[0]} in layer 1, {means[-1]} in layer {len(means)}, {seeds(len(values))}"
    for what, holds in (("not in", False), ("open in", None)):
        if holds in inside:
            text += f"; {what} {', '.join(f'{i + 1} ({means[i]})' for i, found in enumerate(inside) if found is holds)}"
    return Criterion(claim, text, False if False in inside else None if None in inside else True)


def _picture(measured: dict[str, dict[str, np.ndarray]], kind: str) -> Picture:
    title = {"output": "Size of the stream by layer", "change": "Change by each layer, ω²"}[kind]
    caption = {
        "output": "E‖x_l‖²/d after each layer at initialisation, with lemma 2's bounds for Pre-LN (Xiong et al. 2020).",
        "change": "ω² = E‖N(x′) − N(x)‖²/d around each feed-forward network at initialisation: the representation "
        "collapse of Pre-LN that Xie et al. 2023 describe.",
    }[kind]
    layers = range(1, 1 + next(iter(measured.values()))[kind].shape[1])
    curves = [curve(name, layers, statistics[kind], geometric=True) for name, statistics in measured.items()]
    if kind == "output":
        curves += [
            figures.Curve("1 + l/2", layers, [1 + layer / 2 for layer in layers]),
            figures.Curve("1 + 3l/2", layers, [1 + 3 * layer / 2 for layer in layers]),
        ]
    draw = partial(figures.curves, curves, x_label="layer l", y_label=KINDS[kind], title=title, log_y=True)
    return Picture(title, draw, caption + " Geometric mean over seeds with its 95 % interval.")


class Amplification(Experiment, name="E4"):
    """E‖ΔF‖²/d, the change of a stack's output F when every weight moves by a tenth of its standard deviation."""

    title = "How much a change of the weights changes the output"
    question = "Does the change of the output grow with depth when all weights change a little, as in a first update?"
    source = "the amplification effect of Liu et al. 2020 (Admin, arXiv 2004.08249), theorem 2 and figure 4"
    minutes = 0.3
    depths: Sequence[int] = (2, 4, 8, 16, 32)
    amount = 0.1
    """perturbation relative to the standard deviation of each matrix"""
    make: MakeModel = staticmethod(make_model)

    def __init__(self, settings: ExperimentSettings) -> None:
        super().__init__(settings)
        self.seeds = 3 if settings.quick else 10

    def tasks(self) -> Sequence[Task]:
        return [
            {"placement": placement.label, "depths": list(self.depths), "amount": self.amount, "seed": seed}
            for seed in range(self.seeds)
            for placement in AMPLIFICATION
        ]

    def measure(self, task: Task) -> Measurement:
        (placement,) = [placement for placement in AMPLIFICATION if placement.label == task["placement"]]
        measure = partial(output_change, self.make, placement, amount=task["amount"], seed=task["seed"])
        return {"changes": [measure(depth) for depth in task["depths"]]}

    def conclude(self, results: Sequence[Result]) -> Findings:
        criteria, rows, curves = [], [], []
        for placement, (low, high) in AMPLIFICATION.items():
            chosen = select(results, {"placement": placement.label})
            if not chosen:
                continue
            depths, changes = chosen[0].task["depths"], [result.measured["changes"] for result in chosen]
            slope = exponent(depths, changes)
            reach = f"at most {high:g}" if np.isinf(low) else f"from {low:g} to {high:g}"
            criteria.append(between(f"{placement.label}: the change's log-log slope {reach}", slope, low, high))
            rows.append((placement.label, round(slope.mean, 3), round(slope.low, 3), round(slope.high, 3), reach))
            curves.append(curve(placement.label, depths, changes, geometric=True))
        return Findings(
            criteria,
            [Table("Exponent p of E‖ΔF‖²/d ∝ L^p", ["placement", "p", "95 % from", "to", "accepted"], rows)],
            [_amplification_picture(curves)] if curves else [],
            AMPLIFICATION_REMARKS,
        )


NO_BOUND = float("-inf")
AMPLIFICATION: dict[Placement, tuple[float, float]] = {
    Placement("post"): (0.8, 1.2),
    Placement("pre"): (NO_BOUND, 0.7),
    Placement("pre", "xavier-scaled"): (NO_BOUND, 0.1),
    Placement("deepnorm"): (-0.6, -0.4),
}
"""the exponents that are accepted"""
AMPLIFICATION_REMARKS = (
    "The real mode of E1. W becomes W + 0.1 std(W) · N(0, 1) for all matrices of the stack; embeddings and head stay. "
    "F is the output of the stack, which a norm has made of size √d.",
)


def output_change(make: MakeModel, placement: Placement, depth: int, *, amount: float, seed: int) -> float:
    """E‖ΔF‖²/d after every matrix of the stack moved by `amount` of its standard deviation."""
    model: Any = MODES["real"](make, placement, depth, seed)
    (tokens,) = random_tokens(seed, 1)
    generator = torch.Generator().manual_seed(2_000_003 + seed)
    with torch.no_grad():
        before = model.hidden_states(tokens)
        for weight in model.stack.parameters():
            if weight.dim() == 2:
                weight += amount * weight.std() * torch.randn(weight.shape, generator=generator)
        return _mean_square(model.hidden_states(tokens) - before)


def _amplification_picture(curves: Sequence[figures.Curve]) -> Picture:
    title = "Change of the output when every weight changes by a tenth"
    caption = (
        "E‖ΔF‖²/d against the number of layers, real mode. Geometric mean over seeds with its 95 % interval. After the "
        "amplification effect of Liu et al. 2020."
    )
    draw = partial(figures.curves, curves, x_label="layers L", y_label="E‖ΔF‖²/d", title=title, log_x=True, log_y=True)
    return Picture(title, draw, caption)
