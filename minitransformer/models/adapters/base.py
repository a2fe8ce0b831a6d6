"""The interface of adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from torch import nn

from minitransformer.architecture.embeddings import ClassificationHead
from minitransformer.errors import UserError
from minitransformer.registry import Registered

M = TypeVar("M", bound=nn.Module)


class Adapter(Registered, kind="adapter"):
    """What is trained in place of a model's own weights, which stay those of its base."""

    learning_rate: ClassVar[float]
    """peak learning rate of a fine-tune, unless a flag says otherwise"""
    merges: ClassVar[bool] = True
    """whether the weights of the base can take it in"""

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def applied(self, model: M) -> M:
        """`model`, newly made, in which only the adapter is trained; raises `UserError` if that is impossible."""
        raise NotImplementedError

    @property
    def prefix_length(self) -> int:
        """How many tokens of the context stand before every text."""
        return 0

    def begin(self, model: nn.Module) -> None:
        """Set what depends on the weights of the base, before the first step; it may draw random numbers."""

    def merged(self, model: M) -> M:
        """The model without an adapter that computes what `model` does; it shares all other weights.

        `model` itself if there is none.
        """
        raise NotImplementedError


class NoAdapter(Adapter, name="none"):
    """All weights are trained."""

    def applied(self, model: M) -> M:
        return model

    def merged(self, model: M) -> M:
        return model


def freeze_matching(model: nn.Module, patterns: Sequence[str]) -> None:
    """Freeze the weights whose whole names match one of `patterns`.

    Raises `UserError` for a pattern that matches none, if nothing is left to train, and as `frozen` does.
    """
    if not patterns:
        return
    _check_unchanged(model)
    for pattern in patterns:
        matches = name_pattern(pattern, "freeze").fullmatch
        chosen = [weight for name, weight in model.named_parameters(remove_duplicate=False) if matches(name)]
        if not chosen:
            some = ", ".join([name for name, _ in model.named_parameters()][:3])
            raise UserError(f"freeze {pattern!r} matches no weight of the model: they have names such as {some}")
        for weight in chosen:
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise UserError(f"freeze {' '.join(patterns)} leaves no weight to train: leave some of them out")


def frozen(model: M) -> M:
    """`model` with all weights frozen but those of a classifier's head, which a base with another head cannot have.

    Raises `UserError` if a module of it changes weights after each step.
    """
    _check_unchanged(model)
    model.requires_grad_(False)
    for weight in of_new_head(model):
        weight.requires_grad_(True)
    return model


def of_new_head(model: nn.Module) -> list[nn.Parameter]:
    """The weights of a classifier's head, which are trained beside an adapter, and stored with it."""
    head = getattr(model, "head", None)
    return list(head.parameters()) if isinstance(head, ClassificationHead) else []


def _check_unchanged(model: nn.Module) -> None:
    parts = list(model.modules())[1:]
    if changing := [type(module).__name__ for module in parts if hasattr(module, "end_step")]:
        raise UserError(f"{changing[0]} changes weights after every step, and frozen ones stay: train all weights")


def name_pattern(pattern: str, setting: str) -> re.Pattern[str]:
    """The regular expression of the setting `setting`; raises `UserError` if it is none."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{setting} is {pattern!r}, which is no regular expression ({error}): correct it") from None
