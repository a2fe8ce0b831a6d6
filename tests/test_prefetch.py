"""Batches ahead of time: the same ones, and errors as if they were made when they are asked for."""

from dataclasses import dataclass

import pytest
import torch

from minitransformer.training.prefetch import Ahead, pinned, prefetched


def batches_of(step: int) -> list[str]:
    if step == 5:
        raise ValueError("step 5 has no batches")
    return [f"{step}a", f"{step}b"]


def test_whatever_step_is_asked_for_has_its_own_batches() -> None:
    ahead = Ahead(batches_of)
    for step in (0, 1, 2, 7, 8, 3, 3, 4):
        assert ahead(step) == batches_of(step)


def test_the_next_step_is_made_before_it_is_asked_for() -> None:
    made: list[int] = []
    ahead = Ahead(lambda step: made.append(step) or [])  # type: ignore[func-returns-value]
    ahead(0)
    ahead._begun[1].result(timeout=60)
    assert made == [0, 1]
    ahead(1)
    ahead._begun[2].result(timeout=60)
    assert made == [0, 1, 2], "none is made twice"


def test_a_step_that_fails_does_so_when_it_is_asked_for() -> None:
    ahead = Ahead(batches_of)
    assert ahead(4) == ["4a", "4b"]
    with pytest.raises(ValueError, match="step 5"):
        ahead(5)


def test_a_cpu_makes_batches_when_it_needs_them() -> None:
    assert prefetched(batches_of, torch.device("cpu")) is batches_of


def test_all_tensors_of_a_batch_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Pair:
        source: torch.Tensor
        target: torch.Tensor
        mask: torch.Tensor | None = None
        name: str = "pair"

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)  # a machine without a GPU cannot
    batch = pinned(Pair(torch.zeros(1), torch.ones(1)))
    assert (batch.source.item(), batch.target.item(), batch.mask, batch.name) == (1, 2, None, "pair")
