"""What the page's routes do: plans, forms of videos, submissions that start from a stored video. None loads the engine."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanduet.config import EngineConfig, format_bytes
from wanduet.doors.http.context import ServerContext
from wanduet.doors.http.public import NAME_LIMIT, public_text
from wanduet.doors.http.uploads import MetadataReader, SourceReader
from wanduet.doors.http.videos import find_input
from wanduet.doors.page.clips import SAME_INPUT, Clip
from wanduet.doors.page.forms import (
    FILE_FIELDS,
    FORM_FIELDS,
    SIZE,
    Form,
    Presets,
    clips_of,
    default_form,
    describe,
    fields_of,
    form_of,
    form_rows,
)
from wanduet.doors.page.models import model_words
from wanduet.doors.page.words import card
from wanduet.errors import InvalidRequestError, WanduetError
from wanduet.family.speeds import SPEEDS, price_of_speed, with_speed
from wanduet.jobs.records import NewJob, StoredJob
from wanduet.miniature.vocabulary import is_in_world
from wanduet.request import INPUT_HASH, GenerationRequest
from wanduet.source_video import SourceVideo
from wanduet.weights.names import BUNDLED

if TYPE_CHECKING:
    from wanduet.planning.hardware import Hardware
    from wanduet.runtime.models import Models

_A_FILE = "this file"  # in place of its path, which only the browser knows
SIZE_HELP = "Width x height in pixels, each a multiple of 16; or 480p, 720p, 1080p."
BEYOND = (
    "The miniature knows coloured shapes that move on a background of another colour, and a few scenes. This prompt goes "
    "beyond its world."
)


class PageActions:
    """Actions on behalf of a visitor. Those that submit or read a job take its owner."""

    def __init__(self, context: ServerContext, config: EngineConfig) -> None:
        self.context = context
        self.presets = Presets(context.spec.defaults)
        self._config = config
        self._planning = threading.Lock()

    def defaults(self) -> Form:
        """Return a form with the model's default settings."""
        return default_form(self.context.spec.defaults)

    def about(self) -> dict[str, Any]:
        """Return what the page is built from: the model, the form's fields with their defaults, presets and speeds."""
        limits, start, presets = self.context.settings.limits, self.defaults(), self.presets
        fields = {name: describe(field, start[name], limits) for name, field in FORM_FIELDS.items()}
        fields[SIZE] |= {"kind": "size", "choices": presets.sizes, "help": SIZE_HELP}
        fields["prompt"]["longest"] = limits.prompt
        return {
            "model": self.context.spec.name,
            "models": model_words(self.context.spec, self._config.model),
            "is_miniature": self._config.model in BUNDLED,
            "signed_in": self.context.require_key,
            "fields": fields,
            "rows": form_rows(),
            "files": list(FILE_FIELDS),
            "defaults": start,
            "presets": [
                {"label": label, "field": field, "values": dict(presets.rows[field])}
                for label, field in (("Shape", SIZE), ("Length", "num_frames"), ("Quality", "speed"))
            ],
            "examples": list(presets.examples),
            "speeds": {speed.name: self._price(speed.name) for speed in SPEEDS},
        }

    def form_of(self, job: StoredJob) -> Form:
        """Convert a stored job to a form; it starts from the job's input video, if it has one."""
        files = {name: Clip(SAME_INPUT, job=job.id) for name in FILE_FIELDS if job.request.get(name)}
        return form_of(job.request, self.defaults(), files)

    def follow(self, form: Form) -> Form:
        """Return the form's size and number of frames as its input video has them by default."""
        with suppress(WanduetError):  # a frame rate that is not allowed: the plan says so
            for name, clip in clips_of(form).items():
                fields = {"prompt": "x", "fps": fields_of(form).get("fps"), name: _A_FILE}
                request = GenerationRequest.parse(**fields).resolve(self.context.spec, clip.source)
                return {SIZE: f"{request.width}x{request.height}", "num_frames": request.num_frames}
        return {}

    def fields(self, form: Form) -> dict[str, Any]:
        """Return the fields that `POST /v1/videos` takes for a form, without its file.

        Raises InvalidRequestError or WanduetError, whose message names the problem.
        """
        if not str(form.get("prompt") or "").strip():
            raise WanduetError("Describe what the video shows first.")
        fields = fields_of(form)
        self._request(fields, form)
        return fields

    def again(self, owner: str, first: StoredJob, fields: dict[str, Any]) -> StoredJob:
        """Submit a request that starts from the stored input of the job `first`, if that has one.

        Raises WanduetError or ApiError, whose message names the problem.
        """
        self.context.check_accepting()
        inputs = {name: first.request.get(name) for name in FILE_FIELDS}
        source, context = find_input(first, self.context), self.context
        wanted = context.to_request({**fields, **inputs})
        request, model_hash = wanted.model_dump(exclude_none=True), context.settings.model_hash
        new = NewJob(
            owner, context.spec.name, request, model_hash=model_hash, webhooks=context.settings.webhooks.targets()
        )
        return context.store.submit(new, context.settings.queue, source).job

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
        from wanduet.planning.loras import LorasPlan
        from wanduet.planning.planner import make_plan

        fields = fields_of(form)
        written = str(form.get("prompt") or "").strip()
        request = self._request(fields if written else {**fields, "prompt": "a plan"}, form)
        with self._planning:
            models, hardware = self._machine
            loras, spec = self.context.loras.resolve(request.loras or ())
            resolved = request.resolve(spec, None, models.price)
            plan = make_plan(resolved, models.memory, self._config, hardware)
            if loras:  # only headers are read: a server process has no use for the tensors
                shapes = models.memory.transformer_shapes
                plan = LorasPlan.of(resolved, self.context.loras.measure(loras, shapes), shapes).added_to(plan)
            return plan.as_dict()

    def card(self, job: StoredJob) -> dict[str, Any]:
        """Return a job as the page shows it."""
        return card(job) | {"notes": self.notes(job.request)}

    def notes(self, request: Mapping[str, Any]) -> list[str]:
        """Return what a user should know of a request's prompt before a video is made of it. What LoRA teach is not known."""
        prompt = str(request.get("prompt") or "")
        is_known = self._config.model not in BUNDLED or request.get("loras") or is_in_world(prompt)
        return [BEYOND] if prompt.strip() and not is_known else []

    def _price(self, speed: str) -> str:
        price = price_of_speed(speed, self.context.spec, self.context.price)
        return "" if price is None else str(price)

    def _settings_of(self, video: Path) -> dict[str, Any]:
        about = self._uploads.read(video)
        request = _request_of(about)
        model = about.get("model")
        made_by = model.get("name") if isinstance(model, dict) else model
        served = self.context.spec.name
        its_own = {"seed": about.get("seed", request.get("seed")), "num_videos_per_prompt": 1}  # of one video
        try:
            parsed = GenerationRequest.parse(**{**request, **its_own})
        except InvalidRequestError as error:
            raise WanduetError(f"No video was made with these settings: {error.message}") from None
        loras, notes = self.context.loras.kept(parsed.loras or ())
        made = parsed.model_dump() | {"loras": [lora.recorded() for lora in loras]}
        if made_by not in (None, served):  # the model is only named: a file's metadata never causes a look-up
            notes.append(f"It was made with {public_text(str(made_by), NAME_LIMIT)}, this server has {served}.")
        if any(made[name] for name in FILE_FIELDS):
            notes.append("It was made from an input video, which is not in the file: choose that video too.")
        return {"form": form_of(made, self.defaults()), "note": " ".join(notes)}

    def _request(self, fields: dict[str, Any], form: Form) -> GenerationRequest:
        """`ServerContext.to_request`, with what has been read of the form's input videos."""
        clips = clips_of(form)  # a stored one is named by its job: nothing depends on its hash here
        marks = {name: f"{INPUT_HASH}{clip.job}" if clip.source is None else _A_FILE for name, clip in clips.items()}
        source = next((clip.source for clip in clips.values() if clip.source is not None), None)
        look = None if source is None else lambda: source
        return self.context.to_request({**fields, **marks}, look)

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
