"""The memory of a training step, from a rehearsal on tensors without storage."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minitransformer.preflight.planned_ranks import rehearsed_model
from minitransformer.preflight.storage import StorageCount, each_tensor, with_values
from minitransformer.text.batches import TrainingBatch
from minitransformer.training.config import RunConfig
from minitransformer.training.learner import Learner
from minitransformer.training.loader import Loader
from minitransformer.training.machine import Machine
from minitransformer.training.shards import local_part

HOLES, MORE_HOLES = 0.4, 0.8
"""memory between tensors that come and go, relative to theirs, in the heap that `keep_freed_memory` keeps: measured, \
0.2 to 0.55; and 0.7 to 0.95 with accumulation, whose gradients stay among the activations, and in recurrent models, \
which allocate small tensors at every position"""


@dataclass(frozen=True)
class StepMemory:
    """Bytes on the device at the peak of a training step; `activations` are what comes and goes within one.

    Where ranks divide the model, that includes the weights that a rank gathers, and their gradients.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    holes: int

    @property
    def copy(self) -> int:
        """Bytes of the copy from which a checkpoint is written beside training, on a rank that writes one."""
        return self.parameters + self.optimizer

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.holes


class _Counted:
    """A batch of fake tensors, with the numbers of rows, targets and tokens of the real one."""

    def __init__(self, batch: TrainingBatch, mode: FakeTensorMode, topology: str) -> None:
        # All rows are those of one rank, whatever its share of them would be.
        self.num_rows, self.num_targets, self.num_tokens = batch.num_rows, batch.num_targets, batch.num_tokens
        # torch packs padded sequences by code that reads their lengths from memory; without a mask it need not.
        without = {"source_is_token": None} if topology == "rnn" else {}
        self._batch = replace(each_tensor(batch, lambda tensor: with_values(tensor, mode)), **without)

    def rows(self, first: int, last: int) -> TrainingBatch:
        return self._batch


def rehearse(
    config: RunConfig, loader: Loader, machine: Machine, batches: Sequence[TrainingBatch], ranks: int = 1
) -> StepMemory:
    """The memory of a step of `config` on the first of `ranks` ranks, which reads the rows in `batches`.

    Without compilation, which may save some of it.

    Every operation of two steps is executed on tensors that have a shape and no storage, so that it takes a second,
    and no memory of the device.
    """
    mode, device = FakeTensorMode(allow_non_fake_inputs=True), machine.device
    count = StorageCount(device, experts=config.model.num_experts or 1)
    counted: Any = [_Counted(batch, mode, config.model.topology) for batch in batches]
    with mode, torch.device(device), count, rehearsed_model(config, ranks, device) as (model, parallel):
        count.measure_again()
        parameters = count.live
        learner = Learner(config, model, loader, replace(machine, compile=False), parallel=parallel)
        learner.step(counted)
        kept = count.peak = count.live  # the optimizer's state exists after its first step
        learner.step(counted)
        gradients = sum(local_part(weight).nbytes for weight in model.parameters() if weight.requires_grad)
    in_step = count.peak - kept
    share = MORE_HOLES if config.model.topology == "rnn" or len(batches) > 1 else HOLES
    holes = int(share * in_step) if keeps_holes(device) else 0
    return StepMemory(parameters, gradients, kept - parameters, max(0, in_step - gradients), holes)


def keeps_holes(device: torch.device) -> bool:
    """Whether tensors are allocated in a heap that keeps what they free."""
    return device.type == "cpu" and sys.platform.startswith("linux")
