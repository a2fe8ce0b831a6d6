"""The models of a server by name, each with what requests to it need."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from minitransformer.errors import UserError, suggestion
from minitransformer.generation.config import SamplingConfig
from minitransformer.generation.conversation import ChatFormat
from minitransformer.generation.engine import Engine
from minitransformer.generation.fast.rows import with_row_kernel
from minitransformer.generation.fast.steps import recorded_steps
from minitransformer.generation.published import published
from minitransformer.generation.weights import StoredWeights
from minitransformer.models.decoder import DecoderLM
from minitransformer.models.model import Model
from minitransformer.runs import GENERATION, Run
from minitransformer.runs.embedding import Embedder, embedder_of
from minitransformer.runs.promoting import served_checkpoint
from minitransformer.serving.errors import ApiError
from minitransformer.serving.limits import ServingLimits
from minitransformer.serving.metrics import Meters, Metrics
from minitransformer.serving.scheduler import Scheduler
from minitransformer.serving.sharing import share_equal_tensors
from minitransformer.training.weights import weights_digest

T = TypeVar("T")
CHUNK = 64
"""tokens of a prompt that are read between two steps: about what a step of a full batch takes"""
MOST_WAITING_JOBS = 64


@dataclass(frozen=True)
class Room:
    """How much of the machine each model may take."""

    batch_size: int = 32
    context: int | None = None
    cache_mib: int = 1024
    weights: str = "fp32"
    device: str = "cpu"


@dataclass(eq=False)
class ServedModel:
    """A run's model, and a thread for what is done with it in one go.

    `folder` is the run that the server was told; `run` is it, or what is promoted over it. `reopen` opens what is
    promoted by then.
    """

    name: str
    folder: Path
    run: Run
    model: Model
    limits: ServingLimits
    fingerprint: str
    reopen: Callable[[], ServedModel]
    created: int = field(default_factory=lambda: int(time.time()))
    scheduler: Scheduler | None = None
    """of a decoder"""
    cache_in_words: str = "without a cache"
    jobs: int = 0

    def __post_init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, f"worker-{self.name}")

    @cached_property
    def defaults(self) -> SamplingConfig:
        """The sampling settings of requests that name none: those of `sample`."""
        content = self.run.generation_config
        if content is None or self.run.config.model.topology == "encoder":
            return SamplingConfig()
        two_sided = self.run.config.model.topology != "decoder"
        return SamplingConfig(**published(content, str(self.run.path / GENERATION), two_sided=two_sided).settings)

    @cached_property
    def chat(self) -> ChatFormat | None:
        """How conversations are written; None if the model has learned none."""
        template = self.run.chat_template
        return None if template is None else ChatFormat(template, self.run.tokenizer)

    @cached_property
    def embedder(self) -> Embedder:
        """What makes vectors of texts; raises `UserError` for a model that cannot."""
        return embedder_of(self.run, self.model)

    @cached_property
    def json_grammar(self) -> Any:
        """What makes rules of JSON schemas; raises `UserError` without llguidance."""
        from minitransformer.generation.constraints import JsonGrammar

        chat = self.chat
        return JsonGrammar(self.run.tokenizer if chat is None else chat.ending_tokenizer)

    @property
    def context_length(self) -> int:
        """The most tokens that the model sees."""
        return self.run.config.model.text_length

    async def work(self, function: Callable[[], T]) -> T:
        """The result of `function`, called in the thread of this model; raises `ApiError` if too many wait for it."""
        if self.jobs >= MOST_WAITING_JOBS:
            raise ApiError(429, f"{self.jobs} requests wait for the model {self.name}: try again later")
        self.jobs += 1
        future = asyncio.get_running_loop().run_in_executor(self._worker, function)
        future.add_done_callback(lambda done: setattr(self, "jobs", self.jobs - 1))
        return await future

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to generate what is asked for; news are told in `loop`."""
        if self.scheduler is not None:
            self.scheduler.start(loop)

    def close(self) -> None:
        """End the threads, once what they have begun is done."""
        if self.scheduler is not None:
            self.scheduler.close()
        self._worker.shutdown(cancel_futures=True)


