"""Connections: half a request is not waited for, a client that does not read is left, and there are only so many."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra serve")
pytest.importorskip("uvicorn", reason="the server needs the extra serve")

import uvicorn

from minitransformer.commands.serve import Options, _listen
from minitransformer.serving.connections import LARGEST_HEADERS, LimitedConnection
from minitransformer.serving.errors import json_response
from minitransformer.serving.guard import Guard
from minitransformer.serving.limits import ServingLimits
from minitransformer.serving.metrics import Metrics
from minitransformer.serving.waiting import EventStream

LIMITS = ServingLimits(body_seconds=0.3, header_seconds=0.3, read_seconds=0.3, max_connections=2)
GET = b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n"


class Answers:
    """An application that greets, or sends without end; `written` counts what was, and `left` is set at its end."""

    def __init__(self) -> None:
        self.written, self.left = 0, threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/endless":
            await EventStream(self._events(), 60, self.left.set)(scope, receive, send)
        else:
            await json_response("hello")(scope, receive, send)

    async def _events(self) -> AsyncIterator[str]:
        while True:
            await asyncio.sleep(0)
            yield "x" * (1 << 16)
            self.written += 1 << 16


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers()


@contextmanager
def served(app: Any, limits: ServingLimits) -> Iterator[tuple[str, int]]:
    """The address at which uvicorn serves `app` meanwhile."""
    config = uvicorn.Config(app, http=partial(LimitedConnection, limits), lifespan="off", log_config=None)
    server, listener = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="module")
def address(answers: Answers) -> Iterator[tuple[str, int]]:
    with served(Guard(answers, LIMITS, Metrics(), set()), LIMITS) as found:
        yield found


def told(connection: socket.socket, sent: bytes = b"") -> bytes:
    """All that is answered to `sent`, up to the end of the connection, which comes within 5 s."""
    connection.settimeout(5)
    connection.sendall(sent)
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "answered"),
    [
        (b"", b""),
        (b"GET / HTTP/1.1\r\nHo", b"HTTP/1.1 408 "),
        (POST + b"half", b"HTTP/1.1 408 "),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * (LARGEST_HEADERS + 9), b"HTTP/1.1 4"),
    ],
    ids=["nothing", "half a header", "half a body", "endless headers"],
)
def test_half_a_request_is_not_waited_for(address: tuple[str, int], sent: bytes, answered: bytes) -> None:
    begun = time.monotonic()
    with socket.create_connection(address) as connection:
        assert told(connection, sent).startswith(answered)
    assert time.monotonic() - begun < 3


def test_the_time_for_a_header_does_not_begin_anew_with_each_byte(address: tuple[str, int]) -> None:
    begun = time.monotonic()
    with socket.create_connection(address) as connection, suppress(OSError):
        for byte in GET % (b"x" * 2000):
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
    assert time.monotonic() - begun < 3


def test_a_connection_goes_on_after_an_answer_and_waits_for_no_half_of_a_next_request(
    address: tuple[str, int],
) -> None:
    with socket.create_connection(address, 5) as connection:
        for _ in range(3):
            connection.sendall(GET % b"")
            answer = b""
            while not answer.endswith(b'"hello"'):
                answer += connection.recv(1 << 16)
            time.sleep(0.2)
        begun = time.monotonic()
        assert told(connection, b"GET / HT").startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - begun < 3, "and not the time after which an idle connection is closed"


def test_a_refused_client_that_sends_a_large_body_reads_why(answers: Answers) -> None:
    limits, body = ServingLimits(max_body=1 << 20), b"x" * 1_000_000
    head = b"POST /v1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 8000000\r\n\r\n"
    guarded = Guard(answers, limits, Metrics(), set(), ["key"])
    with served(guarded, limits) as address, socket.create_connection(address, 5) as connection:
        connection.sendall(head)
        for _ in range(7):
            time.sleep(0.05)
            connection.sendall(body)
        assert told(connection, body).startswith(b"HTTP/1.1 401 ")


def test_a_refused_client_that_waits_with_its_body_reads_why(answers: Answers) -> None:
    guarded = Guard(answers, LIMITS, Metrics(), set(), ["key"])
    sent = b"POST /v1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 9\r\n\r\nhalf"
    with served(guarded, LIMITS) as address, socket.create_connection(address, 5) as connection:
        assert told(connection, sent).startswith(b"HTTP/1.1 401 ")


def test_a_client_that_does_not_read_is_left_and_little_is_kept_for_it(
    address: tuple[str, int], answers: Answers
) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        connection.connect(address)
        connection.sendall(GET % b"endless")
        assert answers.left.wait(5)
    assert answers.written < 32 << 20, "what the system keeps, and one event"


def test_more_connections_than_there_may_be_are_told_so(address: tuple[str, int]) -> None:
    held = [socket.create_connection(address) for _ in range(2)]
    try:
        with socket.create_connection(address) as one_more:
            answer = told(one_more, GET % b"")
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"this server has 2 connections" in answer
    finally:
        for each in held:
            each.close()


def test_no_answer_waits_for_an_acknowledgement_of_what_came_before() -> None:
    with _listen(Options(("run",), port=0)) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
