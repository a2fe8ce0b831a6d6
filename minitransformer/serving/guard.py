"""What every request passes first: keys, the host, the size of its body; and the line in the log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minitransformer.serving.errors import GONE, ApiError
from minitransformer.serving.limits import ServingLimits
from minitransformer.serving.metrics import Metrics
from minitransformer.serving.service import new_id

LOG = logging.getLogger("minitransformer.serving")
OPEN = {"/health", "/"}
"""paths that need no key: a page cannot send one before it has asked for it"""
DISCARDED = 16
"""times the largest body are read of one that is too large or refused, so that its client reads the answer"""


class Guard:
    """`app`, for requests that may reach it. Without `keys`, anyone may; `hosts` are the names that it answers to.

    `running` holds the ids of the requests that are being answered.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: ServingLimits,
        metrics: Metrics,
        running: set[str],
        keys: Sequence[str] = (),
        hosts: Sequence[str] = (),
    ) -> None:
        self._app, self._limits, self._metrics, self._running, self._hosts = app, limits, metrics, running, hosts
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, name = time.monotonic(), GONE, new_id("req")

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        self._running.add(name)
        try:
            await self._pass(scope, receive, send_noted)
        finally:
            self._running.discard(name)
            seconds, route = time.monotonic() - begun, getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(seconds)
            LOG.info("%s %s %s %d %.3fs", name, scope["method"], route, status, seconds)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Headers(scope=scope), scope["path"])
        try:
            body = await asyncio.wait_for(self._read(receive, refusal), self._limits.body_seconds)
        except TimeoutError:
            late = ApiError(408, "the body of the request did not arrive in time", headers={"Connection": "close"})
            await (refusal or late).response(scope, receive, send)
        except ApiError as error:
            await error.response(scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replayed(body, receive), send)

    def _refusal(self, headers: Headers, path: str) -> ApiError | None:
        """What is answered to a request from a page of another site, and to one without a key."""
        host = headers.get("host", "").rpartition(":")[0] or headers.get("host", "")
        if self._hosts and host not in self._hosts:
            return ApiError(403, f"this server is called {self._hosts[0]}, and not {host[:100]!r}")
        if self._digests and path not in OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            digest = hashlib.sha256(given.encode(errors="replace")).digest()
            # Each is compared, so that the time says nothing of which one was near.
            if not sum([hmac.compare_digest(digest, known) for known in self._digests]):
                return ApiError(
                    401, "the key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
                )
        return None

    async def _read(self, receive: Receive, refusal: ApiError | None) -> bytes | None:
        """The whole body; None if the client goes away before.

        Raises `refusal` if there is one, or `ApiError` for a body that is too large.
        """
        most, parts, size = self._limits.max_body, [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size <= most and refusal is None:
                parts.append(part)
            if not message.get("more_body", False) or size > DISCARDED * most:
                break
        if refusal is not None:
            raise refusal
        if size > most:
            raise ApiError(413, f"the body is larger than {most:,} bytes: send less", headers={"Connection": "close"})
        return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` for an application whose body has been read."""
    told = False

    async def once() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once
