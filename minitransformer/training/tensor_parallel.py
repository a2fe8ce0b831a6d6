"""Tensor parallelism: neighbouring ranks read the same rows, and share the heads and hidden features of every block.

Shoeybi et al. 2019 (Megatron-LM, arXiv 1909.08053), section 3, by torch's `parallelize_module`: the first linear maps
of a sublayer are divided by outputs, the last one by inputs, and its output is the sum over ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from minitransformer.architecture.attention import MultiHeadAttention, PerHead, identity
from minitransformer.architecture.block import Block
from minitransformer.architecture.feedforward import GatedFeedForward, PlainFeedForward
from minitransformer.errors import UserError
from minitransformer.training.ranks import Ranks

T = TypeVar("T")
FIRST, LAST = ("query", "key", "value", "gate", "up"), ("output", "down")
"""linear maps of attention and of a feed-forward network, before and after heads or hidden features"""
NORMS = ("query_norm", "key_norm", "value_norm")
REMEDY = "choose another --tensor-parallel, or leave it out"


class DataRanks(Ranks):
    """Groups of ranks, of which each reads rows of its own: `rank` is the number of this one's group."""

    def __init__(self, ranks: Ranks, mesh: Any) -> None:
        self.every, (self.size, members) = ranks, mesh.shape
        self.rank, self._group = ranks.rank // members, mesh["data"].get_group()

    @property
    def is_main(self) -> bool:
        return self.every.is_main

    @property
    def processes(self) -> int:
        return self.every.size

    def sum(self, x: Tensor) -> Tensor:
        from torch.distributed import all_reduce

        total = x.clone()
        all_reduce(total, group=self._group)
        return total

    def largest(self, number: int) -> int:
        return self.every.largest(number)

    def from_main(self, make: Callable[[], T]) -> T:
        return self.every.from_main(make)


def check_divisible(model: nn.Module, ranks: int) -> None:
    """Raises `UserError` unless `ranks` can divide every block of `model`, and compute the same as one."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise UserError(f"tensor_parallel divides transformer blocks, and this model has none: {REMEDY}")
    for block in blocks:
        for branch in block.branches:
            if isinstance(branch.sublayer, MultiHeadAttention):
                _check_attention(branch.sublayer, ranks)
            elif isinstance(branch.sublayer, PlainFeedForward | GatedFeedForward):
                if branch.sublayer.up.out_features % ranks:
                    raise UserError(f"{ranks} ranks cannot share {branch.sublayer.up.out_features} features: {REMEDY}")
            else:
                raise UserError(f"tensor_parallel cannot divide {type(branch.sublayer).__name__}: {REMEDY}")


def _check_attention(attention: MultiHeadAttention, ranks: int) -> None:
    for linear in (attention.query, attention.key):
        if (heads := linear.out_features // attention.head_dim) % ranks:
            raise UserError(f"{ranks} ranks cannot share {heads} heads evenly: {REMEDY}")
    if attention.dropout:
        raise UserError(f"tensor_parallel would drop the same in the heads of every rank: set --dropout 0, or {REMEDY}")
    for norm in (getattr(attention, name) for name in NORMS):
        if not isinstance(norm, nn.Identity | PerHead):
            raise UserError(f"tensor_parallel needs norms whose gains all heads share: set --qk-norm head, or {REMEDY}")


def divide(block: Block, mesh: Any) -> None:
    """Keep this rank's heads and hidden features of `block`, one of the ranks of `mesh`."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        ParallelStyle,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    for branch in block.branches:
        names = dict(branch.sublayer.named_children())
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in FIRST if name in names}
        plan |= {name: RowwiseParallel() for name in LAST if name in names}
        # Norms of single heads, [batch, length, heads, head_dim], whose gains all heads share.
        per_head = [name for name in NORMS if isinstance(names.get(name), PerHead)]
        plan |= {f"{name}.norm": SequenceParallel(sequence_dim=2, use_local_output=True) for name in per_head}
        parallelize_module(branch.sublayer, mesh, plan, src_data_rank=None)
        if isinstance(branch.sublayer, MultiHeadAttention):
            branch.sublayer.register_forward_pre_hook(_check_view, with_kwargs=True)


def _check_view(attention: nn.Module, inputs: Any, named: dict[str, Any]) -> None:
    """Raises `UserError` for what is given to all heads alike, where this rank has some of them."""
    view = named["view"]
    if view.bias is not None or view.mix_values is not identity:
        raise UserError(f"tensor_parallel cannot divide biases of scores, or values of other layers: {REMEDY}")
