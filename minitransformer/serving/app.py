"""The application: its routes, its errors, and the threads that live as long as it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from minitransformer.serving import chat, completions, page, status, whole_texts
from minitransformer.serving.errors import answer_errors
from minitransformer.serving.following import Follower
from minitransformer.serving.guard import Guard
from minitransformer.serving.service import Service

ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"description": what, "content": {"application/json": {}}}
    for code, what in {
        400: "the request cannot be answered as it is",
        401: "the key is missing or wrong",
        403: "the host has another name",
        404: "there is no such model or answer",
        408: "the body did not arrive in time",
        413: "the body is too large",
        429: "too many requests wait",
        503: "the server is stopping",
        504: "the time is over",
    }.items()
}


def make_app(service: Service, keys: Sequence[str] = (), hosts: Sequence[str] = ()) -> Guard:
    """The application of `service`, behind its guard."""
    app = FastAPI(title="minitransformer", lifespan=_lifespan, responses=ERRORS, docs_url=None, redoc_url=None)
    app.state.service = service
    for room in (page, completions, chat, whole_texts, status):
        app.include_router(room.router)
    answer_errors(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return Guard(app, service.limits, service.metrics, service.running, keys, hosts)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description of the interface, without the status 422, for which this server has 400."""
    if app.openapi_schema is None:
        described = FastAPI.openapi(app)
        for path in described["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        app.openapi_schema = described
    return app.openapi_schema


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    models, follower = app.state.service.models, Follower(app.state.service)
    for served in models.values():
        served.start(asyncio.get_running_loop())
    following = asyncio.create_task(follower.follow())
    yield
    following.cancel()
    await follower.close()
    for served in models.values():
        await asyncio.to_thread(served.close)
