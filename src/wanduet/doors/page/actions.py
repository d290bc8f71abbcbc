"""What the page can do: everything through the job store, nothing through the engine."""

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
from wanduet.request import GenerationRequest

if TYPE_CHECKING:
    from wanduet.planning.hardware import Hardware
    from wanduet.runtime.models import Models

PAGE_CARDS = 60  # videos in the gallery, and how many more each "Older videos" shows


class PageActions:
    """The store, seen by one visitor's owner at a time."""

    def __init__(self, context: ServerContext, config: EngineConfig) -> None:
        self.context = context
        self.presets = Presets(context.spec.defaults)
        self._config = config
        self._planning = threading.Lock()

    def defaults(self) -> Form:
        """The model's own settings."""
        return default_form(self.context.spec.defaults)

    def form_of(self, request: dict[str, Any]) -> Form:
        """A stored request as the form shows it."""
        return form_of(request, self.defaults())

    def submit(self, owner: str, form: Form) -> StoredJob:
        """Put the form into the queue. Raises WanduetError or ApiError with what is wrong."""
        if not str(form.get("prompt") or "").strip():
            raise WanduetError("Describe what the video shows first.")
        return self._submit(owner, fields_of(form))

    def repeat(self, owner: str, job: StoredJob, *, new_seed: bool) -> StoredJob:
        """The same once more, with its seed or another. Raises WanduetError or ApiError with what is wrong."""
        request = {name: value for name, value in job.request.items() if value is not None}
        if new_seed:
            request.pop("seed", None)
        return self._submit(owner, request)

    def jobs(self, owner: str, pages: int = 1) -> tuple[tuple[StoredJob, ...], bool]:
        """The newest, for the gallery, and whether there are older ones."""
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
        """One job, if it is the owner's and still there."""
        if job_id is None:
            return None
        try:
            return self.context.store.get(job_id, owner)
        except UnknownJobError:
            return None

    def cancel(self, owner: str, job_id: str) -> None:
        """Stop a job, if it is still there."""
        if self.find(owner, job_id) is not None:
            self.context.store.cancel(job_id, owner)

    def delete(self, owner: str, job_id: str) -> None:
        """Remove a job, if it is still there."""
        if self.find(owner, job_id) is not None:
            self.context.store.delete(job_id, owner)

    def restore(self, video: Path) -> dict[str, Any]:
        """The `form` that a video was made with, and a `note` where it will not come out the same.

        Raises WanduetError if the video does not say.
        """
        about = self._uploads.read(video)
        request = _request_of(about)
        model = about.get("model")
        made_by = model.get("name") if isinstance(model, dict) else model
        served = self.context.spec.name
        its_own = {"seed": about.get("seed", request.get("seed")), "num_videos_per_prompt": 1}  # of several, this one
        try:
            made = GenerationRequest.parse(**{**request, **its_own}).model_dump()
        except InvalidRequestError as error:
            raise WanduetError(f"No video was made with these settings: {error.message}") from None
        note = ""
        if made_by not in (None, served):  # the model is only named: what anybody wrote into a file is never looked up
            note = f"It was made with {public_text(str(made_by), NAME_LIMIT)}, this server has {served}."
        return {"form": self.form_of(made), "note": note}

    def plan(self, form: Form) -> dict[str, Any]:
        """What would run where, without loading anything. Raises WanduetError."""
        from wanduet.planning.planner import make_plan

        fields = {**fields_of(form), "prompt": "a plan"}
        request = to_request(fields, self.context.spec, self.context.settings.limits)
        with self._planning:
            models, hardware = self._machine
            return make_plan(request.resolve(models.spec), models.memory, self._config, hardware).as_dict()

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
    """The settings in a video's metadata that this version knows. Raises WanduetError where there are none."""
    found = about.get("request")
    if not isinstance(found, dict):
        raise WanduetError("This video does not say how it was made.")
    return {name: value for name, value in found.items() if name in GenerationRequest.model_fields}
