"""E0: identities between placements, and the equations themselves, stated a second time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minitransformer.architecture.norms import Norm
from minitransformer.architecture.residual import DeepNorm, ResiDual
from minitransformer.lab.experiment import Criterion, Experiment, Findings, Measurement, Result, Settings, Task, select
from minitransformer.lab.subjects import MakeModel, Placement, make_model, real_config
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model

SMALL: dict[str, Any] = {"d_model": 16, "vocab_size": 11, "context_length": 8}
LAYERS = 4
"""as many as Mix-LN needs for a layer that is Post-LN"""
EXACT = 1e-12
"""apart in float64, relative to the largest value"""


@dataclass(frozen=True)
class Outcome:
    """How far from exact something is; None where the models cannot be compared, for the reason in `note`."""

    distance: float | None
    note: str = ""


@dataclass(frozen=True)
class Check:
    """A claim that holds if the distance is at most `tolerance`, for models from any maker and seed."""

    claim: str
    tolerance: float
    measure: Callable[[MakeModel, int], Outcome]


class Identities(Experiment, name="E0"):
    """Special cases that must be equal, numbers that papers print, and an independent statement of three equations."""

    title = "Identities of the placements"
    question = "Is every placement what its equation says, where that can be checked exactly?"
    source = (
        "the equations of 1706.03762, 2002.04745, 2203.00555 (DeepNorm, figure 2), 2304.14802 (ResiDual), 2412.13795 "
        "(Mix-LN), 2502.05795 (LayerNorm scaling) and 2502.02732 (Peri-LN) on arXiv"
    )
    minutes = 0.1
    make: MakeModel = staticmethod(make_model)

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.seeds = 1 if settings.quick else 5

    def tasks(self) -> Sequence[Task]:
        return [{"check": name, "seed": seed} for name in CHECKS for seed in range(self.seeds)]

    def measure(self, task: Task) -> Measurement:
        outcome = CHECKS[task["check"]].measure(self.make, task["seed"])
        return {"distance": outcome.distance, "note": outcome.note}

    def conclude(self, results: Sequence[Result]) -> Findings:
        chosen = {name: select(results, {"check": name}) for name in CHECKS}
        return Findings([_judge(CHECKS[name], found) for name, found in chosen.items() if found], remarks=REMARKS)


REMARKS = (
    "Distances of logits and gradients are the largest difference over the largest value, in float64, with weights and "
    "gains drawn anew, so that no gain is 1 and attention is not uniform. The worst of all seeds is shown.",
    "DeepNorm's α is what connections were seen to multiply x with, and β the ratio of its initial weights to those "
    "that Post-LN has from the same seed.",
)


def _judge(check: Check, results: Sequence[Result]) -> Criterion:
    distances = [result.measured["distance"] for result in results]
    notes = list(dict.fromkeys(result.measured["note"] for result in results if result.measured["note"]))
    if None in distances:
        return Criterion(check.claim, "; ".join(notes), False)
    return Criterion(check.claim, "; ".join(notes) or f"{max(distances):.2g} apart", max(distances) <= check.tolerance)


def small_config(residual: str, **choices: Any) -> ModelConfig:
    return real_config(Placement(residual), **{"num_layers": LAYERS} | SMALL | choices)


def small_model(make: MakeModel, residual: str, seed: int, **choices: Any) -> Any:
    """A decoder for identities, in float64, with weights that are drawn anew: see `shaken`."""
    return shaken(make(small_config(residual, **choices), seed).double(), seed)


@torch.no_grad()
def shaken(model: nn.Module, seed: int) -> nn.Module:
    """The model with matrices N(0, 0.3²) and gains N(1, 0.3²)."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        draw = 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.copy_(draw + 1 if weight.dim() == 1 else draw)
    return model


