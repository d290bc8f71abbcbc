"""The routes of `/v1/videos`: the OpenAI videos protocol, extended by cancel and events."""

import unicodedata
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, ValidationError
from sse_starlette import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from wanduet.doors.http.bodies import MULTIPART, read_fields
from wanduet.doors.http.context import ServerContext, get_context, get_owner
from wanduet.doors.http.errors import ApiError, ErrorBody
from wanduet.doors.http.events import OwnersStream, video_events
from wanduet.doors.http.files import answer_file
from wanduet.doors.http.inputs import InputFiles
from wanduet.doors.http.lora_fields import take_loras
from wanduet.doors.http.public import public_text
from wanduet.doors.http.schemas import (
    CreateVideo,
    DeletedVideo,
    RemixVideo,
    Video,
    VideoList,
    check_names,
    fingerprint,
    form_schema,
    json_schema,
    to_video,
)
from wanduet.errors import InvalidRequestError
from wanduet.jobs.records import MAX_PAGE, MODEL_CHANGED, NewJob, StoredJob, UnknownJobError, is_job_id

Variant = Literal["video", "thumbnail", "spritesheet"]
MEDIA_TYPES = {"video": "video/mp4", "thumbnail": "image/webp", "spritesheet": "image/jpeg"}
MAX_KEY = 255  # characters of an idempotency key

Context = Annotated[ServerContext, Depends(get_context)]
Owner = Annotated[str, Depends(get_owner)]
VideoId = Annotated[str, Path(max_length=64, description="A video's id.")]

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "A field is not allowed; `param` names it.",
        401: "No valid API key.",
        403: "A page of another site may not write.",
        404: "There is no such video, or not yet.",
        413: "The body is too long.",
        415: "Neither a form nor JSON.",
        422: "An idempotency key came again with another request.",
        429: "Your quota is used up; nothing was stored.",
        503: "Not now; nothing was stored.",
        507: "The data folder is full; nothing was stored.",
    }.items()
}
router = APIRouter(prefix="/v1/videos", tags=["videos"], responses=_ERRORS)


def _body(model: type[BaseModel], *kinds: str) -> dict[str, Any]:
    content = {kind: {"schema": form_schema(model) if kind == MULTIPART else json_schema(model)} for kind in kinds}
    key = {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "maxLength": MAX_KEY}}
    return {"requestBody": {"required": True, "content": content}, "parameters": [key]}


@router.post("", response_model=Video, openapi_extra=_body(CreateVideo, MULTIPART, "application/json"))
async def create_video(request: Request, context: Context, owner: Owner) -> Video:
    """Put a video into the queue. When this answers with success, the job is on the disk."""
    key = _key(request)
    with InputFiles(context, request, owner, key) as files:
        fields = await read_fields(request, files)  # first: a body that arrives slowly must not occupy a place
        await run_in_threadpool(get_owner, request)  # check again: a body takes time, and keys are revoked at once
        with context.submissions.enter():
            context.check_accepting()
            take_loras(fields)
            file, given = files.take(fields), fingerprint(fields)
            if (known := await _repeated(context, owner, key, given)) is not None:
                return known
            model = _check_model(fields.pop("model", None), context)
            wanted = await files.resolve(fields)
            new = NewJob(
                owner,
                model,
                wanted.model_dump(exclude_none=True),
                idempotency_key=key,
                fingerprint=given,
                model_hash=context.settings.model_hash,
            )
            return await _submit(context, new, None if file is None else file.path)


