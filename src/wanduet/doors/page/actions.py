"""The page's actions, all of which use the job store and none the engine."""

import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanduet.config import EngineConfig
from wanduet.doors.http.context import ServerContext
from wanduet.doors.http.public import NAME_LIMIT, public_text
from wanduet.doors.http.schemas import to_request
from wanduet.doors.http.uploads import MetadataReader
from wanduet.doors.page.forms import Form, Presets, default_form, fields_of, form_of
from wanduet.errors import InvalidRequestError, WanduetError
from wanduet.jobs.records import NewJob, StoredJob, UnknownJobError
from wanduet.media.input_video import resolve
from wanduet.request import GenerationRequest

if TYPE_CHECKING:
    from wanduet.planning.hardware import Hardware
    from wanduet.runtime.models import Models

PAGE_CARDS = 60  # videos in the gallery, and how many more each click on "Older videos" shows


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

    def form_of(self, request: dict[str, Any]) -> Form:
        """Convert a stored request to a form."""
        return form_of(request, self.defaults())

    def submit(self, owner: str, form: Form) -> StoredJob:
        """Submit the form as a job. Raises WanduetError or ApiError, whose message names the problem."""
        if not str(form.get("prompt") or "").strip():
            raise WanduetError("Describe what the video shows first.")
        return self._submit(owner, fields_of(form))

    def repeat(self, owner: str, job: StoredJob, *, new_seed: bool) -> StoredJob:
        """Submit a job's request again, with its seed or a new one.

        Raises WanduetError or ApiError, whose message names the problem.
        """
        request = {name: value for name, value in job.request.items() if value is not None}
        if new_seed:
            request.pop("seed", None)
        return self._submit(owner, request)

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

    def restore(self, video: Path) -> dict[str, Any]:
        """Return the `form` that a video was made with, and a `note` if this server cannot reproduce it.

        Raises WanduetError if the video has no such metadata.
        """
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
        note = ""
        if made_by not in (None, served):  # the model is only named: a file's metadata never causes a look-up
            note = f"It was made with {public_text(str(made_by), NAME_LIMIT)}, this server has {served}."
        return {"form": self.form_of(made), "note": note}

    def plan(self, form: Form) -> dict[str, Any]:
        """Return the plan for a form, without loading anything. Raises WanduetError."""
        from wanduet.planning.planner import make_plan

        fields = {**fields_of(form), "prompt": "a plan"}
        request = to_request(fields, self.context.spec, self.context.settings.limits)
        with self._planning:
            models, hardware = self._machine
            return make_plan(resolve(request, models.spec), models.memory, self._config, hardware).as_dict()

    def _submit(self, owner: str, fields: dict[str, Any]) -> StoredJob:
        self.context.check_accepting()
        wanted = to_request(fields, self.context.spec, self.context.settings.limits)
        new = NewJob(owner, self.context.spec.name, wanted.model_dump(), model_hash=self.context.settings.model_hash)
        return self.context.store.submit(new, self.context.settings.queue).job

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
    return {name: value for name, value in found.items() if name in GenerationRequest.model_fields}