def tokens_and_probe(seed: int) -> tuple[Tensor, Tensor]:
    """Tokens, and a random direction for the logits: gradients are those of their product."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(SMALL["vocab_size"], (2, SMALL["context_length"]), generator=generator)
    return tokens, torch.randn(*tokens.shape, SMALL["vocab_size"], generator=generator, dtype=torch.float64)


def with_weights_of(source: nn.Module, target: nn.Module) -> nn.Module | None:
    """`target` with the weights of `source` by name; None if it has one that `source` lacks."""
    weights = {_plain(name): weight for name, weight in source.state_dict().items()}
    names = {name: _plain(name) for name in target.state_dict()}
    if not set(names.values()) <= set(weights):
        return None
    target.load_state_dict({name: weights[plain] for name, plain in names.items()})
    return target


def _plain(name: str) -> str:
    # Mixed placements hold the placement of their layer as `connection`.
    return name.replace(".connection.", ".")


def distance(first: nn.Module, second: nn.Module | None, seed: int) -> Outcome:
    """Between the logits of two models, and between the gradients of the weights that both have."""
    if second is None:
        return Outcome(None, "the second model has weights that the first lacks")
    tokens, probe = tokens_and_probe(seed)
    outputs, gradients = [], []
    for model in (first, second):
        logits = model(tokens)
        named = {_plain(name): weight for name, weight in model.named_parameters()}
        found = torch.autograd.grad((logits * probe).sum(), list(named.values()), allow_unused=True)
        outputs.append(logits.detach())
        gradients.append({name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None})
    shared = [name for name in gradients[0] if name in gradients[1]]
    return Outcome(
        max(relative(*outputs), *(relative(gradients[0][name], gradients[1][name]) for name in shared)),
    )


def relative(first: Tensor, second: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((first - second).abs().max() / second.abs().max())


def _deepnorm_is_post(make: MakeModel, seed: int) -> Outcome:
    deep, post = (make(small_config(name), seed) for name in ("deepnorm", "post"))
    for connection in deep.modules():
        if isinstance(connection, DeepNorm):
            connection.alpha = connection.beta = 1.0
    return distance(redrawn(deep, seed).double(), redrawn(post, seed).double(), seed)


def redrawn(model: Model, seed: int) -> Model:
    """The model with the initial weights that its placement asks for now."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialise()
    return model


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
    streams = [states(model.float(), tokens) for model in (dual, post)]
    different = sum(not torch.equal(x, y) for x, y in zip(*streams, strict=True))
    return Outcome(float(different), f"{different} of {len(streams[0])} states differ in a bit of float32")


def states(model: Any, tokens: Tensor) -> list[Tensor]:
    """x after every connection."""
    found: list[Tensor] = []

    def listen(connection: Any, _: Any, stream: Any) -> None:
        found.append(connection.state(stream))

    for connection in model.stack.connections:
        connection.register_forward_hook(listen)
    with torch.no_grad():
        model(tokens)
    return found


ETAS = (1.0, 0.1, 0.05)


def _eta_changes_nothing(make: MakeModel, seed: int, *, eps: float | None = None) -> Outcome:
    """With `eps`, in place of that of the last norm."""
    tokens, _ = tokens_and_probe(seed)
    logits = []
    for eta in ETAS:
        model = small_model(make, "residual", seed)
        model.stack.residual = type("ResiDualWithEta", (ResiDual,), {"eta": eta})
        for connection in model.stack.connections:
            connection.eta = eta
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
        alphas, betas = seen_alphas(getattr(deep, spot.stack)), seen_gains(deep, post, spot.stack)
        furthest = max(furthest, *(abs(alpha - spot.alpha) for alpha in alphas), *(abs(b - spot.beta) for b in betas))
        notes.append(f"{spot.choices['topology']}'s {spot.stack} {alphas[0]:.4f}/{betas[0]:.4f}")
    return Outcome(furthest, f"α/β {', '.join(notes)}; at most {furthest:.1g} apart")


