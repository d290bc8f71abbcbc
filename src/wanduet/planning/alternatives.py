"""Alternatives to offer if a job does not fit: fewer frames, a smaller picture, slower settings.

This module lists alternatives, the smallest change first; the planner decides whether one fits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, Literal

from wanduet.config import EngineConfig
from wanduet.errors import InvalidRequestError
from wanduet.family.sizes import RESOLUTIONS
from wanduet.family.spec import ModelSpec
from wanduet.planning.cost import predict_seconds
from wanduet.planning.hardware import Hardware
from wanduet.request import EXACT_VALUES, ResolvedRequest

Kind = Literal["frames", "size", "both", "mode"]
SHARES = (0.8, 0.6, 0.4, 0.2)  # of the frames
FEWER = (0.4, 0.1)  # of the frames, if the picture is smaller too
SMALL_SIZES = ((320, 512), (240, 416))  # in addition to the presets
AREAS = (0.5, 0.25, 0.1)  # of the picture's area, for pictures below every known size
LONGEST_SECONDS = 24 * 3600.0  # a job that takes longer on the CPU is not offered
SAME_SHAPE = 0.04  # relative tolerance: 832x480 counts as 16:9


@dataclass(frozen=True, slots=True)
class Alternative:
    """One alternative to a request. `change`: the changed fields and their values, as a user would enter them."""

    kind: Kind
    change: dict[str, Any]
    request: ResolvedRequest
    config: EngineConfig


def alternatives(
    request: ResolvedRequest, config: EngineConfig, spec: ModelSpec, hardware: Hardware
) -> Iterator[Alternative]:
    """Yield the alternatives. Each is a valid request: the engine accepts it if the user submits it."""
    sizes = _sizes(request, spec)
    for share in SHARES:
        yield from _reduced("frames", request, config, spec, share=share)
    for size in sizes:
        yield from _reduced("size", request, config, spec, size=size)
    for size in sizes:
        for share in FEWER:
            yield from _reduced("both", request, config, spec, share=share, size=size)
    for change in _modes(request, config, spec, hardware):
        yield Alternative("mode", change, request, replace(config, **change))


def _reduced(
    kind: Kind,
    request: ResolvedRequest,
    config: EngineConfig,
    spec: ModelSpec,
    *,
    share: float = 1.0,
    size: tuple[int, int] | None = None,
) -> Iterator[Alternative]:
    """Yield the request with `share` of its frames, or with `size` (height, width); nothing if that changes nothing. An
    approximation that such a request cannot have is off in it."""
    change: dict[str, Any] = {}
    stride = spec.vae.temporal_stride
    frames = int((request.num_frames - 1) * share) // stride * stride + 1
    if share < 1.0:
        if frames >= request.num_frames:
            return
        change["num_frames"] = frames
    if size is not None:
        change |= {"height": size[0], "width": size[1]}
    try:
        smaller = request.as_request().model_copy(update=change).resolve(spec)
    except InvalidRequestError as error:
        if error.field not in EXACT_VALUES:
            raise
        change[error.field] = EXACT_VALUES[error.field]
        smaller = request.as_request().model_copy(update=change).resolve(spec)
    yield Alternative(kind, change, smaller, config)


def _sizes(request: ResolvedRequest, spec: ModelSpec) -> list[tuple[int, int]]:
    """Return smaller sizes of about the same aspect ratio, largest first: known sizes (also portrait), else rounded."""
    area, shape, multiple = request.height * request.width, request.width / request.height, spec.size_multiple
    least = -(-16 // multiple) * multiple
    found: list[tuple[int, int]] = []
    known = [*sorted(RESOLUTIONS.values(), reverse=True), *SMALL_SIZES]
    for pixels, preset in [*((h * w, (h, w)) for h, w in known), *((int(area * a), None) for a in AREAS)]:
        if pixels >= area:
            continue
        size = next((s for s in _both_ways(preset) if _fits_shape(s, shape, multiple)), None)
        if size is None:
            height = sqrt(pixels / shape)
            size = (
                max(least, round(height / multiple) * multiple),
                max(least, round(height * shape / multiple) * multiple),
            )
        if size[0] * size[1] < area and size not in found:
            found.append(size)
    return sorted(found, key=lambda size: size[0] * size[1], reverse=True)


def _both_ways(preset: tuple[int, int] | None) -> tuple[tuple[int, int], ...]:
    return () if preset is None else (preset, preset[::-1])


def _fits_shape(size: tuple[int, int], shape: float, multiple: int) -> bool:
    height, width = size
    return abs(width / height / shape - 1) < SAME_SHAPE and not (height % multiple or width % multiple)


def _modes(
    request: ResolvedRequest, config: EngineConfig, spec: ModelSpec, hardware: Hardware
) -> Iterator[dict[str, Any]]:
    """Yield changes of the engine's settings with which it makes the same video more slowly or less exactly."""
    if config.text_encoder_hold == "resident":
        yield {"text_encoder_hold": "streamed"}
    if config.strategy != "auto":
        yield {"strategy": "auto"}
    half = {"transformer_dtype": "bfloat16"}
    on_cpu = (config.devices or "cpu").strip() == "cpu" and (config.devices is not None or not hardware.gpus)
    if config.transformer_dtype == "float32" or (config.transformer_dtype == "auto" and on_cpu):
        yield half
    if not on_cpu and predict_seconds(request, spec, hardware.cpu, hardware.cpu).total <= LONGEST_SECONDS:
        cpu = {"devices": "cpu"} | ({} if config.strategy in ("auto", "single") else {"strategy": "auto"})
        yield cpu
        yield cpu | half
