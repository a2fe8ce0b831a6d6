"""The checks that the tests put around the signatures of the package: what they refuse, and when they are off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from minitransformer.architecture.attention import scaled_dot_product_attention
from minitransformer.architecture.norms import RMSNorm
from tests.shape_checks_for_tests import checked, unchecked


@checked
def first_rows(x: Float[Tensor, "rows columns"], y: Float[Tensor, "rows"], count: int) -> Float[Tensor, "rows columns"]:
    return x[:count] + inner(y)[:count, None]


@checked
def inner(y: Float[Tensor, "columns"]) -> Float[Tensor, "columns"]:
    """Whose `columns` is not that of the call around it."""
    return y


@checked
def without_shapes(count: int) -> str:
    return "a" if count else None  # type: ignore[return-value]


def test_a_call_as_the_signature_says_returns_what_the_function_returns() -> None:
    assert first_rows(torch.ones(3, 2), torch.ones(3), 3).tolist() == [[2.0, 2.0]] * 3
    assert without_shapes(1) == "a"


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: first_rows(torch.ones(3, 2), torch.ones(4), 3), "parameter y="),
    (lambda: first_rows(torch.ones(3), torch.ones(3), 3), "parameter x="),
    (lambda: first_rows(torch.ones(3, 2), torch.ones(3).long(), 3), "parameter y="),
    (lambda: first_rows(torch.ones(3, 2), torch.ones(3), "3"), "parameter count="),
    (lambda: first_rows(torch.ones(3, 2), torch.ones(3), 2), "return"),
    (lambda: without_shapes("1"), "parameter count="),
    (lambda: without_shapes(0), "return"),
]


@pytest.mark.parametrize(("call", "said"), WRONG)
def test_another_shape_type_or_result_is_refused(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(TypeError, match=said):
        call()
    with unchecked():
        if said == "return":
            call()
    with pytest.raises(TypeError, match=said):
        call()


def test_fields_of_a_dataclass_are_checked() -> None:
    @checked
    @dataclass
    class Row:
        values: Float[Tensor, "2"]

    assert Row(torch.ones(2)).values.sum() == 2
    with pytest.raises(TypeError):
        Row(torch.ones(3))


def test_functions_inside_functions_are_checked_if_they_have_shapes() -> None:
    def plain(x: Tensor) -> Tensor:
        return x

    def shaped(x: Float[Tensor, "2"]) -> Tensor:
        return x

    assert checked(plain) is plain
    for _ in range(2):
        with pytest.raises(TypeError):
            checked(shaped)(torch.ones(3))


def test_the_package_is_checked() -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(TypeError, match="head_dim"):
        scaled_dot_product_attention(q, torch.randn(1, 2, 3, 5), q)
    assert hasattr(RMSNorm.forward, "__wrapped__")
