"""All that the routes share."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from fastapi import Request

from minitransformer.serving.journal import AnswerJournal
from minitransformer.serving.limits import ServingLimits
from minitransformer.serving.metrics import Metrics
from minitransformer.serving.models import Models


@dataclass(frozen=True)
class Service:
    """The models, and what is counted, limited and kept of requests to them."""

    models: Models
    limits: ServingLimits
    metrics: Metrics
    journal: AnswerJournal
    running: set[str] = field(default_factory=set)
    """ids of the requests that are being answered"""


def service_of(request: Request) -> Service:
    """The service that a request has reached."""
    service: Service = request.app.state.service
    return service


def new_id(kind: str) -> str:
    """An id that nobody can guess, as "cmpl-…"."""
    return f"{kind}-{secrets.token_hex(12)}"
