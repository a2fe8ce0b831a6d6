"""E1 and E2: gradient norms at initialisation, as a function of depth and of the layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minitransformer.lab.experiment import (
    Criterion,
    Experiment,
    ExperimentSettings,
    Findings,
    between,
    curve,
    exponent,
    geometric_mean,
    select,
)
from minitransformer.lab.subjects import (
    MODES,
    MakeModel,
    Placement,
    feedforward_outputs,
    loss,
    make_model,
    random_tokens,
    real_config,
)
from minitransformer.reporting import figures
from minitransformer.reporting.statistics import Interval
from minitransformer.reporting.tables import Picture, Table
from minitransformer.tasks.task import Measurement, Result, Task

ACCEPTED: dict[Placement, tuple[float, float]] = {
    Placement("post"): (-0.2, 0.2),
    Placement("pre"): (-0.6, -0.4),
    Placement("pre", "xavier-scaled"): (-0.1, 0.1),
    Placement("deepnorm"): (-0.55, -0.45),
    Placement("keel"): (-1.05, -0.95),
    Placement("residual"): (-0.2, 0.2),
    Placement("peri"): (-0.55, -0.35),
    Placement("lns"): (-0.7, -0.5),
}
"""the exponent p of gradient ∝ L^p that is accepted in the real setting"""
Slopes = Mapping[Placement, Interval]
FIRST_LAYER = "first layer"
NORM = "‖∂loss/∂W₂‖"
THEORY = {Placement("post"): "0", Placement("pre"): "−½"}
"""the exponents that theorem 1 bounds the gradient with"""


class GradientAgainstDepth(Experiment, name="E1"):
    """‖∂loss/∂W₂‖ of the last feed-forward network, for models of different depth; and OLMo 2's first layer."""

    title = "The last layer's gradient against depth"
    question = "How does the gradient of the last feed-forward network at initialisation grow or shrink with depth?"
    source = "theorem 1 and figure 3 of Xiong et al. 2020 (arXiv 2002.04745)"
    minutes = 0.5
    placements: Sequence[Placement] = tuple(ACCEPTED)
    modes: Sequence[str] = ("theory", "real")
    first_layers: Sequence[str] = ("none", "full")
    """OLMo 2's norms of queries and keys"""
    depths: Sequence[int] = (2, 4, 8, 16, 32)
    make: MakeModel = staticmethod(make_model)

    def __init__(self, settings: ExperimentSettings) -> None:
        super().__init__(settings)
        self.seeds = 3 if settings.quick else 10

    def tasks(self) -> Sequence[Task]:
        subjects = [(mode, placement.label) for mode in self.modes for placement in self.placements]
        subjects += [(FIRST_LAYER, f"olmo2, qk_norm {qk_norm}") for qk_norm in self.first_layers]
        return [
            {"mode": mode, "placement": placement, "depths": list(self.depths), "seed": seed}
            for seed in range(self.seeds)
            for mode, placement in subjects
        ]

    def measure(self, task: Task) -> Measurement:
        make, seed = self.make, task["seed"]
        if task["mode"] == FIRST_LAYER:
            qk_norm = task["placement"].split()[-1]
            gradients = [first_gradient(make, qk_norm, depth, seed) for depth in task["depths"]]
            return {"norms": [gradient.norm for gradient in gradients]}
        (placement,) = [placement for placement in ACCEPTED if placement.label == task["placement"]]
        gradients = [last_gradient(make, task["mode"], placement, depth, seed) for depth in task["depths"]]
        return {
            "norms": [gradient.norm for gradient in gradients],
            "of_a_token": [gradient.of_a_token for gradient in gradients],
        }

    def conclude(self, results: Sequence[Result]) -> Findings:
        slopes = {mode: _slopes(results, mode, "norms") for mode in MODES}
        of_a_token = _slopes(results, "real", "of_a_token")
        growth = select(results, {"mode": FIRST_LAYER})
        return Findings(
            [*_slope_criteria(slopes["real"], of_a_token), *_growth_criteria(growth)],
            [_slope_table(slopes["theory"], slopes["real"], of_a_token)],
            [picture for mode in MODES if (picture := _picture(results, mode))] + _growth_pictures(growth),
            REMARKS,
        )


