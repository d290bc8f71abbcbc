"""The page's actions, all of which use the job store and none the engine."""

import threading
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanduet.config import EngineConfig, format_bytes
from wanduet.doors.http.context import ServerContext
from wanduet.doors.http.public import NAME_LIMIT, public_text
from wanduet.doors.http.schemas import to_request
from wanduet.doors.http.uploads import MetadataReader, SourceReader
from wanduet.doors.http.videos import find_input
from wanduet.doors.page.clips import SAME_INPUT, Clip
from wanduet.doors.page.forms import FILE_FIELDS, SIZE, Form, Presets, clips_of, default_form, fields_of, form_of
from wanduet.errors import InvalidRequestError, WanduetError
from wanduet.family.speeds import with_speed
from wanduet.jobs.records import NewJob, StoredJob, UnknownJobError
from wanduet.request import INPUT_HASH, GenerationRequest
from wanduet.source_video import SourceVideo

if TYPE_CHECKING:
    from wanduet.planning.hardware import Hardware
    from wanduet.runtime.models import Models

PAGE_CARDS = 60  # videos in the gallery, and how many more each click on "Older videos" shows
_A_FILE = "this file"  # in place of its path, which only the browser knows


class PageActions:
    """Actions on the job store on behalf of a visitor's owner."""

    def __init__(self, context: ServerContext, config: EngineConfig) -> None:
        self.context = context
        self.presets = Presets(context.spec.defaults)
        self._config = config
        self._planning = threading.Lock()

    def defaults(self) -> Form:
        """Return a form with the model's default settings."""
        return default_form(self.context.spec.defaults)

    def form_of(self, job: StoredJob) -> Form:
        """Convert a stored job to a form; it starts from the job's input video, if it has one."""
        files = {name: Clip(SAME_INPUT, job=job.id) for name in FILE_FIELDS if job.request.get(name)}
        return form_of(job.request, self.defaults(), files)

    def follow(self, form: Form, name: str, clip: Clip) -> Form:
        """Return the form with an input video, whose proportions and length its size and frames follow."""
        with suppress(WanduetError):  # a frame rate that is not allowed: the plan says so
            fields = {"prompt": "x", "fps": fields_of(form).get("fps"), name: _A_FILE}
            request = GenerationRequest.parse(**fields).resolve(self.context.spec, clip.source)
            form = {**form, SIZE: f"{request.width}x{request.height}", "num_frames": request.num_frames}
        return {**form, name: clip}

    def submit(self, owner: str, form: Form) -> StoredJob:
        """Submit the form as a job; the browser submits one with a file of its own, see `outgoing`.

        Raises WanduetError or ApiError, whose message names the problem.
        """
        return self._submit(owner, self._checked(form), self._first_of(owner, form))

    def outgoing(self, form: Form) -> dict[str, Any] | None:
        """Return the `fields` and, by field, the hashes of the `files` that the browser submits; None if it has no
        file of the form.

        Raises WanduetError or ApiError, whose message names the problem.
        """
        sources = {name: clip.source for name, clip in clips_of(form).items() if clip.source is not None}
        if not sources:
            return None
        fields = self._checked(form)
        self.context.check_accepting()
        self._request(fields, form)
        return {"fields": fields, "files": {name: source.sha256 for name, source in sources.items()}}

    def repeat(self, owner: str, job: StoredJob, *, new_seed: bool) -> StoredJob:
        """Submit a job's request again, with its seed or a new one.

        Raises WanduetError or ApiError, whose message names the problem.
        """
        request = {name: value for name, value in job.request.items() if value is not None}
        if new_seed:
            request.pop("seed", None)
        return self._submit(owner, request, job)

    def jobs(self, owner: str, pages: int = 1) -> tuple[tuple[StoredJob, ...], bool]:
        """Return the newest jobs, for the gallery, and whether there are older ones."""
        found: list[StoredJob] = []
        more = True
        for _ in range(pages):
            page = self.context.store.list(owner, limit=PAGE_CARDS, after=found[-1].id if found else None)
            found += page.jobs
            more = page.has_more
            if not more:
                break
        return tuple(found), more

    def find(self, owner: str, job_id: str | None) -> StoredJob | None:
        """Return a job; None if it was deleted or belongs to another owner."""
        if job_id is None:
            return None
        try:
            return self.context.store.get(job_id, owner)
        except UnknownJobError:
            return None

    def cancel(self, owner: str, job_id: str) -> None:
        """Cancel a job, if it still exists."""
        if self.find(owner, job_id) is not None:
            self.context.store.cancel(job_id, owner)

    def delete(self, owner: str, job_id: str) -> None:
        """Delete a job, if it still exists."""
        if self.find(owner, job_id) is not None:
            self.context.store.delete(job_id, owner)

    def read(self, video: Path) -> dict[str, Any]:
        """Return what a video can be used for: the `form` that it was made with, with a `note` if this server cannot
        reproduce it, and its `source` if another video can start from it. The `error` says why it cannot.

        Raises WanduetError if it can be used for neither.
        """
        found: dict[str, Any] = {}
        with suppress(WanduetError):
            found = self._settings_of(video)
        try:
            return found | {"source": asdict(self._read_source(video))}
        except InvalidRequestError as error:
            text = f"{error.allowed[0].upper()}{error.allowed[1:]}."
            if not found:
                raise WanduetError(text) from None
            return found | {"error": text}

    def plan(self, form: Form) -> dict[str, Any]:
        """Return the plan for a form, without loading anything. Raises WanduetError."""
        from wanduet.planning.planner import make_plan

        request = self._request({**fields_of(form), "prompt": "a plan"}, form)
        with self._planning:
            models, hardware = self._machine
            return make_plan(
                request.resolve(models.spec, None, models.price), models.memory, self._config, hardware
            ).as_dict()

    def _checked(self, form: Form) -> dict[str, Any]:
        if not str(form.get("prompt") or "").strip():
            raise WanduetError("Describe what the video shows first.")
        return fields_of(form)

    def _settings_of(self, video: Path) -> dict[str, Any]:
        about = self._uploads.read(video)
        request = _request_of(about)
        model = about.get("model")
        made_by = model.get("name") if isinstance(model, dict) else model
        served = self.context.spec.name
        its_own = {"seed": about.get("seed", request.get("seed")), "num_videos_per_prompt": 1}  # of one video
        try:
            made = GenerationRequest.parse(**{**request, **its_own}).model_dump()
        except InvalidRequestError as error:
            raise WanduetError(f"No video was made with these settings: {error.message}") from None
        notes = []
        if made_by not in (None, served):  # the model is only named: a file's metadata never causes a look-up
            notes.append(f"It was made with {public_text(str(made_by), NAME_LIMIT)}, this server has {served}.")
        if any(made[name] for name in FILE_FIELDS):
            notes.append("It was made from an input video, which is not in the file: choose that video too.")
        return {"form": form_of(made, self.defaults()), "note": " ".join(notes)}

    def _submit(self, owner: str, fields: dict[str, Any], first: StoredJob | None) -> StoredJob:
        """Submit an API request; `first` is the job whose stored input it starts from."""
        self.context.check_accepting()
        inputs = {} if first is None else {name: first.request.get(name) for name in FILE_FIELDS}
        source = None if first is None else find_input(first, self.context)
        context = self.context
        wanted = to_request({**fields, **inputs}, context.spec, context.settings.limits, prices=context.price)
        request, model_hash = wanted.model_dump(exclude_none=True), self.context.settings.model_hash
        new = NewJob(owner, self.context.spec.name, request, model_hash=model_hash)
        return self.context.store.submit(new, self.context.settings.queue, source).job

    def _first_of(self, owner: str, form: Form) -> StoredJob | None:
        """Return the job whose stored input the form starts from. Raises WanduetError if it was deleted."""
        for clip in clips_of(form).values():
            if (job := self.find(owner, clip.job)) is None:
                raise WanduetError("The video that had this input was deleted. Choose the input video again.")
            return job
        return None

    def _request(self, fields: dict[str, Any], form: Form) -> GenerationRequest:
        """`to_request`, with what has been read of the form's input videos."""
        clips = clips_of(form)  # a stored one is named by its job: nothing depends on its hash here
        marks = {name: f"{INPUT_HASH}{clip.job}" if clip.source is None else _A_FILE for name, clip in clips.items()}
        source = next((clip.source for clip in clips.values() if clip.source is not None), None)
        look = None if source is None else lambda: source
        context = self.context
        return to_request({**fields, **marks}, context.spec, context.settings.limits, look, context.price)

    def _read_source(self, video: Path) -> SourceVideo:
        limit = self.context.settings.max_input_bytes
        if video.stat().st_size > limit:
            allowed = f"this server takes a video of at most {format_bytes(limit)}"
            raise InvalidRequestError(FILE_FIELDS[0], _A_FILE, allowed)
        return SourceReader().read(video, FILE_FIELDS[0], _A_FILE)

    @cached_property
    def _uploads(self) -> MetadataReader:
        return MetadataReader()

    @cached_property
    def _machine(self) -> "tuple[Models, Hardware]":
        from wanduet.planning.hardware import detect
        from wanduet.runtime.models import Models

        return Models(self._config), detect()


def _request_of(about: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a video's metadata that this version knows. Raises WanduetError if there are none."""
    found = about.get("request")
    if not isinstance(found, dict):
        raise WanduetError("This video does not say how it was made.")
    request = {name: value for name, value in found.items() if name in GenerationRequest.model_fields}
    return with_speed(request, about.get("speed"))
