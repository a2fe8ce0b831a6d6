"""How long a connection may do nothing: before it has sent a request, and before it has read its answer."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from minitransformer.serving.errors import ApiError
from minitransformer.serving.limits import ServingLimits

LARGEST_HEADERS = 1 << 16
"""bytes of a request before its body"""
SILENT = ApiError(408, "the request did not arrive in time")
TOO_LARGE = ApiError(431, f"the headers of the request have more than {LARGEST_HEADERS:,} bytes: send fewer")


class LimitedConnection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's connection, which waits for half a request and for a reader as long as `limits` say, and no longer.

    The time for a request runs from the connection, or from the first byte after an answer, up to the end of its
    headers: it does not begin anew with each byte. Its body is `Guard`'s. More connections than there may be get 503.
    """

    def __init__(self, limits: ServingLimits, **others: Any) -> None:
        super().__init__(**others)
        self._limits = limits
        self._waiting: asyncio.TimerHandle | None = None
        self._stalled: asyncio.TimerHandle | None = None
        self._received, self._refused = 0, False

    def connection_made(self, transport: Any) -> None:
        """Wait for a request; whatever the socket does not take at once is waited for too."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(0)
        self._refused = len(self.connections) > self._limits.max_connections
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on; the end of the headers ends the wait."""
        if self._refused:
            most = self._limits.max_connections
            self._answer(ApiError(503, f"this server has {most} connections, and takes no more: try again later"))
            return
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
            return
        if self._waiting is None:
            self._wait()
        self._received += len(data)
        if self._received > LARGEST_HEADERS:
            self._answer(TOO_LARGE)

    def pause_writing(self) -> None:
        """The client reads more slowly than it is written to."""
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """It has read all."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(self._limits.header_seconds, self._expire)

    def _stop_waiting(self) -> None:
        self._received = 0
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _expire(self) -> None:
        if self._received:
            self._answer(SILENT)
        else:
            self.transport.close()

    def _watch(self, unread: int) -> None:
        self._stalled = self.loop.call_later(self._limits.read_seconds, self._check_read, unread)

    def _check_read(self, before: int) -> None:
        """Go on only if something was read: closing in order would wait for the reader."""
        unread = self.transport.get_write_buffer_size()
        if unread < before:
            self._watch(unread)
        else:
            self.transport.abort()

    def _answer(self, error: ApiError) -> None:
        if self.transport.is_closing():
            return
        body = json.dumps(error.content).encode()
        status = HTTPStatus(error.status_code)
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