@router.post("/{video_id}/remix", response_model=Video, openapi_extra=_body(RemixVideo, "application/json"))
async def remix_video(video_id: VideoId, request: Request, context: Context, owner: Owner) -> Video:
    """Put a video into the queue that differs from another one only in its prompt; it has the same input video."""
    fields = await read_fields(request)
    await run_in_threadpool(get_owner, request)
    with context.submissions.enter():
        context.check_accepting()
        source_id = _checked(video_id)
        key, given = _key(request), fingerprint(fields, source_id)
        if (known := await _repeated(context, owner, key, given)) is not None:
            return known
        check_names(fields, RemixVideo)
        try:
            prompt = RemixVideo.model_validate(fields).prompt
        except ValidationError:
            raise InvalidRequestError("prompt", fields.get("prompt"), "a text that is not empty") from None
        source = await run_in_threadpool(context.store.get, source_id, owner)
        fields = {**source.request, "prompt": prompt}
        wanted = await run_in_threadpool(context.to_request, fields)
        file = await run_in_threadpool(find_input, source, context)
        new = NewJob(
            owner,
            _check_source(source, context),
            wanted.model_dump(exclude_none=True),
            idempotency_key=key,
            remixed_from=source.id,
            fingerprint=given,
            model_hash=context.settings.model_hash,
        )
        return await _submit(context, new, file)


