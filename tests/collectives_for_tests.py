"""What ranks send each other in a step, and keep."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from minitransformer.models.config import ModelConfig
from minitransformer.training import muon
from minitransformer.training.learner import Learner
from minitransformer.training.parallel import Parallel, parallel_over
from minitransformer.training.ranks import Ranks
from minitransformer.training.shards import local_part, whole_tensor
from tests.ranks_for_tests import config_of, learner_of


def collectives_of_a_step(learner: Learner) -> dict[str, int]:
    """How often each collective operation runs in the next step, which is not the first."""
    learner.step(learner.next_batches())
    with profile(activities=[ProfilerActivity.CPU]) as events:
        learner.step(learner.next_batches())
    return Counter(event.name for event in events.events() if event.name.startswith("c10d::"))


def kept_bytes(learner: Learner) -> int:
    """Memory of the weights and of the optimizer state on this rank."""
    moments = [t for each in learner.optimizers for state in each.state.values() for t in state.values()]
    return sum(local_part(tensor).nbytes for tensor in [*learner.model.parameters(), *moments])


def peak_of_building(ranks: Ranks, parallel: str) -> int:
    """By how many bytes the memory of this process grows at most while it builds a model of 150 MB, or its part."""
    sizes: list[int] = []
    for layers in (1, 12):  # the first one imports torch's modules
        config = ModelConfig(d_model=512, num_layers=layers, num_heads=8, vocab_size=64, context_length=16)
        parallel_over(ranks, Parallel.choose(parallel)).build(config, torch.device("cpu"))
        sizes.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return sizes[1] - sizes[0]


@contextmanager
def orthogonalised_shapes() -> Iterator[list[list[int]]]:
    """The shapes of the stacks of matrices that Muon orthogonalises on this rank."""
    shapes: list[list[int]] = []
    original = muon.orthogonalise

    def noted(matrices: Tensor, quintics: Any) -> Tensor:
        shapes.append(list(matrices.shape))
        return original(matrices, quintics)

    muon.orthogonalise = noted
    try:
        yield shapes
    finally:
        muon.orthogonalise = original


def measured(folder: Path, ranks: Ranks, parallel: str) -> dict[str, Any]:
    peak = peak_of_building(ranks, parallel)

    def learner(**choices: Any) -> Learner:
        return learner_of(config_of("decoder", folder, parallel=parallel, **choices), ranks)

    once = learner(grad_accumulation=1)
    weights = {name: whole_tensor(weight).detach().flatten().tolist() for name, weight in once.model.named_parameters()}
    collectives = {count: collectives_of_a_step(learner(grad_accumulation=count)) for count in (1, 2)}
    collectives_of_a_step(once)
    with orthogonalised_shapes() as shapes:
        learned = learner(optimizer="muon")
        learned.step(learned.next_batches())
    everyone: list[Any] = [shapes]
    if ranks.size > 1:
        everyone = [None] * ranks.size
        torch.distributed.all_gather_object(everyone, shapes)
    return {
        "weights": weights,
        "collectives": collectives,
        "bytes": kept_bytes(once),
        "peak": peak,
        "orthogonalised": everyone,
    }
