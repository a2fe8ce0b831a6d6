"""Comparison of every registered placement with its reference implementation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from minitransformer.architecture.residual import Residual
from minitransformer.lab.checks import (
    EXACT,
    SINGLE,
    SMALL,
    Check,
    Outcome,
    plain_name,
    redrawn,
    relative,
    shaken,
    small_config,
    tokens_and_probe,
)
from minitransformer.lab.equations import STATEMENTS, Depth, embed, initial_weights, stated_logits, stated_stack
from minitransformer.lab.statements import admin_profile
from minitransformer.lab.subjects import MakeModel
from minitransformer.models.config import ModelConfig

FORMS: Mapping[str, Mapping[str, Depth]] = {
    "decoder": {"stack": Depth(8)},
    "encoder-decoder": {"encoder": Depth(8, other_layers=5), "decoder": Depth(5, other_layers=8, has_memory=True)},
}
"""the stacks of the models that are compared with a second statement: no two constants of theirs are the same"""
WIDTH, STD = 32, 0.1
"""of these models, and of their matrices: where heads have fewer features, norms of a head enlarge what is rounded"""


def form_config(residual: str, form: str, *, published: bool = False, **choices: Any) -> ModelConfig:
    """A model of `FORMS`; where it is `published`, with what its authors made beside the placement."""
    first, *more = (depth.layers for depth in FORMS[form].values())
    own: dict[str, Any] = {
        "d_model": WIDTH,
        "topology": form,
        "num_layers": first,
        **({"num_decoder_layers": more[0]} if more else {}),
    }
    asked = Residual.named(residual).asks_for if published else {}
    return replace(small_config(residual, **own), **{**asked, **choices})


def texts_and_probe(form: str, seed: int) -> tuple[list[Tensor], Tensor]:
    """A text for each stack, of a length of its own, and a direction for the logits of the last."""
    tokens, probe = tokens_and_probe(seed)
    lengths = range(tokens.size(1) - len(FORMS[form]) + 1, tokens.size(1) + 1)
    return [(tokens + length)[:, :length] % SMALL["vocab_size"] for length in lengths], probe


class MissingWeight(KeyError):
    """A weight name that a model lacks."""


class NamedWeights(dict[str, Tensor]):
    """Weights by plain name."""

    def __missing__(self, name: str) -> Tensor:
        raise MissingWeight(name)


def is_stated(make: MakeModel, seed: int, *, residual: str, form: str) -> Outcome:
    """The distance of a placement's models from its `Statement`, by quantity."""
    if residual not in STATEMENTS:
        note = f"{residual!r} has no second statement: minitransformer.lab.equations says how to give one"
        return Outcome(None, note, is_open=True)
    try:
        apart = {"initial weights": _from_initial_weights(make, seed, residual, form)}
        for published in (False, True) if Residual.named(residual).asks_for else (False,):
            apart |= _from_equation(make, seed, residual, form, published=published)
    except MissingWeight as error:
        return Outcome(None, f"the equation has a weight {error}, and the model has not")
    said = [f"{what} {by:.2g} apart" for what, by in apart.items() if by > EXACT]
    return Outcome(max(apart.values()), ", ".join(said))


def _from_initial_weights(make: MakeModel, seed: int, residual: str, form: str) -> float:
    """How far a model's initial weights are from those stated: as published, and by two initialisations."""
    statement, furthest = STATEMENTS[residual], 0.0
    configs = [form_config(residual, form, init=init) for init in ("xavier", "xavier-scaled")]
    inits = [statement.init, *(config.init.name for config in configs)]
    for config, init in zip([form_config(residual, form, published=True), *configs], inits, strict=True):
        model = redrawn(make(config, seed).double(), seed)
        weights = {name: weight.detach() for name, weight in model.named_parameters()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            stated = initial_weights(statement, {name: weights[name].shape for name in weights}, FORMS[form], init)
        furthest = max(furthest, *(relative(weights[name], stated[name]) for name in weights))
    return furthest


def _from_equation(make: MakeModel, seed: int, residual: str, form: str, *, published: bool) -> dict[str, float]:
    """How far logits and the gradients of all weights are from those stated, with weights that are drawn anew."""
    statement = STATEMENTS[residual]
    if published:
        norms = {**statement.attention_norms, **statement.published_norms}
        statement = replace(statement, attention_norms=norms)
    model = shaken(make(form_config(residual, form, published=published), seed).double(), seed, std=STD)
    texts, probe = texts_and_probe(form, seed)
    parameters = {plain_name(name): weight for name, weight in model.named_parameters()}
    weights = NamedWeights({name: weight.detach().clone().requires_grad_() for name, weight in parameters.items()})
    logits, stated = model(*texts), stated_logits(statement, weights, FORMS[form], texts)
    gradients, expected = (
        torch.autograd.grad((output * probe).sum(), list(named.values()), allow_unused=True)
        for output, named in ((logits, parameters), (stated, weights))
    )
    kind = "published " if published else ""
    return {
        f"{kind}logits": relative(logits.detach(), stated.detach()),
        f"{kind}gradients": _gradients_apart(dict(zip(weights, zip(gradients, expected, strict=True), strict=True))),
    }


def _gradients_apart(pairs: Mapping[str, tuple[Tensor | None, Tensor | None]]) -> float:
    """How far gradients are from those stated, by the name of their weight: relative to the largest of their module."""
    modules: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for name, (ours, theirs) in pairs.items():
        if ours is None or theirs is None:
            return math.inf  # with a weight that it has nothing to do with, an equation is another one
        modules[name.rpartition(".")[0]].append((ours.flatten(), theirs.flatten()))
    return max(relative(*map(torch.cat, zip(*found, strict=True))) for found in modules.values())


def is_profiled(make: MakeModel, seed: int, *, form: str) -> Outcome:
    """How far Admin's ω are from `admin_profile` after a look at a batch."""
    model = make(form_config("admin", form), seed).double()
    shaken(model, seed, std=STD)
    texts, _ = texts_and_probe(form, seed)
    model.calibrate(lambda: model(*texts))
    weights = NamedWeights({name: weight.detach() for name, weight in model.named_parameters()})
    furthest, memory = 0.0, None
    for (name, depth), tokens in zip(FORMS[form].items(), texts, strict=True):
        stack = stated_stack(STATEMENTS["admin"], weights, name, depth, memory)
        omegas, memory = admin_profile(embed(tokens, weights), stack)
        found = [branch.weight("omega") for branch in stack.branches]
        furthest = max(furthest, *(relative(ours, omega) for ours, omega in zip(found, omegas, strict=True)))
    return Outcome(furthest)


def stated_checks(residual: str) -> dict[str, Check]:
    """The checks of one placement, by name, for each of `FORMS`."""
    checks = {
        f"{residual}-{form}": Check(
            f"{residual}, {form}, equals the second statement of its equation to 1e-12",
            EXACT,
            partial(is_stated, residual=residual, form=form),
        )
        for form in FORMS
    }
    return checks | {
        f"{residual}-profile-{form}": Check(
            f"{residual}, {form}, calibrates ω as stated a second time, to 1e-6",
            SINGLE,
            partial(is_profiled, form=form),
        )
        for form in FORMS
        if residual == "admin"
    }
