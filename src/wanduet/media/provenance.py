"""A video's provenance: everything needed to make it again, as JSON in the file's metadata."""

import json
import math
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, is_dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from wanduet.request import ResolvedRequest
from wanduet.schedule import joined
from wanduet.untrusted import parse_json

SCHEMA_VERSION = 1
KEY = "wanduet"  # the tag in a video, and the entry in a safetensors header, that contains the JSON
TITLE_LENGTH = 120
MAX_LENGTH = 4 * 2**20  # characters of JSON; usual files have some thousand
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("request", "model", "engine", "versions", "timings", "output", "low_res"), dict),
    **dict.fromkeys(("rungs", "warnings", "hardware", "skipped_steps"), list),
    **dict.fromkeys(("attention", "created_at", "digest", "speed"), str | None),
    "price": dict | None,
}
_PACKAGES = ("wanduet", "torch", "diffusers", "transformers", "safetensors", "av", "numpy")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True)
class Making:
    """How one video was made.

    `seed` is this video's own (the request's plus its index). `model` has `name`, `hash`, `revision`; `engine` the
    settings and the plan's choices; `hardware` the devices' names; `notes` how the run deviated from its plan, such as out-of-memory fallbacks (`rungs` in the JSON);
    `timings` the seconds of the phases that are finished when the file is opened.
    """

    seed: int
    model: Mapping[str, Any]
    engine: Mapping[str, Any]
    hardware: Sequence[str] = ()
    attention: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()


def make_provenance(
    request: ResolvedRequest, making: Making, versions: Mapping[str, str], created_at: datetime
) -> dict[str, Any]:
    """Collect one video's provenance as JSON values, from the arguments alone."""
    plain = _plain(
        {
            "schema": SCHEMA_VERSION,
            "created_at": created_at.astimezone(UTC).isoformat(timespec="seconds"),
            "request": request.recorded(),
            "seed": making.seed,
            "model": making.model,
            "engine": making.engine,
            "attention": making.attention,
            "hardware": list(making.hardware),
            "versions": versions,
            "timings": making.timings,
            "rungs": list(making.notes),
            "warnings": list(making.warnings),
        }
    )
    assert isinstance(plain, dict)
    return plain


def versions() -> dict[str, str]:
    """Versions of all that affects the pixels. Imports nothing: reads installed metadata and loaded modules."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda:
        found["cuda"] = torch.version.cuda
        cudnn = torch.backends.cudnn.version()
        if cudnn is not None:
            found["cudnn"] = str(cudnn)
    if driver := _driver_version():
        found["driver"] = driver
    if "av" in sys.modules:
        found["ffmpeg"] = str(sys.modules["av"].ffmpeg_version_info)
        if x264 := x264_version():
            found["x264"] = x264
    return found


def to_json(provenance: Mapping[str, Any]) -> str:
    """Compact JSON in ASCII, which every container stores unchanged."""
    return json.dumps(_plain(provenance), ensure_ascii=True, allow_nan=False, separators=(",", ":"))


def from_json(text: str) -> dict[str, Any]:
    """Parse what `to_json` returned and check the types of known entries, as the text may come from anybody.

    Raises ValueError for anything else.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"it has {len(text)} characters")
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    wrong = [name for name, kind in _KINDS.items() if name in value and not isinstance(value[name], kind)]
    if wrong:
        raise ValueError(f"its {wrong[0]} is of a wrong kind")
    numbers = value.get("timings", {}).values()
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise ValueError("its timings are no numbers")
    if not all(type(step) is int for step in value.get("skipped_steps", ())):
        raise ValueError("its skipped steps are no numbers")
    if type(value.get("quantized_layers", 0)) is not int:
        raise ValueError("its number of quantized layers is no number")
    words = [word for name in ("rungs", "warnings") for word in value.get(name, ())]
    if not all(isinstance(word, str) for word in words):
        raise ValueError("its rungs and warnings are no texts")
    return value


def tags(provenance: Mapping[str, Any]) -> dict[str, str]:
    """A video's tags: title, comment and software, which players show, and the whole JSON under `wanduet`."""
    request = provenance.get("request", {})
    found = {"title": title(str(request.get("prompt", ""))), "comment": summary(provenance), "software": _software()}
    return {name: text for name, text in found.items() if text} | {KEY: to_json(provenance)}


def title(prompt: str) -> str:
    """A prompt, shortened to one line."""
    printable = "".join(c if c.isprintable() else " " for c in prompt)
    line = " ".join(printable.split())
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1].rstrip() + "…"


def summary(provenance: Mapping[str, Any]) -> str:
    """The settings as one line for people."""
    request, model = (p if isinstance(p, Mapping) else {} for p in map(provenance.get, ("request", "model")))
    parts = [str(model.get("name", ""))]
    if "seed" in provenance:
        parts.append(f"seed {provenance['seed']}")
    if "width" in request and "height" in request:
        parts.append(f"{request['width']}x{request['height']}")
    for name, label in (
        ("num_frames", "{} frames"),
        ("num_inference_steps", "{} steps"),
        ("guidance_scale", "guidance {:g}"),
        ("flow_shift", "shift {:g}"),
        ("timesteps", "timesteps {}"),
        ("sampler", "{}"),
        ("step_cache", "step cache {}"),
        ("guidance_mode", "guidance mode {}"),
        ("guidance_gate", "guidance up to {} of the steps"),
        ("guidance_interval", "guidance in {} of the steps"),
        ("sparse", "{:g} of the keys"),
        ("quantize", "products in {}"),
        ("quantize_attention", "attention in {}"),
        ("low_res_first", "low resolution first"),
        ("strength", "strength {:g} over an input video"),
    ):
        if name in request:
            value = request[name]
            with suppress(ValueError, TypeError):  # another type in a stranger's file
                parts.append(label.format(joined(value) if isinstance(value, list) else value))
    with suppress(KeyError, ValueError, TypeError):
        parts += [f"LoRA {lora['name']} at {lora['strength']:g}" for lora in request.get("loras", ())]
    return ", ".join(part for part in parts if part)


@cache
def x264_version() -> str | None:
    """x264's version, read from a frame that it encodes, as PyAV does not provide it."""
    import av

    if "libx264" not in av.codecs_available:
        return None
    context = av.CodecContext.create("libx264", "w")
    context.width = context.height = 16
    context.pix_fmt = "yuv420p"
    context.framerate = 1
    frame = av.VideoFrame(16, 16, "yuv420p")
    data = b"".join(bytes(packet) for packet in (*context.encode(frame), *context.encode(None)))
    match = re.search(rb"x264 - core (\d+(?: r\d+)?)", data)
    return match[1].decode() if match else None


def _driver_version() -> str | None:
    try:
        match = re.search(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER_FILE.read_text())
    except OSError:
        return None
    return match[1] if match else None


def _software() -> str:
    try:
        return f"wanduet {metadata.version('wanduet')}"
    except metadata.PackageNotFoundError:
        return "wanduet"


def _plain(value: Any) -> Any:
    """Convert to JSON values: other types become text, floats that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