REMARKS = (
    "Both modes: d = 128, batches of 4 × 32 random tokens with random targets out of 128, embeddings N(0, 1), Xavier's "
    "matrices, a linear head of its own with weights N(0, 1/d), the mean cross-entropy as loss, causal attention, no "
    "positions, no biases. Theory mode: one head with W_Q = W_K = 0 and d_ff = d. Real mode: four heads and d_ff = 4d.",
    "Intervals are Student's t at 95 % over seeds. The accepted ranges are of the gradient of all tokens; beside it "
    "stands the slope of one token, the mean over tokens of the gradient that each gives alone.",
    "Only slopes are compared: the scale of the head multiplies all gradients, and ResiDual's output is the sum of two "
    "normalised streams.",
    "Post-LN's slope above 0 does not contradict theorem 1. The slope of one token is 0 there. But the "
    "deeper the model, the more alike its tokens become, and the more their gradients add up. Under ResiDual, "
    "the gradient of one token shrinks with depth, and that of all together does not.",
)


class Gradient(NamedTuple):
    """‖∂loss/∂W₂‖, and the mean over tokens t of ‖∂lossₜ/∂W₂‖, the gradient through one token's own network."""

    norm: float
    of_a_token: float


def last_gradient(make: MakeModel, mode: str, placement: Placement, depth: int, seed: int) -> Gradient:
    """Of the last feed-forward network."""
    return _gradient(MODES[mode](make, placement, depth, seed), layer=-1, seed=seed)


def first_gradient(make: MakeModel, qk_norm: str, depth: int, seed: int) -> Gradient:
    """Of the first feed-forward network under OLMo 2's placement."""
    return _gradient(make(real_config(Placement("olmo2"), depth, qk_norm=qk_norm), seed), layer=0, seed=seed)


def _gradient(model: Any, *, layer: int, seed: int) -> Gradient:
    tokens, targets = random_tokens(seed, 2)
    down = model.stack.blocks[layer].feedforward.down
    passed: dict[str, Tensor] = {}
    down.register_forward_hook(lambda _, inputs, output: passed.update(hidden=inputs[0], output=output))
    logits = model(tokens)
    if not passed:
        return Gradient(0.0, 0.0)  # an idle layer
    # The gradient of W₂ only, Σₜ hₜ δₜᵀ: the backward pass ends there.
    (delta,) = torch.autograd.grad(loss(logits, targets), [passed["output"]])
    hidden, delta = (x.detach().flatten(0, 1) for x in (passed["hidden"], delta))
    of_tokens = hidden.norm(dim=1) * delta.norm(dim=1)
    return Gradient(float((hidden.T @ delta).norm()), float(of_tokens.mean()))


def _norms(results: Sequence[Result], kind: str = "norms") -> tuple[list[int], list[list[float]]]:
    """The depths, and the norms (seeds × depths)."""
    return results[0].task["depths"], [result.measured[kind] for result in results]


def _slopes(results: Sequence[Result], mode: str, kind: str) -> dict[Placement, Interval]:
    """The exponent p of gradient ∝ L^p, of the placements that were measured in this mode."""
    return {
        placement: exponent(*_norms(chosen, kind))
        for placement in ACCEPTED
        if (chosen := select(results, {"mode": mode, "placement": placement.label}))
    }


def _slope_criteria(slopes: Slopes, of_a_token: Slopes) -> list[Criterion]:
    return [
        between(
            f"{placement.label}: the gradient's log-log slope from {low:g} to {high:g}",
            slopes[placement],
            low,
            high,
            note=f"; of one token {of_a_token[placement]}",
        )
        for placement, (low, high) in ACCEPTED.items()
        if placement in slopes
    ]


def _slope_table(theory: Slopes, real: Slopes, of_a_token: Slopes) -> Table:
    half, accepted = "half of its 95 % interval", "accepted in real mode"
    columns = ["placement", "theory mode", half, "real mode", half, "one token, real mode", half, accepted, "theorem 1"]
    rows = [
        (
            placement.label,
            *(cell for slopes in (theory, real, of_a_token) for cell in _cells(slopes.get(placement))),
            f"{low:g} to {high:g}",
            THEORY.get(placement),
        )
        for placement, (low, high) in ACCEPTED.items()
        if placement in theory or placement in real
    ]
    return Table("Exponent p of ‖∂loss/∂W₂‖ ∝ L^p, last feed-forward network", columns, rows)


