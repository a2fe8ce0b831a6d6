"""Work for a client that may go away: it is dropped as soon as nobody waits for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from minitransformer.serving.errors import GONE, ApiError

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], seconds: float) -> T:
    """The result of `work`, which is cancelled when the client goes away or the time is over.

    Raises `ApiError` then.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ApiError(GONE, "the client has gone away")
        raise ApiError(504, f"there is no whole answer after {seconds:g} seconds: ask for fewer tokens", code="timeout")
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events as they come, up to `seconds`; `ended` is called when no more will be sent."""

    def __init__(self, events: AsyncIterator[str], seconds: float, ended: Callable[[], object]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._seconds, self._ended = events, seconds, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await while_connected(receive, self._send_all(send), self._seconds)
        except ApiError as error:
            if error.status_code != GONE:
                with suppress(TimeoutError):  # of a client that does not read
                    await asyncio.wait_for(self._close(send, error), 1.0)
        finally:
            self._ended()

    async def _send_all(self, send: Send) -> None:
        async for events in self._events:
            await send({"type": "http.response.body", "body": events.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _close(self, send: Send, error: ApiError) -> None:
        await send({"type": "http.response.body", "body": event_of(error.content).encode()})


def event_of(content: Any) -> str:
    """One event with JSON in it."""
    return f"data: {json.dumps(content)}\n\n"
