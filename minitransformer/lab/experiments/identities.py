"""E0: identities between placements, and every placement compared with a reference implementation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer.architecture.residual import DeepNorm, Residual
from minitransformer.lab.checks import (
    EXACT,
    SMALL,
    Check,
    Outcome,
    plain_name,
    redrawn,
    relative,
    small_config,
    small_model,
    tokens_and_probe,
)
from minitransformer.lab.experiment import Criterion, Experiment, ExperimentSettings, Findings, select
from minitransformer.lab.stated import stated_checks
from minitransformer.lab.subjects import MakeModel, make_model
from minitransformer.tasks.task import Measurement, Result, Task


class Identities(Experiment, name="E0"):
    """Special cases that must be equal, numbers that papers print, and an independent statement of every equation."""

    title = "Identities of the placements"
    question = "Is every placement what its equation says, where that can be checked exactly?"
    source = (
        "the equations of the papers that the placements name, and 2203.00555 on arXiv (DeepNorm), figure 2; each is "
        "stated a second time in minitransformer/lab/statements.py"
    )
    minutes = 0.4
    make: MakeModel = staticmethod(make_model)

    def __init__(self, settings: ExperimentSettings) -> None:
        super().__init__(settings)
        self.seeds = 1 if settings.quick else 5
        self.placements: Sequence[str] = tuple(Residual.registry)

    def tasks(self) -> Sequence[Task]:
        return [{"check": name, "seed": seed} for name in checks_of(self.placements) for seed in range(self.seeds)]

    def measure(self, task: Task) -> Measurement:
        outcome = all_checks()[task["check"]].measure(self.make, task["seed"])
        return {"distance": outcome.distance, "note": outcome.note, "open": outcome.is_open}

    def conclude(self, results: Sequence[Result]) -> Findings:
        checks = all_checks()
        chosen = {name: select(results, {"check": name}) for name in checks}
        return Findings([_judge(checks[name], found) for name, found in chosen.items() if found], remarks=REMARKS)


REMARKS = (
    "A second statement of an equation takes from a model its weights alone, by their names, and computes attention, "
    "feed-forward networks and norms itself: for a decoder of 8 layers, and for an encoder of 8 beside a decoder of 5. "
    "Compared are logits, gradients of all weights, and initial weights by three initialisations; attention has the "
    "norms that belong to the equation, and then those that its authors gave it too. A placement without a second "
    "statement is left open.",
    "Distances of logits and gradients are the largest difference over the largest value, in float64, with weights and "
    "gains drawn anew, so that no gain is 1 and attention is not uniform. The worst of all seeds is shown.",
    "DeepNorm's α is what connections were seen to multiply x with, and β the ratio of its initial weights to those "
    "that Post-LN has from the same seed.",
)


def _judge(check: Check, results: Sequence[Result]) -> Criterion:
    distances = [result.measured["distance"] for result in results]
    notes = list(dict.fromkeys(result.measured["note"] for result in results if result.measured["note"]))
    if None in distances:
        is_open = any(result.measured["open"] for result in results)
        return Criterion(check.claim, "; ".join(notes), None if is_open else False)
    return Criterion(check.claim, "; ".join(notes) or f"{max(distances):.2g} apart", max(distances) <= check.tolerance)


def with_weights_of(source: nn.Module, target: nn.Module) -> nn.Module | None:
    """`target` with the weights of `source` by name; None if it has one that `source` lacks."""
    weights = {plain_name(name): weight for name, weight in source.state_dict().items()}
    names = {name: plain_name(name) for name in target.state_dict()}
    if not set(names.values()) <= set(weights):
        return None
    target.load_state_dict({name: weights[plain] for name, plain in names.items()})
    return target


def distance(first: nn.Module, second: nn.Module | None, seed: int) -> Outcome:
    """The distance between the logits of two models, and between the gradients of their common weights."""
    if second is None:
        return Outcome(None, "the second model has weights that the first lacks")
    tokens, probe = tokens_and_probe(seed)
    outputs, gradients = [], []
    for model in (first, second):
        logits = model(tokens)
        named = {plain_name(name): weight for name, weight in model.named_parameters()}
        found = torch.autograd.grad((logits * probe).sum(), list(named.values()), allow_unused=True)
        outputs.append(logits.detach())
        gradients.append({name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None})
    shared = [name for name in gradients[0] if name in gradients[1]]
    return Outcome(
        max(relative(*outputs), *(relative(gradients[0][name], gradients[1][name]) for name in shared)),
    )


def _deepnorm_is_post(make: MakeModel, seed: int) -> Outcome:
    deep, post = (make(small_config(name), seed) for name in ("deepnorm", "post"))
    for connection in deep.modules():
        if isinstance(connection, DeepNorm):
            connection.alpha = connection.beta = 1.0
    return distance(redrawn(deep, seed).double(), redrawn(post, seed).double(), seed)


def _mix_is_pre(make: MakeModel, seed: int) -> Outcome:
    model, pre = small_model(make, "mix", seed), small_model(make, "pre", seed)
    for connection, other in zip(model.stack.connections, pre.stack.connections, strict=True):
        if connection.place.layer == 0:
            connection.connection = deepcopy(other)
    return distance(model, with_weights_of(model, pre), seed)


def _lns_is_pre(make: MakeModel, seed: int) -> Outcome:
    model = small_model(make, "lns", seed, num_layers=1)
    return distance(model, with_weights_of(model, small_model(make, "pre", seed, num_layers=1)), seed)


def _peri_is_pre(make: MakeModel, seed: int) -> Outcome:
    model = small_model(make, "peri", seed)
    model.stack.embedding_norm = nn.Identity()
    for connection in model.stack.connections:
        connection.output_norm = nn.Identity()
    return distance(model, with_weights_of(model, small_model(make, "pre", seed)), seed)


def _residual_runs_post(make: MakeModel, seed: int) -> Outcome:
    dual = small_model(make, "residual", seed)
    post = with_weights_of(dual, small_model(make, "post", seed))
    if post is None:
        return Outcome(None, "Post-LN has weights that ResiDual lacks")
    tokens, _ = tokens_and_probe(seed)
    streams = [stream_states(model.float(), tokens) for model in (dual, post)]
    different = sum(not torch.equal(x, y) for x, y in zip(*streams, strict=True))
    return Outcome(float(different), f"{different} of {len(streams[0])} states differ in a bit of float32")


def stream_states(model: Any, tokens: Tensor) -> list[Tensor]:
    """x after every connection."""
    found: list[Tensor] = []

    def record(connection: Any, _: Any, stream: Any) -> None:
        found.append(model.stack.shared.state(stream))

    for connection in model.stack.connections:
        connection.register_forward_hook(record)
    with torch.no_grad():
        model(tokens)
    return found


ETAS = (1.0, 0.1, 0.05)


def _eta_changes_nothing(make: MakeModel, seed: int, *, eps: float | None = None) -> Outcome:
    """`eps` replaces that of the last norm."""
    tokens, _ = tokens_and_probe(seed)
    logits = []
    for eta in ETAS:
        model = small_model(make, "residual", seed)
        for part in (model.stack.shared, *model.stack.connections):
            part.eta = eta
        if eps is not None:
            model.stack.final_norm.eps = eps
        logits.append(model(tokens).detach())
    return Outcome(max(relative(other, logits[0]) for other in logits[1:]))


@dataclass(frozen=True)
class Spot:
    """Constants that DeepNorm's formulas give for some stack of a model, to four decimals."""

    stack: str
    alpha: float
    beta: float
    choices: Mapping[str, Any]


