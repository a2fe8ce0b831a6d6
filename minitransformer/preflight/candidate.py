"""A run that could start, and what follows from its settings and this machine."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minitransformer.models.model import count_parameters
from minitransformer.preflight.data_state import DataState, data_state, stand_in
from minitransformer.preflight.planned_ranks import plan
from minitransformer.preflight.rehearsal import StepMemory, rehearse
from minitransformer.runs import Run
from minitransformer.runs.resume import checkpoint_to_resume
from minitransformer.text.batches import TrainingBatch
from minitransformer.text.datasets.pair_data import PairData
from minitransformer.training.checkpoint import checkpoint_step
from minitransformer.training.config import RunConfig, with_usual_vocabulary, with_vocabulary
from minitransformer.training.loader import Loader
from minitransformer.training.machine import Machine, choose_device
from minitransformer.training.run_machine import SETTINGS, machine_again, machine_for

SEARCHED = 50
"""steps among which the largest batch is looked for, where batches have many shapes"""


@dataclass(frozen=True)
class Candidate:
    """A run of `config` on `ranks` processes that would be written to `out`.

    It continues `resumed`, or starts from the weights of `parent`, or from none; `checkpoint` names the checkpoint of
    that run, and `usual` are the defaults of a fine-tune. Properties raise `UserError` for impossible settings.
    """

    config: RunConfig
    out: Path | None = None
    resumed: Run | None = None
    parent: Run | None = None
    usual: RunConfig | None = None
    checkpoint: str | None = None
    ranks: int = 1
    answered: int | None = 1
    """ranks that answered a collective operation; None for those that are only planned"""
    ranks_here: int = 1
    """ranks that share this machine"""

    @property
    def folder(self) -> Path:
        """The folder of the run, or the one in which it gets a folder."""
        return self.resumed.path if self.resumed is not None else self.out or Path("runs")

    @cached_property
    def data(self) -> DataState:
        """The state of its data, prepared if that takes seconds."""
        source = self.resumed or self.parent
        return data_state(self.config, () if source is None else source.tokenizers, self.usual)

    @cached_property
    def whole(self) -> RunConfig:
        """Its configuration with the vocabulary of its data, or the usual one of its tokenizer before that is known."""
        config, prepared = self.data.config, self.data.prepared
        model = with_usual_vocabulary(config) if prepared is None else with_vocabulary(config.model, prepared)
        return replace(config, model=model)

    @cached_property
    def parameters(self) -> int:
        return count_parameters(self.whole.model)

    @cached_property
    def machine(self) -> Machine:
        if self.resumed is None:
            return machine_for(self.whole)
        before = self.resumed.config.training
        anew = [name for name in SETTINGS if getattr(before, name) != getattr(self.config.training, name)]
        return machine_again(self.resumed.machine, self.whole, anew)[0]

    @property
    def device(self) -> torch.device:
        """The device, even where it lacks the precision."""
        return choose_device(self.config.training.device) if self.resumed is None else self.machine.device

    @cached_property
    def start(self) -> Path | None:
        """The checkpoint that it starts from; None for new weights."""
        if self.resumed is not None:
            return checkpoint_to_resume(self.resumed, self.config, self.checkpoint)
        return None if self.parent is None else self.parent.checkpoint(self.checkpoint)

    @property
    def steps_left(self) -> int:
        done = checkpoint_step(self.start) if self.resumed is not None and self.start is not None else 0
        return self.config.training.steps - done

    def loader(self, config: RunConfig) -> Loader:
        """The batches of `config`, of full length where the data is not prepared."""
        data = self.data.prepared or stand_in(config)
        if isinstance(data, PairData):
            data = replace(data, batch_tokens=config.data.dataset.settings.batch_tokens)
        return Loader.of_run(config, data)

    def memory(self, config: RunConfig) -> StepMemory:
        """The memory of a training step of `config` on each rank; the batch sizes may be others than those of the run.

        Every rank reads its share of the rows.
        """
        loader, readers = self.loader(config), self.ranks // plan(config, self.ranks).members
        mine = [batch.rows(0, -(-batch.num_rows // readers)) for batch in largest_batches(loader)]
        return rehearse(config, loader, self.machine, mine, self.ranks)

    @cached_property
    def step_memory(self) -> StepMemory:
        return self.memory(self.whole)


def largest_batches(loader: Loader) -> Sequence[TrainingBatch]:
    """The two micro-batches with the most elements in the first steps: more of them take no more memory."""
    steps = 1 if loader.objective.fixed_shapes else SEARCHED
    batches = (batch for step in range(steps) for batch in loader.training_batches(step))
    largest = heapq.nlargest(2, batches, key=_elements)
    return largest[: loader.shape.micro_batches]


def _elements(batch: TrainingBatch) -> int:
    whole = batch.whole
    values = [getattr(whole, each.name) for each in fields(whole)]  # type: ignore[arg-type]
    return sum(value.numel() for value in values if isinstance(value, Tensor))
