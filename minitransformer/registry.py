"""Registries of variants: a class registers itself under a name in its class statement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

from minitransformer.errors import UserError, suggestion
from minitransformer.settings import Chosen

T = TypeVar("T")


def lookup(kind: str, name: str, table: Mapping[str, T]) -> T:
    """The entry `name` of `table`; raises `UserError` with the nearest name."""
    if name in table:
        return table[name]
    raise UserError(f"unknown {kind} {name!r}: {suggestion(name, table)}known are {', '.join(table)}")


class Registered:
    """Base of a family of interchangeable classes.

    The root of a family names its kind, `class Residual(Registered, kind="residual placement")`;
    a member gives its name, `class PreLN(Residual, name="pre")`; `Residual.named("pre")` finds it. A member with
    settings declares them in a frozen dataclass `Settings` of its own; the first argument of its `__init__` is one.
    """

    @dataclass(frozen=True)
    class Settings:
        """None."""

    kind: ClassVar[str]
    name: ClassVar[str]
    registry: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, *, kind: str | None = None, name: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if kind is not None:
            cls.kind, cls.registry = kind, {}
        if name is not None:
            if name in cls.registry:
                raise UserError(f"{cls.kind} {name!r} is already registered: choose another name")
            cls.name = name
            cls.registry[name] = cls

    @classmethod
    def named(cls, name: str) -> type[Self]:
        """The class registered under `name`; raises `UserError` with the nearest name."""
        return lookup(cls.kind, name, cls.registry)

    @classmethod
    def choose(cls, variant: str | None = None, /, **settings: Any) -> Chosen[Self]:
        """This variant, or the one of this family named `variant`, with `settings`."""
        chosen = cls if variant is None else cls.named(variant)
        return Chosen(chosen, chosen.Settings(**settings))