def _cells(slope: Interval | None) -> tuple[float | None, float | None]:
    return (None, None) if slope is None else (round(slope.mean, 3), round(slope.high - slope.mean, 3))


def _growth_criteria(results: Sequence[Result]) -> list[Criterion]:
    """What is known of OLMo 2's first layer."""
    criteria = []
    for qk_norm, low, high in (("none", 10.0, float("inf")), ("full", 0.5, 2.0)):
        chosen = select(results, {"placement": f"olmo2, qk_norm {qk_norm}"})
        if not chosen:
            continue
        depths, norms = _norms(chosen)
        growth = geometric_mean([row[-1] / row[0] for row in norms])
        reach = f"more than {low:g} ×" if high == float("inf") else f"within {high:g} ×"
        claim = (
            f"olmo2, qk_norm {qk_norm}: the first layer's gradient grows {reach} from L = {depths[0]} to {depths[-1]}"
        )
        criteria.append(between(claim, growth, low, high))
    return criteria


def _picture(results: Sequence[Result], mode: str) -> Picture | None:
    curves = [
        curve(placement.label, *_norms(chosen), geometric=True)
        for placement in ACCEPTED
        if (chosen := select(results, {"mode": mode, "placement": placement.label}))
    ]
    if not curves:
        return None
    caption = (
        f"Gradient of W₂ of the last feed-forward network against the number of layers, {mode} mode. Geometric mean "
        "over seeds with its 95 % interval. After theorem 1 and figure 3 of Xiong et al. 2020."
    )
    return _drawn(f"Gradient of the last layer, {mode} mode", curves, caption)


def _growth_pictures(results: Sequence[Result]) -> list[Picture]:
    names = list(dict.fromkeys(result.task["placement"] for result in results))
    curves = [curve(name, *_norms(select(results, {"placement": name})), geometric=True) for name in names]
    caption = (
        "Gradient of W₂ of the first feed-forward network under OLMo 2's placement, with and without the norm of "
        "queries and keys. Geometric mean over seeds with its 95 % interval."
    )
    return [_drawn("OLMo 2: gradient of the first layer", curves, caption)] if curves else []


def _drawn(title: str, curves: Sequence[figures.Curve], caption: str) -> Picture:
    draw = partial(figures.curves, curves, x_label="layers L", y_label=NORM, title=title, log_x=True, log_y=True)
    return Picture(title, draw, caption)


class GradientProfile(Experiment, name="E2"):
    """‖∂loss/∂W₂‖ of every layer of an encoder-decoder: the mean of norms over batches, and the norm of the mean."""

    title = "The gradient's profile in an encoder-decoder"
    question = "How does the gradient at initialisation differ from layer to layer of an encoder and of a decoder?"
    source = "figure 3 of Xiong et al. 2020 (arXiv 2002.04745)"
    minutes = 2.0
    placements: Sequence[str] = ("post", "pre", "residual")
    make: MakeModel = staticmethod(make_model)

    def __init__(self, settings: ExperimentSettings) -> None:
        super().__init__(settings)
        self.seeds = 10 if settings.quick else 40  # at 18 layers, ten leave an interval wider than what is accepted
        self.depths: Sequence[int] = (6, 12, 18)
        self.batches = 2 if settings.quick else 4

    def tasks(self) -> Sequence[Task]:
        return [
            {"placement": placement, "num_layers": depth, "batches": self.batches, "seed": seed}
            for depth in sorted(self.depths, reverse=True)
            for placement in self.placements
            for seed in range(self.seeds)
        ]

    def measure(self, task: Task) -> Measurement:
        return gradient_profile(self.make, task["placement"], task["num_layers"], task["batches"], task["seed"])

    def conclude(self, results: Sequence[Result]) -> Findings:
        ratios = [
            (placement, depth, side, kind, ratio)
            for placement in self.placements
            for depth in self.depths
            for side in ("encoder", "decoder")
            for kind in KINDS
            if (ratio := _last_over_first(results, placement, depth, side, kind)) is not None
        ]
        rows = [(*names, round(r.mean, 3), round(r.low, 3), round(r.high, 3)) for *names, r in ratios]
        columns = ["placement", "layers", "stack", "norm", "last layer / first", "95 % from", "to"]
        return Findings(
            [
                between(claim.format(where=f"L = {depth}, {kind}"), ratio, low, high)
                for placement, depth, side, kind, ratio in ratios
                for claim, low, high in profile_claims(placement, depth, side)
            ],
            [Table("Gradient of the last layer's W₂ over that of the first", columns, rows)],
            [_profile_picture(results, depth) for depth in self.depths if select(results, {"num_layers": depth})],
            PROFILE_REMARKS,
        )


