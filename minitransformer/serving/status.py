"""What can be asked of the server itself, and what users say of its answers."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from fastapi.responses import Response

from minitransformer.runs.served import FEEDBACK
from minitransformer.serving.errors import ApiError, json_response
from minitransformer.serving.journal import append_rows
from minitransformer.serving.models import ServedModel
from minitransformer.serving.schemas import FeedbackBody
from minitransformer.serving.service import service_of

router = APIRouter()


@router.get("/health")
async def check_health() -> Response:
    """Whether the server answers."""
    return json_response({"status": "ok"})


@router.get("/metrics")
async def show_metrics(request: Request) -> Response:
    """What is measured, in the text format of Prometheus."""
    return Response(service_of(request).metrics.page, media_type="text/plain; version=0.0.4")


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The models that are served."""
    return json_response({"object": "list", "data": list(map(_described, service_of(request).models.values()))})


@router.get("/v1/models/{name}")
async def describe_model(name: str, request: Request) -> Response:
    """One of them."""
    return json_response(_described(service_of(request).models.find(name)))


def _described(served: ServedModel) -> dict[str, object]:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "minitransformer",
        "max_model_len": served.context_length,
        "topology": served.run.config.model.topology,
        "chat": served.chat is not None,
        "fingerprint": served.fingerprint,
    }


@router.post("/feedback")
async def take_feedback(body: FeedbackBody, request: Request) -> Response:
    """Add a thumb or a correction, with the answer that it is about, to feedback.jsonl in the run's folder."""
    if body.rating is None and body.correction is None:
        raise ApiError(400, "give a rating, a correction, or both", param="rating")
    service = service_of(request)
    row = service.journal.find(body.id, body.index)
    said = {"rating": body.rating, "correction": body.correction, "time": time.time()}
    append_rows(service.models.find(row["model"]).folder / FEEDBACK, [{**row, **said}])
    return json_response({"id": body.id, "index": body.index, "object": "feedback"})
