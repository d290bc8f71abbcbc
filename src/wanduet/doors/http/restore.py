"""The page's upload of a video, to read its settings. Uploads may be hostile, and many may come at once."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from wanduet.doors.http.context import ServerContext, get_owner
from wanduet.doors.http.errors import unavailable
from wanduet.doors.http.limits import UPLOAD_PATH
from wanduet.doors.http.public import public_text
from wanduet.errors import WanduetError

READERS = 2  # processes at one time
DISK_RETRY_SECONDS = 30

log = structlog.get_logger(__name__)


def add_restore(app: FastAPI, read: Callable[[Path], dict[str, Any]]) -> None:
    """Add the route to which the page uploads a video; `read` returns the response's JSON, or raises WanduetError."""
    # Separate thread limits: uploads must not occupy the threads of the other routes.
    writers, readers = CapacityLimiter(READERS), CapacityLimiter(READERS)

    @app.post(UPLOAD_PATH, include_in_schema=False)
    async def restore(request: Request) -> JSONResponse:
        context: ServerContext = app.state.context
        with context.uploads.enter(get_owner(request)):  # before anything of the video is read
            context.check_accepting()
            try:
                with tempfile.TemporaryDirectory(prefix="wanduet-", ignore_cleanup_errors=True) as folder:
                    path = Path(folder) / "video.mp4"
                    size = await _store(request, path, writers)
                    get_owner(request)  # check again: keys are revoked at once, and an upload may take minutes
                    return await _read(path, size, read, readers)
            except OSError as error:
                log.error("an upload could not be stored", error=type(error).__name__, number=error.errno)
                text = "The server's folder for temporary files is full or cannot be written."
                raise unavailable("no_temporary_space", text, DISK_RETRY_SECONDS, 507) from None


async def _store(request: Request, path: Path, limiter: CapacityLimiter) -> int:
    """Write the body to a file; return its size in bytes. Raises OSError."""
    size = 0
    with path.open("wb") as file:
        async for chunk in request.stream():
            await to_thread.run_sync(file.write, chunk, limiter=limiter)
            size += len(chunk)
    return size


async def _read(
    path: Path, size: int, read: Callable[[Path], dict[str, Any]], limiter: CapacityLimiter
) -> JSONResponse:
    if size == 0:
        return JSONResponse({"error": "This file is empty."}, 400)
    try:
        return JSONResponse(await to_thread.run_sync(read, path, limiter=limiter))
    except WanduetError as error:
        return JSONResponse({"error": public_text(error.message.replace(str(path), "This file"))}, 400)
