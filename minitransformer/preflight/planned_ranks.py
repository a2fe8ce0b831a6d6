"""The first rank of a run that is planned for several, without the others: what they would send has its shape only."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from minitransformer.models.model import Model, build_model
from minitransformer.training.config import RunConfig
from minitransformer.training.parallel import FSDP, Parallel, parallel_over
from minitransformer.training.ranks import Ranks


class PlannedRanks(Ranks):
    """The first of `size` ranks, alone."""

    def __init__(self, size: int) -> None:
        self.size = size

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return x.new_empty(sum(received))


def plan(config: RunConfig, ranks: int) -> Parallel:
    """How the first of `ranks` ranks would train; raises `UserError` for what they cannot do."""
    parallel = parallel_over(PlannedRanks(ranks), config.training.parallel)
    parallel.check(config.model, config.training)
    return parallel


@contextmanager
def rehearsed_model(config: RunConfig, ranks: int, device: torch.device) -> Iterator[tuple[Model, Parallel]]:
    """The model of `config` on the first of `ranks` ranks, in a `FakeTensorMode`, and how it trains there.

    Where a rank has the whole model, it trains as one process does: the buckets of DDP are the gradients themselves.
    """
    parallel = plan(config, ranks)
    model = build_model(config.model).train()
    if not isinstance(parallel, FSDP):
        yield model, Parallel()
        return
    with _planned_group(ranks):
        with unset_fake_temporarily():  # a mesh is made of real numbers
            parallel.keep_part(model, device)
        yield model, parallel


@contextmanager
def _planned_group(size: int) -> Iterator[None]:
    from torch import distributed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield
    finally:
        gc.collect()
        distributed.destroy_process_group()
