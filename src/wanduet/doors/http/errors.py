"""HTTP errors: every failure becomes `{"error": {message, type, param, code}}`.

Clients retry after 408, 409, 429 and 5xx without marking the request as a repetition; so these statuses are returned
only while nothing has been stored.
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
from starlette.routing import Match

from wanduet.doors.http.public import NAME_LIMIT, public_text, sendable
from wanduet.errors import InvalidRequestError, OutputError, WanduetError
from wanduet.jobs.library_logs import RateLimit
from wanduet.jobs.records import IdempotencyError, QueueFullError, UnknownJobError

log = structlog.get_logger(__name__)

INVALID = "invalid_request_error"
QUEUE_RETRY_SECONDS = 30
STORE_RETRY_SECONDS = 5
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
STREAM_END = "/events"  # suffix of paths that refuse HEAD: their GET does not end until the video does
# Store faults that need an operator, by error code. The message says what to do; the response has no Retry-After.
STORE_FAULTS: Mapping[str, int] = {
    "store_broken": 503,
    "store_gone": 503,
    "store_read_only": 503,
    "store_damaged": 500,
}


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
    """An error response; raise it anywhere while a request is handled."""

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

    def body(self) -> dict[str, Any]:
        """Return the JSON body of the response."""
        param = None if self.param is None else sendable(self.param, NAME_LIMIT)
        detail = ErrorDetail(message=sendable(self.message), type=self.kind, param=param, code=self.code)
        return ErrorBody(error=detail).model_dump()

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        return JSONResponse(self.body(), self.status, self.headers)


def invalid(error: InvalidRequestError) -> ApiError:
    """Return the 400 error for a field with an invalid value."""
    text = f"{error.message} {error.hint}" if error.hint else error.message
    return ApiError(400, error.code, text, param=error.field)


def unavailable(code: str, message: str, retry_after: int, status: int = 503) -> ApiError:
    """Return an error for a request that was refused before anything was stored. `retry_after`: seconds."""
    kind = "rate_limit_error" if status == 429 else "server_error"
    return ApiError(status, code, message, kind=kind, headers={"Retry-After": str(retry_after)})


def too_long(message: str, param: str | None = None) -> ApiError:
    """Return the error for a body, or a part of one, that is too long."""
    return ApiError(413, "body_too_large", message, param=param)


def no_space() -> ApiError:
    """Return the error for a file that cannot be written into the data folder."""
    text = "The server's data folder is full or cannot be written; nothing was stored."
    return unavailable("no_space", text, QUEUE_RETRY_SECONDS, 507)


def to_api_error(error: Exception) -> ApiError:
    """Convert any exception to an error response; unknown exceptions become a 500 without internal details."""
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
        case OutputError():
            return no_space()
        case RequestValidationError():
            return _bad_parameter(error)
        case HTTPException():
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
            return ApiError(error.status_code, code, str(error.detail), headers=error.headers)
        case WanduetError() if error.code in STORE_FAULTS:
            text = public_text(f"{error.message} {error.hint or ''}".strip())
            return ApiError(STORE_FAULTS[error.code], error.code, text, kind="server_error")
        case SQLAlchemyError():
            return unavailable("store_unavailable", "The job store cannot be reached just now.", STORE_RETRY_SECONDS)
        case _:
            return ApiError(500, "internal_error", "Something went wrong in the server.", kind="server_error")


def allowed_methods(request: Request) -> list[str]:
    """Return the methods that the path of a request accepts."""
    routes = request.app.router.routes
    found = [
        method
        for method in METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]
    head = "GET" in found and not request.scope["path"].endswith(STREAM_END)  # HEAD is handled as GET
    return [method for method in METHODS if method in found or (method == "HEAD" and head)]


def _bad_parameter(error: RequestValidationError) -> ApiError:
    first: dict[str, Any] = dict(error.errors()[0])
    param = str(first["loc"][-1]) if first.get("loc") else None
    message = str(first.get("msg", "not valid"))
    return ApiError(400, "invalid_request", f"{param}: {message[0].lower()}{message[1:]}.", param=param)


def log_failure(error: Exception, status: int, rate: RateLimit) -> None:
    """Log the exception behind a 5xx response; `rate` limits how often, since clients may repeat failing requests."""
    kept_back = rate.admit((type(error), status)) if status >= 500 else None
    if kept_back is not None:
        # Only messages of our own exceptions are logged: others might quote the request's content.
        about = {"message": str(error)} if isinstance(error, WanduetError) else {}
        log.error("request failed", error=type(error).__name__, status=status, kept_back=kept_back, **about)


def install(app: FastAPI, failures: RateLimit) -> None:
    """Convert all errors of an app to the API's error format; `failures` limits how often they are logged."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        api_error = to_api_error(error)
        if api_error.status == 405:
            api_error.headers["Allow"] = ", ".join(allowed_methods(request))
        if api_error is not error:  # an ApiError is a deliberate refusal, not a failure
            log_failure(error, api_error.status, failures)
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
        WanduetError,
        Exception,
    )
    for kind in known:
        app.add_exception_handler(kind, answer)
