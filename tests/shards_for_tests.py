"""What ranks do with sharded checkpoints: `python -m tests.shards_for_tests RUN DO` on each, which torchrun starts."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard

from minitransformer.models.model import Model, build_model
from minitransformer.training import shard_writer
from minitransformer.training.checkpoint import (
    CHECKPOINTS,
    load_learner_state,
    load_model_weights,
    unique_tensors,
)
from minitransformer.training.config import RunConfig
from minitransformer.training.light import LightOptimizer
from minitransformer.training.logging import Log
from minitransformer.training.optimizer_state import load_optimizer_states, optimizer_states
from minitransformer.training.optimizers import build_optimizers
from minitransformer.training.progress import Progress
from minitransformer.training.saving import Saver
from minitransformer.training.shard_writer import ShardWriter
from tests.runs_for_tests import TINY, configured

SIZES: dict[str, Any] = {"d_model": 18, "num_layers": 2, "num_heads": 3, "vocab_size": 37, "context_length": 16}
CONFIG: RunConfig = configured(TINY, **SIZES)
"""sizes that no number of ranks divides"""


@contextmanager
def joined() -> Iterator[None]:
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def sharded_model(config: RunConfig = CONFIG) -> Model:
    """The model of `config`, divided over the ranks."""
    torch.manual_seed(config.training.seed)
    model = build_model(config.model)
    for block in model.stack.blocks:  # type: ignore[union-attr]
        fully_shard(block)
    return fully_shard(model)  # type: ignore[return-value]


def optimizers_of(model: Model, config: RunConfig = CONFIG) -> list[LightOptimizer]:
    return build_optimizers(config.training.optimizer, model, config.training.rates)


def take_step(model: Model, optimizers: list[LightOptimizer], number: int) -> None:
    """One step on tokens of its own, the same on all ranks."""
    tokens = torch.randint(CONFIG.model.vocab_size, (2, 8), generator=torch.Generator().manual_seed(number))
    model(tokens).log_softmax(-1)[..., 0].mean().neg().backward()
    for optimizer in optimizers:
        optimizer.step()
    model.zero_grad()


def state_of(optimizers: list[LightOptimizer], model: Model, step: int) -> dict[str, Any]:
    return {
        "optimizers": optimizer_states(optimizers, model),
        "precision": {},
        "step": step,
        "progress": {**vars(Progress()), "step": step},
    }


def whole_state(model: Model, optimizers: list[LightOptimizer]) -> dict[str, Tensor]:
    """The weights and the optimizer state of all ranks together, as ordinary tensors."""

    def whole(tensor: Any) -> Tensor:
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()

    state = {name: whole(tensor) for name, tensor in unique_tensors(model).items()}
    for number, optimizer in enumerate(optimizer_states(optimizers, model)):
        for name, moments in optimizer["state"].items():
            state |= {f"{number} {name} {kind}": whole(moment) for kind, moment in moments.items()}
    return state


def loaded_from(checkpoint: Path, model: Model) -> dict[str, Tensor]:
    """All that `model` and its optimizers have once they are loaded."""
    optimizers = optimizers_of(model)
    load_model_weights(checkpoint, model)
    load_optimizer_states(optimizers, model, load_learner_state(checkpoint, model)["optimizers"])
    return whole_state(model, optimizers)


def train(run: Path) -> None:
    """Save steps 2 and 4, each beside the next one, and what the last of them should hold."""
    model = sharded_model()
    optimizers = optimizers_of(model)
    with Saver(run / CHECKPOINTS, CONFIG, Log(), ShardWriter().write_state) as saver:
        for step in range(1, 6):
            take_step(model, optimizers, step)
            if step % 2 == 0:
                expected = whole_state(model, optimizers)
                saver.save(step, model, state_of(optimizers, model, step), best=step == 2, also_before=0)
    if distributed.get_rank() == 0:
        torch.save(expected, run / "expected.pt")


def load(run: Path) -> None:
    """Load the latest checkpoint."""
    loaded = loaded_from((run / CHECKPOINTS / "latest").resolve(), sharded_model())
    if distributed.get_rank() == 0:
        torch.save(loaded, run / f"loaded-by-{distributed.get_world_size()}.pt")


def fail(run: Path) -> None:
    """The disk of rank 1 fills up while it writes step 6."""
    digest = shard_writer.files.sha256

    def full(path: Path) -> str:
        if distributed.get_rank() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return digest(path)

    model = sharded_model()
    shard_writer.files.sha256 = full  # type: ignore[assignment]
    saver = Saver(run / CHECKPOINTS, CONFIG, Log(), ShardWriter().write_state)
    saver.save(6, model, state_of(optimizers_of(model), model, 6), best=True, also_before=0)
    try:
        saver.wait()
    except OSError as error:
        (run / f"error-{distributed.get_rank()}").write_text(str(error.errno))


def on_ranks(count: int, run: Path, do: str) -> None:
    """Have `count` ranks do `do` in the run folder `run`."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [*torchrun, "-m", "tests.shards_for_tests", str(run), do]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined():
        {"train": train, "load": load, "fail": fail}[sys.argv[2]](Path(sys.argv[1]))
