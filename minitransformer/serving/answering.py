"""How the texts of a request become its answer: whole, or as a stream of chunks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from minitransformer.serving.chunks import Choices, ChunkWriter
from minitransformer.serving.errors import as_api_error, json_response
from minitransformer.serving.generating import check_failures
from minitransformer.serving.models import ServedModel
from minitransformer.serving.scheduler import Scheduler
from minitransformer.serving.service import Service
from minitransformer.serving.texts import Generation
from minitransformer.serving.waiting import EventStream, event_of, while_connected


@dataclass
class Answering:
    """One request to a decoder, and how it is answered."""

    id: str
    service: Service
    served: ServedModel
    scheduler: Scheduler
    generation: Generation
    choices: Choices
    asked: Mapping[str, Any]
    asks_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    async def respond(self, request: Request) -> Response:
        """Generate, and answer."""
        self.scheduler.submit(self.generation)
        self.scheduler.meters.prompt_tokens.inc(self._prompt_tokens)
        seconds = self.service.limits.max_seconds
        if self.generation.streams:
            return EventStream(self._events(), seconds, self._end)
        try:
            await while_connected(request.receive, self._finish(), seconds)
        finally:
            self._end()
        choices = [self.choices.whole(index, text) for index, text in enumerate(self.generation.texts)]
        return json_response({**self._about(self.choices.kind), "choices": choices, "usage": self._usage})

    async def _finish(self) -> None:
        while not self.generation.done:
            await self.generation.news()
        check_failures(self.generation.texts)

    def _end(self) -> None:
        """Free the rows, if they are not, and take down what was answered, up to where a client has stopped it."""
        generation, done = self.generation, self.generation.done
        if not done:
            self.scheduler.cancel(generation)
        seen = generation.streams and generation.error is None and any(text.text for text in generation.texts)
        if done or seen:
            self.service.journal.note(self.id, self.served.name, self.asked, self.generation)

    def _about(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.name,
            "system_fingerprint": self.served.fingerprint,
        }

    @property
    def _prompt_tokens(self) -> int:
        """Of each prompt once."""
        return sum(len(prompt) for prompt in {id(text.prompt): text.prompt for text in self.generation.texts}.values())

    @property
    def _usage(self) -> dict[str, int]:
        new = sum(text.num_tokens for text in self.generation.texts)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
        }

    async def _events(self) -> AsyncIterator[str]:
        writer = ChunkWriter(self.generation.texts, self.choices, self._about(self.choices.chunk_kind), self.asks_usage)
        try:
            if events := writer.begin():
                yield events
            while not writer.complete:
                await self.generation.news()
                if events := writer.more():
                    yield events
            check_failures(self.generation.texts)
            if self.asks_usage:
                yield event_of({**self._about(self.choices.chunk_kind), "choices": [], "usage": self._usage})
        except Exception as error:  # after the status has been sent, an error is an event
            yield event_of(as_api_error(error).content)
        yield "data: [DONE]\n\n"