def seen_alphas(stack: Any) -> list[float]:
    """What each connection multiplies x with, from what its norm is given when the sublayer is silent."""
    found = []

    def listen(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(float(inputs[0].mean()))

    for connection in stack.connections:
        with connection.norm.register_forward_pre_hook(listen), torch.no_grad():
            connection(torch.ones(1, 1, SMALL["d_model"]), torch.zeros_like)
    return found


SCORES = ("query", "key")


def seen_gains(model: nn.Module, plain: nn.Module, stack: str) -> list[float]:
    """The ratio of initial weights to those of a model with the same draws and no gains, but for queries and keys."""
    return list(_ratios(model, plain, stack, lambda name: not name.endswith(SCORES)))


def _ratios(model: nn.Module, plain: nn.Module, stack: str, wanted: Callable[[str], bool]) -> Iterator[float]:
    others = dict(plain.named_modules())
    for name, module in model.named_modules():
        if name.startswith(stack) and isinstance(module, nn.Linear) and wanted(name):
            yield float((module.weight / others[name].weight).detach().median())


def _scores_keep_gain_one(make: MakeModel, seed: int) -> Outcome:
    deep, post = (make(small_config(name, **BOTH), seed) for name in ("deepnorm", "post"))
    ratios = [
        ratio
        for stack in ("encoder", "decoder")
        for ratio in _ratios(deep, post, stack, lambda name: name.endswith(SCORES))
    ]
    furthest = max(abs(ratio - 1) for ratio in ratios)
    return Outcome(furthest, f"gains of {len(ratios)} matrices, at most {furthest:.1g} from 1")


FINAL_NORMS = {
    "post": 0,
    "pre": 1,
    "sandwich": 1,
    "peri": 1,
    "olmo2": 1,
    "deepnorm": 0,
    "admin": 0,
    "b2t": 0,
    "residual": 1,
    "mix": 1,
    "lns": 1,
    "hybrid": 1,
    "hybrid-star": 1,
    "siamese": 3,
    "keel": 0,
    "none": 0,
}
"""how many norms the equation of each placement has after the last sublayer's own connection"""


def _final_norms(make: MakeModel, seed: int) -> Outcome:
    wrong = {
        residual: found
        for residual, expected in FINAL_NORMS.items()
        if (found := final_norms(small_model(make, residual, seed), seed)) != expected
    }
    said = [f"{name} has {found} in place of {FINAL_NORMS[name]}" for name, found in wrong.items()]
    return Outcome(float(len(wrong)), ", ".join(said) or f"right in all {len(FINAL_NORMS)} placements")


def final_norms(model: Any, seed: int) -> int:
    """How many norms are called after the last connection, before the head."""
    calls: list[nn.Module] = []

    def listen(module: nn.Module, *_: Any) -> None:
        calls.append(module)

    last = model.stack.connections[-1]
    for module in model.modules():
        if isinstance(module, Norm) or module is last:
            module.register_forward_hook(listen)
    with torch.no_grad():
        model(tokens_and_probe(seed)[0])
    return len(calls) - 1 - calls.index(last)


# The second statement: three equations in plain torch, with nothing from the classes that it is compared with.

Weights = Mapping[str, Tensor]


def draw_weights(residual: str, seed: int) -> dict[str, Tensor]:
    """The weights of a small decoder by the names of its checkpoint, in float64, for its gradients too."""
    d, vocab = SMALL["d_model"], SMALL["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"embedding.table.weight": (vocab, d), "head.weight": (vocab, d)}
    for layer in range(LAYERS):
        block = f"stack.blocks.{layer}"
        shapes |= {f"{block}.attention.{name}.weight": (d, d) for name in ("query", "key", "value", "output")}
        shapes |= {f"{block}.feedforward.up.weight": (4 * d, d), f"{block}.feedforward.down.weight": (d, 4 * d)}
        shapes |= {f"{block}.{sublayer}_residual.norm.weight": (d,) for sublayer in ("attention", "feedforward")}
    if residual != "post":
        shapes["stack.final_norm.weight"] = (d,)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        draw = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        weights[name] = (draw + 1 if len(shape) == 1 else draw).requires_grad_()
    return weights


def stated_logits(residual: str, weights: Weights, tokens: Tensor) -> Tensor:
    """The logits of a small decoder, as the papers write them."""
    x = weights["embedding.table.weight"][tokens] * SMALL["d_model"] ** 0.5
    y = x
    for layer in range(LAYERS):
        block = f"stack.blocks.{layer}"
        for sublayer, f in (("attention", attention), ("feedforward", feedforward)):
            gain = weights[f"{block}.{sublayer}_residual.norm.weight"]
            if residual == "post":
                x = layer_norm(x + f(x, weights, block), gain)
            elif residual == "pre":
                x = x + f(layer_norm(x, gain), weights, block)
            else:
                o = f(x, weights, block)
                x, y = layer_norm(x + o, gain), y + o
    if residual == "pre":
        x = layer_norm(x, weights["stack.final_norm.weight"])
    elif residual == "residual":
        x = x + layer_norm(y, weights["stack.final_norm.weight"], eps=1e-7)
    return x @ weights["head.weight"].T


def layer_norm(x: Tensor, gain: Tensor, eps: float = 1e-5) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * gain


def attention(x: Tensor, weights: Weights, block: str) -> Tensor:
    heads, (_, length, d) = 4, x.shape
    q, k, v = (x @ weights[f"{block}.attention.{name}.weight"].T for name in ("query", "key", "value"))
    outputs = []
    for head in range(heads):
        part = slice(head * d // heads, (head + 1) * d // heads)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / (d / heads) ** 0.5
        past = torch.ones(length, length).tril().bool()
        outputs.append(scores.masked_fill(~past, float("-inf")).softmax(-1) @ v[..., part])
    return torch.cat(outputs, -1) @ weights[f"{block}.attention.output.weight"].T


def feedforward(x: Tensor, weights: Weights, block: str) -> Tensor:
    hidden = (x @ weights[f"{block}.feedforward.up.weight"].T).clamp(min=0)
    return hidden @ weights[f"{block}.feedforward.down.weight"].T


def _is_its_equation(make: MakeModel, seed: int, *, residual: str) -> Outcome:
    weights = draw_weights(residual, seed)
    model = small_model(make, residual, seed)
    loaded = model.load_state_dict(weights, strict=False)
    if loaded.missing_keys or loaded.unexpected_keys:
        extra, lacking = (", ".join(names) or "none" for names in (loaded.missing_keys, loaded.unexpected_keys))
        return Outcome(None, f"weights that the equation has not: {extra}; that the model has not: {lacking}")
    tokens, probe = tokens_and_probe(seed)
    logits, stated = model(tokens), stated_logits(residual, weights, tokens)
    parameters = dict(model.named_parameters())
    ours = [parameters[name] for name in weights]
    gradients = torch.autograd.grad((logits * probe).sum(), ours, materialize_grads=True)
    expected = torch.autograd.grad((stated * probe).sum(), list(weights.values()))
    pairs = zip((logits.detach(), *gradients), (stated.detach(), *expected), strict=True)
    return Outcome(max(relative(first, second) for first, second in pairs))


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
    "deepnorm-scores": Check("DeepNorm leaves queries and keys as they are", 1e-6, _scores_keep_gain_one),
    "final-norms": Check("exactly one final norm where there should be one, and no other", 0.0, _final_norms),
} | {
    f"{residual}-equation": Check(
        f"{title} equals an independent statement of its equation, values and gradients, to 1e-12",
        EXACT,
        partial(_is_its_equation, residual=residual),
    )
    for residual, title in (("post", "Post-LN"), ("pre", "Pre-LN"), ("residual", "ResiDual"))
}
