"""Exceptions to HTTP answers, once for the whole face: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import logging

import msgspec
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from server.api.inference.parsing import from_validation
from server.api.methods import methods_of
from server.errors import ChorusError

logger = logging.getLogger(__name__)

_WORTH_A_RETRY = {408, 429, 503}


class ErrorDetail(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    error: ErrorDetail


def encode_error(error: ChorusError) -> bytes:
    """The JSON body of an error; also what stands in an error event of a stream."""
    return msgspec.json.encode(ErrorBody(ErrorDetail(error.message, error.type, error.param, error.code)))


def error_response(error: ChorusError) -> Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.challenge is not None:
        headers["www-authenticate"] = error.challenge
    if error.status >= 409 and error.status not in _WORTH_A_RETRY:
        headers["x-should-retry"] = "false"  # SDKs try 409 and 5xx again unless told so
    return Response(encode_error(error), error.status, headers, media_type="application/json")


def as_chorus_error(error: Exception) -> ChorusError:
    """Any exception as something that can be shown; an unexpected one is logged and says nothing."""
    if isinstance(error, ChorusError):
        return error
    if isinstance(error, RequestValidationError):
        # FastAPI puts "body", "query" or "path" before the field.
        return from_validation([{**item, "loc": item["loc"][1:] or item["loc"]} for item in error.errors()])
    if isinstance(error, HTTPException):
        shown = ChorusError(str(error.detail), code="not_found" if error.status_code == 404 else None)
        shown.status = error.status_code
        shown.type = "invalid_request_error" if error.status_code < 500 else "server_error"
        return shown
    logger.error("unexpected error", exc_info=error)
    return ChorusError("The server made an error while it handled this request.", code="internal_error")


async def _handle(request: Request, error: Exception) -> Response:
    shown = as_chorus_error(error)
    request.state.error_code, request.state.error_reason = shown.code, shown.reason
    response = error_response(shown)
    if isinstance(error, HTTPException) and error.status_code == 405:
        response.headers["allow"] = ", ".join(methods_of(request.app.routes, request.scope))
    return response


def install(app: FastAPI) -> None:
    """Makes every error of `app` answer in this shape. What is unexpected is caught by RequestScope."""
    for kind in (ChorusError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _handle)
