"""`serve`: answer requests over HTTP with the models of runs, as OpenAI's API does."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from typing_extensions import Doc

from minitransformer.commands import DONE, note, parse, with_exit_code
from minitransformer.errors import UserError
from minitransformer.generation.weights import StoredWeights
from minitransformer.training.machine import choose_device

if TYPE_CHECKING:
    from minitransformer.serving.service import Service

KEYS = "MINITRANSFORMER_API_KEYS"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
ABOUT = (
    "Serve the models of runs over HTTP: OpenAI's completions, chats and embeddings, and /classify, /translate, "
    f"/tokenize, /feedback, /health, /metrics. With keys in the variable {KEYS} (separated by commas), each request "
    "must have one of them. Of prompts and answers nothing is logged, unless --log names a file for them."
)


@dataclass(frozen=True)
class Options:
    """Which models are served, where, and how much one client may take."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN|NAME=RUN")]
    """run folders, each called by its last part or by NAME; an adapter's folder is its base with the adapter"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 is every one of this machine"""
    port: int = 8000
    """port to listen on; 0 takes a free one"""
    batch_size: int = 32
    """most texts that are decoded at a time, by each model"""
    context: int | None = None
    """most tokens of a text, its prompt included; None is what the model sees"""
    cache_mib: int = 1024
    """most memory for keys and values of each model, in MiB"""
    max_tokens: int = 4096
    """most tokens that a request may ask for"""
    max_queue: int = 256
    """most texts that wait for each model; further requests get status 429"""
    max_body_mib: int = 4
    """largest body of a request, in MiB"""
    max_connections: int = 512
    """most connections at a time; further ones get status 503"""
    max_seconds: float = 600.0
    """longest time for an answer"""
    drain_seconds: float = 60.0
    """after SIGTERM or Ctrl-C, time for the requests that have begun"""
    log: Path | None = None
    """JSONL file to which prompts and answers are appended; None keeps none"""
    weights: Annotated[str, Doc(f"format of the weight matrices in memory: {', '.join(StoredWeights.registry)}")] = (
        "fp32"
    )
    device: str = "auto"
    """auto, cpu, cuda or mps"""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("there is no run to serve: name its folder")
        if not 0 <= self.port < 2**16:
            raise UserError(f"port is {self.port}: it must be 0 to 65535")
        for name in ("batch_size", "cache_mib", "max_tokens", "max_body_mib", "max_connections"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.context is not None and self.context < 2:
            raise UserError(f"context is {self.context}: it must be at least 2")
        if self.max_queue < 0:
            raise UserError(f"max_queue is {self.max_queue}: it must be at least 0")
        for name in ("max_seconds", "drain_seconds"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}: it must be above 0")
        StoredWeights.named(self.weights)


@with_exit_code
def main(arguments: Sequence[str]) -> int:
    """Serve until a signal; returns the exit code."""
    options = parse(Options, arguments, prog="minitransformer serve", description=ABOUT)
    for package in ("fastapi", "prometheus_client", "uvicorn"):
        if find_spec(package) is None:
            raise UserError(f'serving needs {package}, which is not installed: pip install -e ".[serve]"')
    import uvicorn

    from minitransformer.serving.app import make_app
    from minitransformer.serving.connections import LimitedConnection

    keys = [key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()]
    listener = _listen(options)
    service = _service(options)
    app = make_app(service, keys, () if keys or options.host not in LOOPBACK else LOOPBACK)
    if not keys and options.host not in LOOPBACK:
        note(f"anyone who reaches {options.host} may use the models: set {KEYS}")
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr, level=logging.INFO)
    note(f"listening on http://{_address(listener)}/v1")
    config = uvicorn.Config(
        app,
        http=partial(LimitedConnection, service.limits),  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=round(options.drain_seconds) or 1,
    )
    server = uvicorn.Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)  # to which uvicorn raises again, when it has ended, what it was sent
    server.run([listener])
    return DONE


def _service(options: Options) -> Service:
    from minitransformer.serving.journal import AnswerJournal
    from minitransformer.serving.limits import ServingLimits
    from minitransformer.serving.metrics import Metrics
    from minitransformer.serving.models import Models, Room, named_paths, open_served
    from minitransformer.serving.service import Service

    limits = ServingLimits(
        max_tokens=options.max_tokens,
        max_queue=options.max_queue,
        max_body=options.max_body_mib << 20,
        max_seconds=options.max_seconds,
        max_connections=options.max_connections,
    )
    device = str(choose_device(options.device))
    room = Room(options.batch_size, options.context, options.cache_mib, options.weights, device)
    service = Service(Models(), limits, Metrics(), AnswerJournal(options.log))
    for name, path in named_paths(options.runs).items():
        served = open_served(name, path, room, limits, service.metrics, note)
        shared = service.models.share(served) / 2**20
        service.models[served.name] = served
        of_others = f", with {shared:,.1f} MiB of weights of the others" if shared else ""
        note(f"{name} is a {served.run.config.model.topology}, {served.cache_in_words}{of_others}")
    return service


def _listen(options: Options) -> socket.socket:
    """A socket at the address; raises `UserError` if there is none to have."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        listener = socket.create_server((options.host, options.port), family=family, backlog=1024)
    except OSError as error:
        raise UserError(
            f"cannot listen on {options.host} port {options.port} ({error.strerror}): choose another --port or --host"
        ) from None
    # Of connections too: asyncio sets it for sockets with a protocol number, and those of this listener have none. Each
    # answer would wait 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _address(listener: socket.socket) -> str:
    host, port, *_ = listener.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