@router.get("", response_model=VideoList)
def list_videos(
    context: Context,
    owner: Owner,
    after: Annotated[str | None, Query(description="The last id of the page before; it may be deleted.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """Your videos, newest first."""
    if after is not None and not is_job_id(after):
        raise ApiError(400, "invalid_request", "after must be a video's id.", param="after")
    page = context.store.list(owner, after=after, limit=limit, order=order)
    data = [to_video(job) for job in page.jobs]
    return VideoList(
        data=data,
        has_more=page.has_more,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
    )


@router.get("/{video_id}", response_model=Video)
def retrieve_video(video_id: VideoId, context: Context, owner: Owner) -> Video:
    """One video; a failed one too."""
    return to_video(_find(context, video_id, owner))


@router.delete("/{video_id}", response_model=DeletedVideo)
def delete_video(video_id: VideoId, context: Context, owner: Owner) -> DeletedVideo:
    """Remove a video in any state; one that runs is stopped."""
    return DeletedVideo(id=context.store.delete(_checked(video_id), owner).id)


@router.post("/{video_id}/cancel", response_model=Video)
def cancel_video(video_id: VideoId, context: Context, owner: Owner) -> Video:
    """Stop a video; it is then `failed` with the code `cancelled`. A finished one stays as it is."""
    return to_video(context.store.cancel(_checked(video_id), owner))


@router.head("/{video_id}/content", include_in_schema=False)
@router.get(
    "/{video_id}/content",
    response_class=FileResponse,
    responses={
        200: {"content": {kind: {} for kind in MEDIA_TYPES.values()}, "description": "The file."},
        206: {"description": "A part of the file."},
        304: {"description": "The client has it already."},
        416: {"model": ErrorBody, "description": "The range lies outside of the file."},
    },
)
def download_video(
    video_id: VideoId,
    request: Request,
    context: Context,
    owner: Owner,
    variant: Variant = "video",
    index: Annotated[int, Query(ge=0, le=63, description="Which of several videos of one prompt.")] = 0,
) -> Response:
    """The video, its thumbnail or its sprite sheet; takes Range requests."""
    job = _find(context, video_id, owner)
    if job.status != "completed":  # 404 instead of 409, which clients would retry at once
        raise ApiError(404, f"video_{job.status}", f"This video is {job.status}, not completed.", param="video_id")
    name = next((file.name for file in job.files if (file.variant, file.index) == (variant, index)), None)
    path = context.store.files.path(name) if name is not None else None
    try:
        if path is None:
            raise FileNotFoundError
        # The file never changes but may be deleted: a browser caches it, and checks each time that it still exists.
        kept = {"Cache-Control": "private, no-cache, no-transform"}
        return answer_file(path, request, MEDIA_TYPES[variant], f"{job.id}{path.suffix}", kept)
    except FileNotFoundError:
        raise ApiError(404, "not_found", f"This video has no such {variant}.", param="variant") from None


@router.get(
    "/{video_id}/preview",
    response_class=Response,
    responses={200: {"content": {"image/webp": {}}, "description": "A small moving picture."}},
)
def preview_video(video_id: VideoId, context: Context, owner: Owner) -> Response:
    """What a running video will look like as far as the model sees it; 404 while nothing is to be seen."""
    picture = context.store.files.preview(_find(context, video_id, owner).id)
    if picture is None:
        raise ApiError(404, "not_found", "There is no preview of this video just now.", param="video_id")
    return Response(picture, media_type="image/webp", headers={"Cache-Control": "no-store"})


@router.get(
    "/{video_id}/events",
    response_class=EventSourceResponse,
    responses={
        200: {
            "content": {"text/event-stream": {}},
            "description": "Events `video` and `preview`, then `done` or `deleted`; `error` where the key was revoked.",
        }
    },
)
async def stream_events(video_id: VideoId, request: Request, context: Context, owner: Owner) -> EventSourceResponse:
    """Each change of a video as it happens: the video object with `phase` and `seconds_left`; with `preview`, a
    small moving picture of what it will look like, as a data URI in `image`.
    """
    job = await run_in_threadpool(_find, context, video_id, owner)
    return OwnersStream(context, request.headers, owner, context.streams, video_events(context, owner, job))


async def _repeated(context: ServerContext, owner: str, key: str | None, given: str) -> Video | None:
    """Return the video that is stored under an idempotency key. Raises IdempotencyError.

    The source, the server's model or its limits may have changed since.
    """
    if key is None:
        return None
    job = await run_in_threadpool(context.store.find_by_key, owner, key, given)
    if job is None:
        return None
    context.metrics.count_submission(owner, "repeated")
    return to_video(job)


async def _submit(context: ServerContext, new: NewJob, source: FilePath | None) -> Video:
    outcome = "refused"
    try:
        done = await run_in_threadpool(context.store.submit, new, context.settings.queue, source)
        outcome = "stored" if done.created else "repeated"
        return to_video(done.job)
    finally:
        context.metrics.count_submission(new.owner, outcome)


def find_input(job: StoredJob, context: ServerContext) -> FilePath | None:
    """Return the video that a job starts from, if it does. Raises ApiError if it is gone."""
    path = next((context.store.files.path(file.name) for file in job.inputs), None)
    if path is None and job.request.get("input_video") is not None:
        raise ApiError(404, "not_found", "The input video of that video is gone. Upload it again.", param="video_id")
    return path


def _find(context: ServerContext, video_id: str, owner: str) -> StoredJob:
    return context.store.get(_checked(video_id), owner)


def _checked(video_id: str) -> str:
    if not is_job_id(video_id):
        raise UnknownJobError(video_id)
    return video_id


def _check_model(given: Any, context: ServerContext) -> str:
    served = context.spec.name
    if given is not None and given != served:
        raise ApiError(404, "model_not_found", f"This server has the model {served!r} only.", param="model")
    return served


def _check_source(source: StoredJob, context: ServerContext) -> str:
    """Return the served model's name. Raises ApiError if the source was accepted for another model."""
    served, weights = context.spec.name, context.settings.model_hash
    if source.model != served and (weights is None or source.model_hash != weights):
        raise ApiError(
            400,
            MODEL_CHANGED,
            f"That video is one of the model {public_text(source.model)!r}; this server has {served!r} only. Create a new video.",
            param="video_id",
        )
    return served


def _key(request: Request) -> str | None:
    """Return the idempotency key: UTF-8, else Latin-1, without control characters. Raises ApiError (400)."""
    given = request.headers.getlist("idempotency-key")
    if not given:
        return None
    raw = given[0].encode("latin-1")  # the bytes as sent: Starlette decodes headers as Latin-1
    try:
        key = raw.decode()
    except UnicodeDecodeError:
        key = raw.decode("latin-1")
    if len(given) > 1 or not 0 < len(key) <= MAX_KEY or any(unicodedata.category(c) == "Cc" for c in key):
        text = f"One key of 1 to {MAX_KEY} characters, none of which is a control character."
        raise ApiError(400, "invalid_request", text, param="Idempotency-Key")
    return key
