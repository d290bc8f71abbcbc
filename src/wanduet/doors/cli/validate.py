"""Checks that run before torch is imported: an error then takes a third of a second instead of several."""

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path

from wanduet.config import EngineConfig
from wanduet.doors.cli.options import VideoFlags, decoded, typed_request
from wanduet.doors.cli.places import Place
from wanduet.errors import InvalidRequestError, ModelNotFoundError
from wanduet.family.registry import RANDOM_SPECS, find_spec
from wanduet.family.spec import ModelSpec
from wanduet.request import GenerationRequest, exclude
from wanduet.untrusted import cut, parse_json, read_stream


def early_request(prompt: str, video: VideoFlags, config: EngineConfig) -> GenerationRequest:
    """Return the request that the user typed.

    Raises InvalidRequestError or ModelNotFoundError for errors that can be detected without the hub and its cache.
    """
    spec = known_spec(config.model, config.files)
    request = video.request(prompt, spec)
    if spec is not None:
        _check(request, spec)
    return request


def _check(request: GenerationRequest, spec: ModelSpec) -> None:
    """Raise InvalidRequestError if the model cannot make it."""
    if request.input_video is None:
        request.resolve(spec)
        return
    from wanduet.media.input_video import resolve

    resolve(request, spec)


def known_spec(model: str, files: Mapping[str, Path] | None = None) -> ModelSpec | None:
    """Return a model's shapes if they are known without the hub; else None. `files`: see `EngineConfig.files`. Raises
    ModelNotFoundError."""
    spec = find_spec(model)
    if spec is not None and not files:
        return spec
    if model.startswith("random:"):
        raise ModelNotFoundError(f"There is no model {model!r}.", hint=f"Random ones: {', '.join(RANDOM_SPECS)}.")
    from wanduet.weights.hub import local_model

    folder = local_model(model, files=files)
    return None if folder is None else folder.spec


def check_output(output: Place | None, codec: str, quality: int | None) -> None:
    """Raise InvalidRequestError for a codec, a quality or a file name that is invalid for a video."""
    from wanduet.media.codecs import container_for
    from wanduet.media.video import VideoSpec

    VideoSpec(16, 16, codec=codec, quality=quality)
    if output is not None and not output.is_folder:
        container_for(output.given, codec)


def check_folder(output: Place | None) -> None:
    """Raise InvalidRequestError if a video's file name is given where a folder is needed."""
    from wanduet.media.codecs import CONTAINERS

    if output is not None and not output.is_folder and output.given.suffix.lower() in CONTAINERS:
        nearest = output.given.with_suffix("").name or None
        raise InvalidRequestError("output", str(output.given), "a folder for all videos", nearest)


def read_batch(file: Path, video: VideoFlags, config: EngineConfig) -> list[GenerationRequest]:
    """Read requests from a file: one a line (a prompt, or a JSON object), or rows of a `.csv` with a header.

    Fields that a line omits come from the flags. Raises InvalidRequestError that names the line, ModelNotFoundError.
    """
    try:
        text = decoded(read_stream(file))
        rows = _csv_rows(text) if file.suffix.lower() in (".csv", ".tsv") else _text_rows(text)
    except (OSError, ValueError, csv.Error) as error:
        raise InvalidRequestError(
            "file", str(file), f"a text file that can be read ({cut(getattr(error, 'strerror', None) or error)})"
        ) from error
    json_only = file.suffix.lower() in (".jsonl", ".ndjson")
    spec = known_spec(config.model, config.files)
    found: list[GenerationRequest] = []
    for number, row in rows:
        try:
            request = _request(row, video, json_only, spec)
            if spec is not None:
                _check(request, spec)
        except InvalidRequestError as error:
            error.message = f"{file}, line {number}: {error.message}"
            raise
        found.append(request)
    if not found:
        raise InvalidRequestError("file", str(file), "a file with at least one prompt")
    return found


Row = str | dict[str, str]


def _text_rows(text: str) -> list[tuple[int, Row]]:
    # Not splitlines(): it also splits at U+2028 or a form feed, which may be part of a prompt.
    lines = enumerate(re.split(r"\r\n|\r|\n", text), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip() and not line.startswith("#")]


def _csv_rows(text: str) -> list[tuple[int, Row]]:
    """Return rows as fields by the header's names, without empty cells. Raises ValueError for duplicate names."""
    header = text.lstrip().partition("\n")[0]
    delimiter = next((mark for mark in ",;\t" if mark in header), ",")  # spreadsheets use the delimiter of their locale
    reader = csv.DictReader(
        io.StringIO(text, newline=""), restkey="surplus", restval="", strict=True, delimiter=delimiter
    )
    names = [name.strip() for name in reader.fieldnames or ()]
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise ValueError(f"two columns are named {cut(twice[0])!r}")
    return [
        (reader.line_num, {(name or "").strip(): cell for name, cell in row.items() if cell})
        for row in reader
        if any(row.values())
    ]


def _request(row: Row, video: VideoFlags, json_only: bool, spec: ModelSpec | None) -> GenerationRequest:
    if isinstance(row, str) and not row.startswith("{") and not json_only:
        return video.request(row, spec)
    try:
        fields = parse_json(row) if isinstance(row, str) else row
    except ValueError as error:
        raise InvalidRequestError("file", str(row)[:80], f"one JSON object a line ({cut(error)})") from error
    if isinstance(fields, str):
        return video.request(fields, spec)
    if not isinstance(fields, dict):
        raise InvalidRequestError("file", str(row)[:80], "one JSON object a line")
    common = video.request("-", spec).model_dump(exclude_unset=True, exclude={"prompt"})
    kept = {name: value for name, value in common.items() if not any(exclude(name, other) for other in fields)}
    return typed_request(**(kept | fields))