DEEP = {"num_layers": 100}
BOTH = {"topology": "encoder-decoder", "num_layers": 12, "num_decoder_layers": 6}
SPOTS = (
    Spot("stack", 3.7606, 0.1880, {"topology": "encoder", **DEEP}),
    Spot("stack", 3.7606, 0.1880, {"topology": "decoder", **DEEP}),
    Spot("encoder", 1.6862, 0.4179, BOTH),
    Spot("decoder", 2.0598, 0.3433, BOTH),
)
ROUNDED = 6e-5


def _deepnorm_constants(make: MakeModel, seed: int) -> Outcome:
    furthest, notes = 0.0, []
    for spot in SPOTS:
        deep, post = (make(small_config(name, **spot.choices), seed) for name in ("deepnorm", "post"))
        alphas, betas = seen_alphas(getattr(deep, spot.stack)), list(seen_gains(deep, post, spot.stack))
        furthest = max(furthest, *(abs(alpha - spot.alpha) for alpha in alphas), *(abs(b - spot.beta) for b in betas))
        notes.append(f"{spot.choices['topology']}'s {spot.stack} {alphas[0]:.4f}/{betas[0]:.4f}")
    return Outcome(furthest, f"α/β {', '.join(notes)}; at most {furthest:.1g} apart")


def seen_alphas(stack: Any) -> list[float]:
    """The factor of x in each connection, from the input of its norm with a zero sublayer."""
    found = []

    def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(float(inputs[0].mean()))

    for connection in stack.connections:
        with connection.norm.register_forward_pre_hook(record), torch.no_grad():
            connection(torch.ones(1, 1, SMALL["d_model"]), torch.zeros_like)
    return found


def seen_gains(model: nn.Module, plain: nn.Module, stack: str) -> Iterator[float]:
    """The ratio of initial weights to those of a model with the same seed and no gains, except for queries and keys."""
    others = dict(plain.named_modules())
    for name, module in model.named_modules():
        if name.startswith(stack) and isinstance(module, nn.Linear) and not name.endswith(("query", "key")):
            yield float((module.weight / others[name].weight).detach().median())


CHECKS = {
    "deepnorm-post": Check(
        "DeepNorm with α = β = 1 is Post-LN, initial weights, values and gradients", EXACT, _deepnorm_is_post
    ),
    "mix-pre": Check("Mix-LN with Pre-LN in its first quarter too is Pre-LN", EXACT, _mix_is_pre),
    "lns-pre": Check("LayerNorm scaling with l = 1 is Pre-LN", EXACT, _lns_is_pre),
    "peri-pre": Check("Peri-LN with identities for its other norms is Pre-LN", EXACT, _peri_is_pre),
    "residual-post": Check("ResiDual's x stream is Post-LN's, bit for bit", 0.0, _residual_runs_post),
    "eta": Check(
        "ResiDual's logits agree for η in 1, 0.1, 0.05 to 1e-4, which eps of the last norm explains",
        1e-4,
        _eta_changes_nothing,
    ),
    "eta-exact": Check(
        "ResiDual's logits agree for η in 1, 0.1, 0.05 to 1e-12 without that eps",
        EXACT,
        partial(_eta_changes_nothing, eps=0.0),
    ),
    "deepnorm-constants": Check(
        "DeepNorm's α/β are 3.7606/0.1880 in 100 layers, 1.6862/0.4179 and 2.0598/0.3433 in 12 + 6",
        ROUNDED,
        _deepnorm_constants,
    ),
}


def all_checks() -> dict[str, Check]:
    """`CHECKS`, and the comparison of every registered placement with its reference implementation."""
    return checks_of(Residual.registry)


def checks_of(placements: Iterable[str]) -> dict[str, Check]:
    """The checks of `placements`, and `CHECKS`, which cover several."""
    return CHECKS | {name: check for residual in placements for name, check in stated_checks(residual).items()}
