"""How ranks share the training of a model: each variant is applied from outside, and the model does not know of it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minitransformer.architecture.block import Block
from minitransformer.architecture.feedforward import MixtureOfExperts
from minitransformer.architecture.residual import Residual
from minitransformer.errors import UserError
from minitransformer.models.config import ModelConfig
from minitransformer.models.model import Model, build_in_parts, build_model, model_without_storage
from minitransformer.registry import Registered
from minitransformer.settings import setting
from minitransformer.training.machine import return_freed_memory
from minitransformer.training.ranks import ONE_PROCESS, Ranks
from minitransformer.training.shards import by_mesh, whole_tensor
from minitransformer.training.tensor_parallel import REMEDY, DataRanks, check_divisible, divide

OfMatrices = Callable[[Tensor], Tensor]
"""A function of matrices, [count, rows, columns], each by itself"""


class Parallel(Registered, kind="parallel"):
    """A way to train one model on several ranks; this base class is the null form, one process."""

    shards_weights = False
    """whether a rank keeps only its part of the weights"""
    gradients_scale = 1
    """factor of the loss that makes the gradients of all ranks add up"""
    members = 1
    """ranks that read the same rows"""
    is_shared = False
    """whether a step waits for other ranks"""

    def __init__(self, settings: Any = None, ranks: Ranks = ONE_PROCESS) -> None:
        self.ranks = ranks

    def check(self, model: ModelConfig, training: Any) -> None:
        """Raises `UserError` for a configuration of a model and its training that is impossible in this way."""

    def build(self, config: ModelConfig, device: torch.device) -> Model:
        """The model, or this rank's part of it, with the initial weights of one process."""
        return build_in_parts(config).to(device)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The module to call in training, whose gradients are those of all ranks together."""
        return model

    def synchronised(self, model: nn.Module, now: bool) -> AbstractContextManager[Any]:
        """The context of a forward and a backward pass; the ranks add up their gradients if `now`."""
        return nullcontext()

    def clip_grad_norm(self, parameters: Iterable[Tensor], most: float) -> Tensor:
        """Scale the gradients down to a norm of `most`; returns the norm before."""
        return nn.utils.clip_grad_norm_(parameters, most)

    def of_matrices(
        self, function: OfMatrices, rows: Float[Tensor, "count local columns"], shape: torch.Size
    ) -> Float[Tensor, "count local columns"]:
        """These rows of `function` of matrices of this `shape`, of each of which a rank has `rows`.

        Every rank computes it for some of the matrices.
        """
        return function(rows)

    def whole(self, model: Model) -> Model:
        """On rank 0, a model with all weights of `model`; every rank takes part."""
        return model


class DDP(Parallel, name="ddp"):
    """Every rank has the whole model. Li et al. 2020 (PyTorch Distributed, arXiv 2006.15704)."""

    is_shared = True

    def __init__(self, settings: Any = None, ranks: Ranks = ONE_PROCESS) -> None:
        super().__init__(settings, ranks)
        self.gradients_scale = ranks.size  # torch takes the mean over ranks

    def check(self, model: ModelConfig, training: Any) -> None:
        if model.num_experts:  # their balance is counted over all ranks in every pass
            check_not_repeated(training)

    def wrap(self, model: nn.Module) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        may_idle = has_experts(model)  # an expert may get no token on a rank
        with warnings.catch_warnings(category=FutureWarning, action="ignore"):  # `broadcast_buffers` changes its name
            return DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=may_idle
            )

    def synchronised(self, model: nn.Module, now: bool) -> AbstractContextManager[Any]:
        return nullcontext() if now else model.no_sync()  # type: ignore[operator]

    def of_matrices(
        self, function: OfMatrices, rows: Float[Tensor, "count local columns"], shape: torch.Size
    ) -> Float[Tensor, "count local columns"]:
        mine = self.ranks.share(len(rows))
        return self.ranks.gather(function(rows[mine.start : mine.stop]), len(rows))


class FSDP(Parallel, name="fsdp"):
    """Every rank has a part of each weight, of its gradient and of its optimizer state, and gathers a block to use it.

    torch's `fully_shard`, over rows. Rajbhandari et al. 2019 (ZeRO, arXiv 1910.02054), stage 3; Zhao et al. 2023
    (PyTorch FSDP, arXiv 2304.11277).
    """

    @dataclass(frozen=True)
    class Settings:
        tensor_parallel: int = setting(
            1,
            flag="tensor-parallel",
            at_least=1,
            observes_only=True,
            help="number of neighbouring ranks that read the same rows, and share the heads and features of each block",
        )

    shards_weights = is_shared = True

    def __init__(self, settings: Settings, ranks: Ranks = ONE_PROCESS) -> None:
        super().__init__(settings, ranks)
        self.members = settings.tensor_parallel

    def check(self, model: ModelConfig, training: Any) -> None:
        check_not_repeated(training)  # ranks gather the weights of a block in every pass
        if training.probe:
            raise UserError("diagnostics read whole weights, which fsdp divides: leave --probe out, or --parallel fsdp")
        shared = model.residual.variant.Shared
        if shared.calibrate is not Residual.Shared.calibrate:
            raise UserError(
                f"residual {model.residual.name!r} sets weights in a forward pass, which fsdp divides: "
                "leave --parallel fsdp out"
            )
        if self.members == 1:
            return
        if model.adapter.name != "none":
            raise UserError(f"tensor_parallel cannot divide adapter {model.adapter.name!r}: {REMEDY}")
        if self.ranks.size % self.members:
            raise UserError(f"{self.ranks.size} ranks are no multiple of {self.members}: {REMEDY}")
        if training.optimizer.variant.needs_whole_matrices:
            raise UserError(
                f"tensor_parallel divides matrices, which optimizer {training.optimizer.name!r} needs whole: "
                "choose --optimizer adamw, or leave --tensor-parallel out"
            )
        if training.precision in ("fp16", "fp8"):
            raise UserError(f"tensor_parallel is impossible in {training.precision}: choose --precision bf16")
        check_divisible(model_without_storage(replace(model, vocab_size=model.vocab_size or 1)), self.members)

    def build(self, config: ModelConfig, device: torch.device) -> Model:
        meshes = self.meshes(device)

        def complete(module: nn.Module) -> None:
            self.shard(module.to(device), *meshes)

        return_freed_memory()
        return build_in_parts(config, complete)

    def keep_part(self, model: Model, device: torch.device) -> None:
        """Divide a `model` that has been built as a whole, as `build` divides it in parts."""
        meshes = self.meshes(device)
        for block in [module for module in model.modules() if isinstance(module, Block)]:
            self.shard(block, *meshes)
        self.shard(model, *meshes)

    def meshes(self, device: torch.device) -> tuple[Any, Any]:
        """The ranks that read other rows than this one, and those that read the same; `ranks` are the former then."""
        from torch.distributed.device_mesh import init_device_mesh

        shape = self.ranks.size // self.members, self.members
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))
        if self.members > 1:
            self.ranks = DataRanks(self.ranks, mesh)
            # It warns, on every rank, of the order of operations that it chooses itself.
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        return mesh["data"], mesh["tensor"]

    def shard(self, module: nn.Module, data: Any, tensor: Any) -> None:
        """Keep this rank's part of a block, or of a model of which it has its part of every block."""
        from torch.distributed.fsdp import fully_shard

        if self.members > 1 and isinstance(module, Block):
            divide(module, tensor)
        sharded: Any = fully_shard(module, mesh=data)
        sharded.set_gradient_divide_factor(1.0)  # the sum over ranks
        sharded.set_force_sum_reduction_for_comms(True)

    def synchronised(self, model: Any, now: bool) -> AbstractContextManager[Any]:
        model.set_requires_gradient_sync(now)
        model.set_is_last_backward(now)
        return nullcontext()

    def clip_grad_norm(self, parameters: Iterable[Tensor], most: float) -> Tensor:
        groups = by_mesh([parameter for parameter in parameters if parameter.grad is not None])
        norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups]
        norm = torch.stack([whole_tensor(each) for each in norms]).norm()
        for group in groups:
            nn.utils.clip_grads_with_norm_(group, most, norm)
        return norm

    def of_matrices(
        self, function: OfMatrices, rows: Float[Tensor, "count local columns"], shape: torch.Size
    ) -> Float[Tensor, "count local columns"]:
        (count, local, columns), ranks = rows.shape, self.ranks
        shares = [len(ranks.share(count, rank)) for rank in range(ranks.size)]
        height = -(-shape[0] // ranks.size)  # as `torch.chunk`
        heights = [max(0, min(height, shape[0] - rank * height)) for rank in range(ranks.size)]
        mine = shares[ranks.rank]
        # Rows of all matrices to whole matrices, and back.
        there, here = [share * local * columns for share in shares], [mine * each * columns for each in heights]
        parts = ranks.exchange(rows.flatten(), there, here).split(here)
        whole = torch.cat([part.view(mine, each, columns) for part, each in zip(parts, heights, strict=True)], dim=1)
        done = torch.cat([part.flatten() for part in function(whole).split(heights, dim=1)])
        return ranks.exchange(done, here, there).view(count, local, columns)

    def whole(self, model: Model) -> Model:
        with torch.random.fork_rng(devices=()):
            copy = build_model(model.config) if self.ranks.is_main else None
        weights = {} if copy is None else copy.state_dict()
        for name, tensor in model.state_dict().items():
            value = whole_tensor(tensor)
            if copy is not None:
                weights[name].copy_(value)
        return model if copy is None else copy.to(next(model.parameters()).device).train(model.training)


def check_not_repeated(training: Any) -> None:
    """Raises `UserError` if a rank may give up a pass while the others finish theirs."""
    if training.on_oom == "halve":
        raise UserError(
            f"--on-oom halve is not possible on several ranks with --parallel {training.parallel.name} and this model, "
            "as a rank that runs out of memory stops the others in mid-pass: halve --batch-size and double "
            "--grad-accumulation instead"
        )


def has_experts(model: nn.Module) -> bool:
    return any(isinstance(module, MixtureOfExperts) for module in model.modules())


def parallel_over(ranks: Ranks, chosen: Any) -> Parallel:
    """The `chosen` way to train on `ranks`; the null form for one process."""
    return Parallel() if ranks.size == 1 else chosen.make(ranks)
