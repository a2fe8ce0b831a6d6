"""Signatures of the package that are checked in every call, at a third of what jaxtyping's own decorator takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import CodeType, SimpleNamespace
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError
from jaxtyping._storage import pop_shape_memo, push_shape_memo

by_jaxtyping = jaxtyping.jaxtyped
without_shapes: set[CodeType] = set()
"""of functions inside functions, which are new in every call of the outer one: only those with shapes are checked"""
check_types = beartype(conf=BeartypeConf(violation_type=TypeCheckError))


def resolved(annotation: Any, names: dict[str, Any]) -> Any:
    """What an annotation means; Any where its names are known to a type checker alone."""
    try:
        holder: Any = SimpleNamespace(__annotations__={"value": annotation})
        return get_type_hints(holder, names, include_extras=True)["value"]
    except Exception:  # as jaxtyping does
        return Any


def has_shape(annotation: Any) -> bool:
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return any(map(has_shape, annotation if isinstance(annotation, list) else get_args(annotation)))


def checked(function: Any = None, *, typechecker: Any = beartype) -> Any:
    """`jaxtyping.jaxtyped`, which checks arguments twice, and shapes where there are none."""
    if function is None:
        return partial(checked, typechecker=typechecker)
    if not inspect.isfunction(function) or inspect.isgeneratorfunction(function):
        return by_jaxtyping(function, typechecker=typechecker)
    if not function.__annotations__ or function.__code__ in without_shapes:
        return function
    written = function.__annotations__
    function.__annotations__ = {name: resolved(each, function.__globals__) for name, each in written.items()}
    shapes = any(map(has_shape, function.__annotations__.values()))
    if "<locals>" in function.__qualname__ and not shapes:
        function.__annotations__ = written
        without_shapes.add(function.__code__)
        return function
    types_checked = check_types(function)
    function.__annotations__ = written
    return unless_switched_off(function, in_a_scope_of_letters(types_checked) if shapes else types_checked)


def in_a_scope_of_letters(types_checked: Callable[..., Any]) -> Callable[..., Any]:
    """In one call, a letter of a shape means one size, among the arguments and in what is returned."""

    def call(*args: Any, **kwargs: Any) -> Any:
        push_shape_memo({})
        try:
            return types_checked(*args, **kwargs)
        finally:
            pop_shape_memo()

    return call


def unless_switched_off(function: Callable[..., Any], checking: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if jaxtyping.config.jaxtyping_disable else checking)(*args, **kwargs)

    return call


@contextmanager
def unchecked() -> Iterator[None]:
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
