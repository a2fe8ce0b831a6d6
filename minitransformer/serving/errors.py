"""Errors in OpenAI's format: a status, and an object with a sentence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from minitransformer.errors import UserError

KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
GONE = 499
"""for the log: the client went away before there was an answer"""


class ApiError(HTTPException):
    """What is wrong with a request, as its sentence, its status, and where it has them a code and a field's name."""

    def __init__(
        self,
        status: int,
        sentence: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, str(UserError(sentence)), dict(headers or {}))
        self.code, self.param = code, param

    @property
    def content(self) -> dict[str, Any]:
        """The object that the client gets."""
        usual = "invalid_request_error" if self.status_code < 500 else "server_error"
        kind = KINDS.get(self.status_code, usual)
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        """The whole answer."""
        return json_response(self.content, self.status_code, self.headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """`content` as JSON in ASCII, which can hold any text that a client sent."""
    return Response(json.dumps(content), status, dict(headers or {}), "application/json")


def as_api_error(error: Exception) -> ApiError:
    """Any error as one for the client; what is no mistake of theirs says nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = [each for each in map(str, first["loc"][1:]) if first["type"] != "json_invalid"]
        return ApiError(400, f"{'.'.join(where) or 'the body'}: {first['msg']}", param=where[0] if where else None)
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    return ApiError(500, "the server has failed at this request, and its log says why: try again")


def answer_errors(app: FastAPI) -> None:
    """Have `app` answer every error in this format."""

    async def handle(request: Request, error: Exception) -> Response:
        return as_api_error(error).response

    for kind in (HTTPException, RequestValidationError, UserError, Exception):
        app.add_exception_handler(kind, handle)
