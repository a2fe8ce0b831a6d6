"""How ranks share the training of a model: each variant is applied from outside, and the model does not know of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from minitransformer.architecture.feedforward import MixtureOfExperts
from minitransformer.registry import Registered
from minitransformer.training.ranks import ONE_PROCESS, Ranks


class Parallel(Registered, kind="parallel"):
    """A way to train one model on several ranks; this base class is the null form, one process."""

    shards_weights = False
    """whether a rank keeps only its part of the weights"""
    gradients_scale = 1
    """factor of the loss that makes the gradients of all ranks add up"""
    is_shared = False
    """whether a step waits for other ranks"""

    def __init__(self, settings: Any = None, ranks: Ranks = ONE_PROCESS) -> None:
        self.ranks = ranks

    def can_repeat(self, model: nn.Module) -> bool:
        """Whether a rank can give up a pass before it is `synchronised`, while the others finish theirs."""
        return True

    def shard(self, model: nn.Module) -> nn.Module:
        """The model to call in training, whose gradients are those of all ranks together."""
        return model

    def synchronised(self, model: nn.Module, now: bool) -> AbstractContextManager[Any]:
        """The context of a forward and a backward pass; the ranks add up their gradients if `now`."""
        return nullcontext()

    def clip_grad_norm(self, parameters: Iterable[Tensor], most: float) -> Tensor:
        """Scale the gradients down to a norm of `most`; returns the norm before."""
        return nn.utils.clip_grad_norm_(parameters, most)


class DDP(Parallel, name="ddp"):
    """Every rank has the whole model. Li et al. 2020 (PyTorch Distributed, arXiv 2006.15704)."""

    is_shared = True

    def __init__(self, settings: Any = None, ranks: Ranks = ONE_PROCESS) -> None:
        super().__init__(settings, ranks)
        self.gradients_scale = ranks.size  # torch takes the mean over ranks

    def shard(self, model: nn.Module) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        may_idle = has_experts(model)  # an expert may get no token on a rank
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # `broadcast_buffers` changes its name
            return DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=may_idle
            )

    def can_repeat(self, model: nn.Module) -> bool:
        return not has_experts(model)  # the balance of experts is counted over all ranks in every pass

    def synchronised(self, model: nn.Module, now: bool) -> AbstractContextManager[Any]:
        return nullcontext() if now else model.no_sync()  # type: ignore[operator]


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(module, MixtureOfExperts) for module in model.modules())


def parallel_over(ranks: Ranks, chosen: Any) -> Parallel:
    """The `chosen` way to train on `ranks`; the null form for one process."""
    return Parallel() if ranks.size == 1 else chosen.make(ranks)
