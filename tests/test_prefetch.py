"""Batches ahead of time: the same ones, and errors as if they were made when they are asked for."""

import pytest
import torch

from minitransformer.text.batches import UnreadBatch
from minitransformer.training.objectives.masked import MaskedBatch
from minitransformer.training.prefetch import Ahead, prefetched


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
    assert prefetched(batches_of, torch.device("cpu"), range) is batches_of


def test_on_a_gpu_the_rows_of_this_rank_are_read_ahead_and_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, range]] = []

    def batches(step: int) -> list[UnreadBatch]:
        def windows(rows: range) -> torch.Tensor:
            read.append((step, rows))
            return torch.arange(len(rows) * 3).view(-1, 3)

        return [UnreadBatch(windows, range(4), 2)]

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 100)  # a machine without a GPU cannot
    ahead = prefetched(batches, torch.device("cuda"), lambda count: range(1, count - 1))
    [batch] = ahead(7)
    ahead._begun[8].result(timeout=60)  # type: ignore[attr-defined]
    assert batch.num_targets == 4 * 2
    assert batch.rows(1, 3).inputs.tolist() == [[100, 101], [103, 104]]
    assert read == [(7, range(1, 3)), (8, range(1, 3))]


def test_all_tensors_of_a_batch_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 1)
    batch = MaskedBatch(torch.zeros(1, 1).long(), torch.ones(1, 1).long()).pinned()
    assert (batch.inputs.item(), batch.targets.item(), batch.segments) == (1, 2, None)
