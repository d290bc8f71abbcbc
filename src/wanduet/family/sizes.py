"""The sizes of videos that a model generates."""

from wanduet.errors import InvalidRequestError
from wanduet.family.spec import ModelSpec

# (height, width); 1080p is generated as 1088 rows and cropped.
RESOLUTIONS = {"480p": (480, 832), "720p": (720, 1280), "1080p": (1080, 1920)}
CROPPED_SIDE = 1080  # is generated with 1088 rows or columns and cropped


def generated_side(name: str, side: int, spec: ModelSpec) -> int:
    """Return the pixels that the model generates for a side (`name`) of `side` pixels. Raises InvalidRequestError."""
    multiple = spec.size_multiple
    limit = spec.transformer.rope_max_seq_len * multiple
    if side > limit:
        raise InvalidRequestError(name, side, f"at most {limit} pixels", limit)
    if side % multiple == 0 or side == CROPPED_SIDE:
        return -(-side // multiple) * multiple
    low = max(multiple, side // multiple * multiple)
    nearest = f"{low} or {side // multiple * multiple + multiple}" if side > multiple else str(multiple)
    raise InvalidRequestError(name, side, f"a multiple of {multiple} (or {CROPPED_SIDE}, which is cropped)", nearest)


def check_frames(num_frames: int, spec: ModelSpec) -> None:
    """Raise InvalidRequestError for a number of frames that the model does not generate."""
    stride = spec.vae.temporal_stride
    limit = (spec.transformer.rope_max_seq_len - 1) * stride + 1
    if num_frames > limit:
        raise InvalidRequestError("num_frames", num_frames, f"at most {limit} frames", limit)
    if (num_frames - 1) % stride:
        low = (num_frames - 1) // stride * stride + 1
        raise InvalidRequestError(
            "num_frames", num_frames, f"a number of the form {stride}n+1", f"{low + stride} or {low}"
        )


def frames_for_seconds(seconds: float, fps: int = 16, stride: int = 4) -> int:
    """Return the allowed number of frames (`stride * n + 1`) nearest to a duration."""
    return max(0, round(seconds * fps / stride)) * stride + 1


def parse_resolution(text: str) -> tuple[int, int]:
    """Parse `480p`, `720p`, `1080p` or `WIDTHxHEIGHT` to `(height, width)` in pixels. Raises InvalidRequestError."""
    name = text.strip().lower()
    if name in RESOLUTIONS:
        return RESOLUTIONS[name]
    width, _, height = name.partition("x")
    if all(side.isascii() and side.isdecimal() and len(side) < 6 for side in (width, height)):
        return int(height), int(width)
    allowed = ", ".join(RESOLUTIONS) + " or WIDTHxHEIGHT, for example 832x480"
    raise InvalidRequestError("resolution", text, allowed, f"{name}p" if f"{name}p" in RESOLUTIONS else None)
