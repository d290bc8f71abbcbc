"""What the page can do: everything through the job store, nothing through the engine."""

import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanduet.config import EngineConfig
from wanduet.errors import WanduetError
from wanduet.frontends.http_context import ServerContext
from wanduet.frontends.http_schemas import to_request
from wanduet.frontends.http_uploads import MetadataReader
from wanduet.jobs.records import NewJob, StoredJob, UnknownJobError

if TYPE_CHECKING:
    from wanduet.engine.build import Models
    from wanduet.engine.hardware import Hardware

MOST_CARDS = 60
# The form's fields in the page's order; `size` is WIDTHxHEIGHT, an empty seed draws one.
FIELDS = (
    "prompt", "negative_prompt", "size", "num_frames", "num_inference_steps", "guidance_scale", "flow_shift",
    "sampler", "fps", "seed",
)  # fmt: skip
_WHOLE = ("num_frames", "num_inference_steps", "fps", "seed")

Form = dict[str, Any]


class PageActions:
    """The store, seen by one visitor's owner at a time."""

    def __init__(self, context: ServerContext, config: EngineConfig) -> None:
        self.context = context
        self._config = config
        self._planning = threading.Lock()

    def defaults(self) -> Form:
        """The model's own settings."""
        known = self.context.spec.defaults
        return {
            "prompt": "",
            "negative_prompt": known.negative_prompt,
            "size": f"{known.width}x{known.height}",
            "num_frames": known.num_frames,
            "num_inference_steps": known.num_inference_steps,
            "guidance_scale": known.guidance_scale,
            "flow_shift": known.flow_shift,
            "sampler": "unipc",
            "fps": known.fps,
            "seed": None,
        }

    def submit(self, owner: str, form: Form) -> StoredJob:
        """Put the form into the queue. Raises WanduetError or ApiError with what is wrong."""
        self.context.check_accepting()
        if not str(form.get("prompt") or "").strip():
            raise WanduetError("Describe what the video shows first.")
        wanted = to_request(_fields(form), self.context.spec, self.context.settings.limits)
        new = NewJob(owner, self.context.spec.name, wanted.model_dump())
        return self.context.store.submit(new, self.context.settings.queue).job

    def jobs(self, owner: str) -> tuple[StoredJob, ...]:
        """The newest, for the gallery."""
        return self.context.store.list(owner, limit=MOST_CARDS).jobs

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

    def form_of(self, request: dict[str, Any]) -> Form:
        """A stored request, or the one in a video's metadata, as the form shows it."""
        form = {**self.defaults(), **{name: request[name] for name in FIELDS if request.get(name) is not None}}
        if request.get("width") and request.get("height"):
            form["size"] = f"{request['width']}x{request['height']}"
        return form

    def restore(self, video: Path) -> Form:
        """The settings that a video was made with. Raises WanduetError if it does not say."""
        about = self._uploads.read(video)
        request = about.get("request")
        if not isinstance(request, dict):
            raise WanduetError("This video does not say how it was made.")
        return self.form_of({**request, "seed": about.get("seed", request.get("seed"))})

    def plan(self, form: Form) -> dict[str, Any]:
        """What would run where, without loading anything. Raises WanduetError."""
        from wanduet.engine.plan import make_plan

        fields = {**_fields(form), "prompt": "a plan"}
        request = to_request(fields, self.context.spec, self.context.settings.limits)
        with self._planning:
            models, hardware = self._machine
            return make_plan(request.resolve(models.spec), models.memory, self._config, hardware).as_dict()

    @cached_property
    def _uploads(self) -> MetadataReader:
        return MetadataReader()

    @cached_property
    def _machine(self) -> "tuple[Models, Hardware]":
        from wanduet.engine.build import Models
        from wanduet.engine.hardware import detect

        return Models(self._config), detect()


def _fields(form: Form) -> dict[str, Any]:
    """What a client would have sent: nothing where the form is empty, whole numbers where the page made floats."""
    fields = {name: form.get(name) for name in FIELDS if form.get(name) not in (None, "")}
    fields["negative_prompt"] = form.get("negative_prompt") or ""
    for name in _WHOLE:
        if isinstance(value := fields.get(name), float) and value.is_integer():
            fields[name] = int(value)
    return fields