KINDS = {"mean of norms": "mean_of_norms", "norm of the mean": "norm_of_mean"}
PROFILE_REMARKS = (
    "Encoder-decoders in the real mode of E1, with L layers on each side. Over batches, the mean of norms says how "
    "large a gradient is, and the norm of the mean, which is Xiong's, how much of it batches have in common.",
    "Post-LN's 2^((L−1)/2): cross-attention reads a memory whose tokens are much alike and so adds about the variance "
    "of x; the norm after it divides by √2, and the branch's own gradient goes to the encoder. Self-attention and the "
    "feed-forward network send back as much as their norms take.",
)


def profile_claims(placement: str, depth: int, side: str) -> list[tuple[str, float, float]]:
    """What is known of last / first: a claim, and the range of the ratio."""
    power = 2 ** ((depth - 1) / 2)
    factor = 1.5
    exponential = f"post decoder, {{where}}: within {factor:g} × of 2^((L−1)/2) = {power:.3g}"
    known = {
        ("post", "decoder"): (exponential, power / factor, power * factor),
        ("post", "encoder"): ("post encoder, {where}: from 0.7 to 1.4", 0.7, 1.4),
        ("pre", "decoder"): ("pre decoder, {where}: from 0.3 to 1", 0.3, 1.0),
    }
    claims = [known[placement, side]] if (placement, side) in known else []
    if (placement, side, depth) == ("residual", "decoder", 18):
        claims.append(("residual decoder, {where}: at most 10", 0.0, 10.0))
    return claims


def gradient_profile(make: MakeModel, placement: str, num_layers: int, batches: int, seed: int) -> Measurement:
    """For the encoder and the decoder, by layer: the mean over batches of ‖∂loss/∂W₂‖, and the norm of the mean."""
    config = real_config(Placement(placement), num_layers, topology="encoder-decoder")
    model: Any = make(config, seed)
    stacks = {side: feedforward_outputs(getattr(model, side)) for side in ("encoder", "decoder")}
    weights = [weight for stack in stacks.values() for weight in stack]
    texts = torch.stack(random_tokens(seed, 3 * batches)).unflatten(0, (batches, 3))
    norms = np.zeros(len(weights))
    means = [torch.zeros_like(weight) for weight in weights]
    for source, inputs, targets in texts:
        gradients = torch.autograd.grad(loss(model(source, inputs), targets), weights)
        norms += [float(gradient.norm()) / batches for gradient in gradients]
        for mean, gradient in zip(means, gradients, strict=True):
            mean += gradient / batches
    of_means = [float(mean.norm()) for mean in means]
    return {
        side: {
            "mean_of_norms": norms[start : start + num_layers].tolist(),
            "norm_of_mean": of_means[start : start + num_layers],
        }
        for side, start in (("encoder", 0), ("decoder", num_layers))
    }


def _last_over_first(results: Sequence[Result], placement: str, depth: int, side: str, kind: str) -> Interval | None:
    chosen = select(results, {"placement": placement, "num_layers": depth})
    profiles = [result.measured[side][KINDS[kind]] for result in chosen]
    return geometric_mean([profile[-1] / profile[0] for profile in profiles]) if profiles else None


def _profile_picture(results: Sequence[Result], depth: int) -> Picture:
    chosen = select(results, {"num_layers": depth})
    names = list(dict.fromkeys(result.task["placement"] for result in chosen))
    curves = [
        curve(
            f"{name}, {side}",
            range(1, depth + 1),
            [result.measured[side]["mean_of_norms"] for result in select(chosen, {"placement": name})],
            geometric=True,
        )
        for name in names
        for side in ("encoder", "decoder")
    ]
    title = f"Gradient by layer, {depth} + {depth} layers"
    caption = (
        "Gradient of W₂ of each layer's feed-forward network, the mean of its norms over batches; geometric mean over "
        "seeds with its 95 % interval. After figure 3 of Xiong et al. 2020."
    )
    draw = partial(figures.curves, curves, x_label="layer", y_label=NORM, title=title, log_y=True)
    return Picture(title, draw, caption)
