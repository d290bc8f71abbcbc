"""Errors on the wire: `{"error": {message, type, param, code}}`, whatever went wrong.

Clients try again after 408, 409, 429 and 5xx without telling that it is the same request; so those are
answered only while nothing has been stored.
"""

from collections.abc import Mapping
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from wanduet.errors import InvalidRequestError
from wanduet.jobs.records import IdempotencyError, QueueFullError, UnknownJobError

log = structlog.get_logger(__name__)

INVALID = "invalid_request_error"
QUEUE_RETRY_SECONDS = 30
STORE_RETRY_SECONDS = 5
MESSAGE_LIMIT = 600  # characters: a message quotes what was given, which may be long


class ErrorDetail(BaseModel):
    """What went wrong; `param` names the field."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer that is no success; raise it anywhere in a request."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        kind: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.kind = kind
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """The answer itself."""
        message = self.message if len(self.message) <= MESSAGE_LIMIT else f"{self.message[:MESSAGE_LIMIT]}…"
        message = message.encode("utf-8", "backslashreplace").decode()
        detail = ErrorDetail(message=message, type=self.kind, param=self.param, code=self.code)
        return JSONResponse(ErrorBody(error=detail).model_dump(), self.status, self.headers)


def invalid(error: InvalidRequestError) -> ApiError:
    """A field out of its range."""
    text = f"{error.message} {error.hint}" if error.hint else error.message
    return ApiError(400, error.code, text, param=error.field)


def unavailable(code: str, message: str, retry_after: int, status: int = 503) -> ApiError:
    """Not now; nothing was stored. `retry_after` in seconds."""
    kind = "rate_limit_error" if status == 429 else "server_error"
    return ApiError(status, code, message, kind=kind, headers={"Retry-After": str(retry_after)})


def to_api_error(error: Exception) -> ApiError:
    """Any exception as an answer; what is not known becomes a 500 that tells nothing of the inside."""
    match error:
        case ApiError():
            return error
        case InvalidRequestError():
            return invalid(error)
        case UnknownJobError():
            return ApiError(404, "not_found", "There is no such video.", param="video_id")
        case IdempotencyError():
            return ApiError(422, error.code, error.message, param="Idempotency-Key")
        case QueueFullError():
            text = f"{error.message} {error.hint}"
            return unavailable(error.code, text, QUEUE_RETRY_SECONDS, 429 if error.personal else 503)
        case RequestValidationError():
            return _bad_parameter(error)
        case HTTPException():
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
            return ApiError(error.status_code, code, str(error.detail), headers=error.headers)
        case SQLAlchemyError():
            return unavailable("store_unavailable", "The job store cannot be reached just now.", STORE_RETRY_SECONDS)
        case _:
            return ApiError(500, "internal_error", "Something went wrong in the server.", kind="server_error")


def _bad_parameter(error: RequestValidationError) -> ApiError:
    first: dict[str, Any] = dict(error.errors()[0])
    param = str(first["loc"][-1]) if first.get("loc") else None
    message = str(first.get("msg", "not valid"))
    return ApiError(400, "invalid_request", f"{param}: {message[0].lower()}{message[1:]}.", param=param)


def install(app: FastAPI) -> None:
    """Make every error of an app speak the wire's words."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        api_error = to_api_error(error)
        if api_error.status >= 500 and api_error is not error:  # a refusal is no failure, and clients cause it at will
            log.error("request failed", error=type(error).__name__, status=api_error.status)
        return api_error.response()

    known: tuple[type[Exception], ...] = (
        ApiError,
        InvalidRequestError,
        UnknownJobError,
        IdempotencyError,
        QueueFullError,
        RequestValidationError,
        HTTPException,
        SQLAlchemyError,
        Exception,
    )
    for kind in known:
        app.add_exception_handler(kind, answer)