class Models(dict[str, ServedModel]):
    """The served models by name."""

    def share(self, served: ServedModel) -> int:
        """Have a model that is to be served use the memory of what others have in common with it; returns its bytes."""
        return share_equal_tensors(served.model, [other.model for other in self.values()])

    def find(self, name: str) -> ServedModel:
        """The model called `name`; raises `ApiError` if there is none."""
        if name not in self:
            hint = suggestion(name, self)
            raise ApiError(
                404,
                f"there is no model {name[:100]!r}: {hint}served are {', '.join(self)}",
                code="model_not_found",
                param="model",
            )
        return self[name]

    def find_decoder(self, name: str) -> tuple[ServedModel, Scheduler]:
        """The decoder called `name`, and what generates its texts; raises `ApiError` if there is none."""
        found = self.find(name)
        if found.scheduler is None:
            topology = found.run.config.model.topology
            raise ApiError(
                400,
                f"the model {name} is of topology {topology}, and continues no prompts: name a decoder",
                param="model",
            )
        return found, found.scheduler


def named_paths(words: Sequence[str]) -> dict[str, Path]:
    """Run folders by name, from NAME=FOLDER or FOLDER, which is called by its last part.

    Raises `UserError` for a name that stands twice.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=") if not Path(word).exists() else ("", "", word)
        folder = Path(path if path else word)
        name = name if equals else folder.resolve().name
        if name in found:
            raise UserError(f"two runs are called {name}, {found[name]} and {folder}: name one with NAME={folder}")
        found[name] = folder
    return found


def open_served(
    name: str, path: Path, room: Room, limits: ServingLimits, metrics: Metrics, note: Callable[[str], None]
) -> ServedModel:
    """The model of the run at `path`, or of what is promoted over it, ready to be asked."""
    promoted, checkpoint = served_checkpoint(path)
    run = Run.open(promoted)
    model = StoredWeights.named(room.weights).applied(run.load_model(checkpoint, room.device))
    model = with_row_kernel(model, note).eval()
    digest = weights_digest(run.checkpoint(checkpoint))
    reopen = partial(open_served, name, path, room, limits, metrics, note)
    served = ServedModel(name, path, run, model, limits, f"fp_{digest[:16]}", reopen)
    if isinstance(model, DecoderLM):
        slots = min(room.context or model.config.text_length, model.config.text_length)
        served.cache_in_words = _checked_cache(name, model, slots, room)
        served.scheduler = _scheduler(served, model, slots, room, Meters(metrics, name))
    return served


def _checked_cache(name: str, model: DecoderLM, slots: int, room: Room) -> str:
    """What the cache takes, in words; raises `UserError` if that is more than there may be."""
    row = bytes_of_row(model, slots + len(model.prefix))
    most = room.cache_mib * 2**20 // row
    takes = f"{room.batch_size} texts of {slots:,} tokens take {room.batch_size * row / 2**20:,.0f} MiB of cache"
    if most < room.batch_size:
        raise UserError(
            f"{takes} for {name}, and there are {room.cache_mib:,}: give --batch-size {max(most, 1)}, a shorter "
            "--context, or more --cache-mib"
        )
    return takes


def _scheduler(served: ServedModel, model: DecoderLM, slots: int, room: Room, meters: Meters) -> Scheduler:
    vocab_size = served.run.tokenizer.vocab_size
    # What the rows leave of the cache is for beginnings of prompts, at most as much as the rows have.
    most = room.cache_mib * 2**20 // bytes_of_row(model, 1)
    kept = min(most - room.batch_size * (slots + len(model.prefix)), room.batch_size * slots)

    def make_engine() -> Engine:
        return Engine(
            model,
            room.batch_size,
            slots,
            vocab_size=vocab_size,
            make_steps=recorded_steps,
            chunk=CHUNK,
            prefix_tokens=kept,
        )

    return Scheduler(make_engine, room.batch_size, served.limits, meters)


def bytes_of_row(model: DecoderLM, slots: int) -> int:
    """Memory for the keys and values of a text of so many tokens."""
    cache = model.new_cache(1)
    with torch.inference_mode():
        token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
        model.hidden_states(token, cache=cache)
    return slots * cache.nbytes
