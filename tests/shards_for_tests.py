"""What ranks do with sharded checkpoints."""

from __future__ import annotations

import errno
import gc
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard

from minitransformer import files
from minitransformer.errors import UserError
from minitransformer.models.model import Model, build_model
from minitransformer.training import shard_writer
from minitransformer.training.checkpoint import CHECKPOINTS, load_learner_state
from minitransformer.training.config import RunConfig
from minitransformer.training.light import LightOptimizer
from minitransformer.training.logging import Log
from minitransformer.training.optimizer_state import load_optimizer_states, optimizer_states
from minitransformer.training.optimizers import build_optimizers
from minitransformer.training.parallel import Parallel
from minitransformer.training.progress import Progress
from minitransformer.training.ranks import Processes
from minitransformer.training.saving import Saver
from minitransformer.training.shards import is_sharded
from minitransformer.training.weights import load_model_weights, unique_tensors
from tests.forked_for_tests import forked_commands
from tests.runs_for_tests import TINY, configured

SIZES: dict[str, Any] = {"d_model": 18, "num_layers": 2, "num_heads": 3, "vocab_size": 37, "context_length": 16}
CONFIG: RunConfig = configured(TINY, **SIZES)
"""sizes that no number of ranks divides"""


class Sharded(Parallel):
    """Every rank keeps its part of the weights."""

    shards_weights = True


@contextmanager
def joined(**choices: Any) -> Iterator[None]:
    """The ranks that have been started, or those of `choices`, are joined."""
    distributed.init_process_group("gloo", **choices)
    try:
        yield
        distributed.barrier()
    finally:
        gc.collect()
        distributed.destroy_process_group()


def one_rank(folder: Path) -> AbstractContextManager[None]:
    """This process as the only rank."""
    return joined(init_method=f"file://{folder / 'ranks'}", rank=0, world_size=1)


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
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            assert all(is_sharded(each) == is_sharded(parameter) for each in state.values() if each.dim())
    return whole_state(model, optimizers)


class Joined(Processes):
    """The ranks of `joined`, which nobody watches."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self._watch = SimpleNamespace(steps=0)  # type: ignore[assignment]


def train(run: Path) -> None:
    """Save steps 2 and 4, each beside the next one, and what the last of them should hold."""
    model = sharded_model()
    optimizers = optimizers_of(model)
    with Saver(run / CHECKPOINTS, CONFIG, Log(), Sharded(ranks=Joined())) as saver:
        for step in range(1, 6):
            take_step(model, optimizers, step)
            if step % 2 == 0:
                expected = whole_state(model, optimizers)
                saver.save(step, model, state_of(optimizers, model, step), best=step == 2, also_before=())
    if distributed.get_rank() == 0:
        torch.save(expected, run / "expected.pt")


def load(run: Path) -> None:
    """Load the latest checkpoint."""
    loaded = loaded_from((run / CHECKPOINTS / "latest").resolve(), sharded_model())
    if distributed.get_rank() == 0:
        torch.save(loaded, run / f"loaded-by-{distributed.get_world_size()}.pt")


def save_step_6(run: Path) -> None:
    model = sharded_model()
    saver = Saver(run / CHECKPOINTS, CONFIG, Log(), Sharded(ranks=Joined()))
    saver.save(6, model, state_of(optimizers_of(model), model, 6), best=True, also_before=())
    try:
        saver.wait()
    except (OSError, RuntimeError, UserError) as error:
        (run / f"error-{distributed.get_rank()}").write_text(str(error))


def fail(run: Path) -> None:
    """The disk of rank 1 fills up while it writes step 6."""

    def full(path: Path) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if distributed.get_rank() == 1:
        files.sha256 = full
    save_step_6(run)


def die(run: Path) -> None:
    """Rank 1 is killed while it writes step 6."""
    if distributed.get_rank() == 1:
        files.sha256 = lambda path: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, return-value]
    save_step_6(run)


def die_last(run: Path) -> None:
    """Rank 0 is killed when all have written their parts of step 6, and it is about to name the folder."""
    if distributed.get_rank() == 0:
        shard_writer.write_manifest = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    save_step_6(run)


def on_ranks(count: int, run: Path, do: Callable[[Path], None], *, killed: bool = False) -> None:
    """Have `count` ranks do `do` in the run folder `run`."""
    ended = forked_commands(join_and_do)(run, do.__name__, ranks=count, patience=300)
    assert ended.done != killed, ended.output[-3000:]


def join_and_do(name: str, arguments: Sequence[str]) -> int:
    with joined():
        {each.__name__: each for each in (train, load, fail, die, die_last)}[name](Path.cwd())
    return 0
