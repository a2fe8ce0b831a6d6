"""The thread in which an engine steps as long as there are requests; they come and go between its steps."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Collection

from minitransformer.errors import UserError
from minitransformer.generation.engine import Engine
from minitransformer.generation.sampling import Request
from minitransformer.serving.errors import ApiError
from minitransformer.serving.limits import ServingLimits
from minitransformer.serving.metrics import Meters
from minitransformer.serving.texts import GeneratedText, Generation

LOG = logging.getLogger("minitransformer.serving")


class Scheduler:
    """Generates texts for an event loop, many at a time; `make_engine` makes an engine with `rows` rows."""

    def __init__(self, make_engine: Callable[[], Engine], rows: int, limits: ServingLimits, meters: Meters) -> None:
        self.rows, self.limits, self.meters = rows, limits, meters
        self.unfinished = 0
        """texts that wait or are decoded"""
        self._make_engine, self._engine = make_engine, make_engine()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._owner: dict[Request, tuple[GeneratedText, Generation]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        meters.watch(self)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are held."""
        return self._engine.cached_tokens

    @property
    def reused_tokens(self) -> int:
        """Tokens of prompts that were not read again, because others begin with them too."""
        return self._engine.prefixes.reused_tokens if self._engine.prefixes else 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to step; news of a generation are told in `loop`."""
        self._loop = loop
        self._thread.start()

    def close(self) -> None:
        """End the thread once all requests have been answered, and wait for it."""
        if self._thread.is_alive():
            self._calls.put(None)
            self._thread.join()

    def submit(self, generation: Generation) -> None:
        """Queue all texts of `generation`; raises `ApiError` if there is no room for them."""
        if not self._thread.is_alive():
            raise ApiError(503, "the server is stopping: try again later")
        self.limits.check_waiting(self.unfinished, len(generation.texts), self.rows)
        self.unfinished += len(generation.texts)
        self._calls.put(lambda: self._begin(generation))

    def cancel(self, generation: Generation) -> None:
        """Free the rows of `generation` before the next step."""
        self._calls.put(lambda: self._cancel(generation))

    def _run(self) -> None:
        stopping = False
        while not (stopping and self._engine.idle):
            while not self._calls.empty() or (self._engine.idle and not stopping):
                call = self._calls.get()
                if call is None:
                    stopping = True
                    continue
                call()
            if not self._engine.idle:
                self._step()

    def _begin(self, generation: Generation) -> None:
        try:
            for text in generation.texts:
                text.request = self._engine.submit(
                    text.prompt,
                    text.sampling,
                    ends=text.ends,
                    stops=text.stops,
                    generator=text.generator,
                    rules=text.rules,
                    record=text.record,
                )
                self._owner[text.request] = text, generation
        except UserError as error:
            self._fail(generation, error)

    def _step(self) -> None:
        try:
            tokens = self._engine.step()
        except Exception as error:  # of a model, or of a plugin's processor: the server goes on with a new engine
            LOG.exception("a step of the engine has failed")
            for generation in {generation for _, generation in self._owner.values()}:
                self._fail(generation, error)
            self._engine = self._make_engine()
            return
        now = time.monotonic()
        changed: set[Generation] = set()
        finished = 0
        for request, _ in tokens:
            text, generation = self._owner[request]
            self.meters.note_token(now - (text.newest or generation.begun), first=not text.newest)
            text.newest = now
            if request.done:
                text.end()
                del self._owner[request]
                finished += 1
            if generation.streams or (request.done and generation.done):
                changed.add(generation)
        self.meters.new_tokens.inc(len(tokens))
        self._tell(changed, finished)

    def _cancel(self, generation: Generation) -> None:
        begun = [text.request for text in generation.texts if text.request in self._owner]
        for request in begun:
            self._engine.cancel(request)
            del self._owner[request]
        self._tell([], len(begun))

    def _fail(self, generation: Generation, error: Exception) -> None:
        generation.error = error
        unknown = sum(text.request is None for text in generation.texts)
        self._cancel(generation)
        self._tell([generation], unknown)

    def _tell(self, changed: Collection[Generation], finished: int = 0) -> None:
        """Have the event loop know what is new."""

        def tell() -> None:
            self.unfinished -= finished
            for generation in changed:
                generation.changed.set()

        if self._loop is not None and (changed or finished):
            self._loop.call_soon_threadsafe(tell)
