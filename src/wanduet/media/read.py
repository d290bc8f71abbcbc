"""Videos that wanduet wrote, read back: frames, facts, hashes, metadata."""

import hashlib
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from wanduet.media import provenance
from wanduet.media.codecs import Frame, ToRGB
from wanduet.media.files import UnreadableFileError

# Only files of these kinds, and nothing that they point to: a playlist could name any file or address.
_OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": "mov,mp4,matroska,webm"}
_HEADER_LIMIT = 100 * 2**20  # what safetensors itself allows

# libavutil's numbers by the names that ffprobe shows.
_PRIMARIES = {1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020"}
_TRANSFERS = {1: "bt709", 6: "smpte170m", 13: "iec61966-2-1"}
_MATRICES = {0: "gbr", 1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020nc"}
_RANGES = {1: "tv", 2: "pc"}


@dataclass(frozen=True, slots=True)
class FrameHashes:
    """SHA-256 of each decoded RGB frame, and one digest of them all."""

    frames: tuple[str, ...]
    digest: str


def read_frames(path: Path | str) -> Iterator[Frame]:
    """Decoded frames, uint8 RGB `[H, W, 3]`, by the file's colour tags. Raises UnreadableFileError."""
    with _open_video(Path(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        convert: ToRGB | None = None
        for frame in container.decode(stream):
            convert = convert or ToRGB(frame)
            yield convert(frame)


def probe(path: Path | str) -> dict[str, Any]:
    """Facts about a video: container, codec, size, fps, frames, seconds, colour tags. Decodes no frame."""
    path = Path(path)
    with _open_video(path) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        count = sum(1 for packet in container.demux(stream) if packet.size)
        fps = stream.average_rate or stream.guessed_rate  # neither is known of a damaged file
        return {
            "container": container.format.name,
            "codec": context.codec.canonical_name,
            "pixel_format": context.pix_fmt,
            "width": context.width,
            "height": context.height,
            "fps": float(fps) if fps else None,
            "num_frames": count,
            "duration_s": float(count / fps) if fps else None,
            "colour": {
                "primaries": _PRIMARIES.get(int(context.color_primaries), "unknown"),
                "transfer": _TRANSFERS.get(int(context.color_trc), "unknown"),
                "matrix": _MATRICES.get(int(context.colorspace), "unknown"),
                "range": _RANGES.get(int(context.color_range), "unknown"),
            },
            "num_bytes": path.stat().st_size,
        }


def frame_hashes(path: Path | str) -> FrameHashes:
    """Hash every frame, to compare two videos or to verify one. Raises UnreadableFileError."""
    hashes = tuple(hash_frame(frame) for frame in read_frames(path))
    return FrameHashes(hashes, hashlib.sha256("".join(hashes).encode()).hexdigest())


def hash_frame(frame: Frame) -> str:
    """SHA-256 of a frame's size and pixels; a lossless file gives the hashes of the frames it was made from."""
    return hashlib.sha256(repr(frame.shape).encode() + frame.tobytes()).hexdigest()


def read_metadata(path: Path | str) -> dict[str, Any]:
    """The provenance in a video or a latents file. Raises UnreadableFileError if there is none."""
    path = Path(path)
    text = _header_tag(path) if path.suffix.lower() == ".safetensors" else _video_tag(path)
    if text is None:
        is_video = path.suffix.lower() != ".safetensors"
        hint = "Was it re-encoded or edited?" if is_video else "Latents of wanduet's are kept by --save-latents."
        raise UnreadableFileError(f"{path} says nothing about how it was made.", hint=hint)
    try:
        return provenance.from_json(text)
    except ValueError as error:
        raise UnreadableFileError(f"{path}: its {provenance.KEY} metadata is damaged ({error}).") from error


def has_metadata(path: Path) -> bool:
    """Whether a safetensors file says anything of itself: a damaged name of ours is not another program's silence.

    Raises UnreadableFileError.
    """
    entries = _safetensors_header(path).get("__metadata__")
    return bool(entries) and (not isinstance(entries, dict) or set(entries) != {"format"})


def _safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file, without its tensors. Raises UnreadableFileError."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _HEADER_LIMIT:
                raise ValueError("the header is too long")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UnreadableFileError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, struct.error) as error:
        raise UnreadableFileError(f"{path} is no safetensors file, or damaged ({error}).") from error
    if not isinstance(header, dict):
        raise UnreadableFileError(f"{path} is no safetensors file: its header is no JSON object.")
    return header


def _header_tag(path: Path) -> str | None:
    entries = _safetensors_header(path).get("__metadata__")
    value = entries.get(provenance.KEY) if isinstance(entries, dict) else None
    return value if isinstance(value, str) else None


def _video_tag(path: Path) -> str | None:
    with _open_video(path) as container:
        # Matroska writes tag names in capitals.
        return next((v for k, v in container.metadata.items() if k.lower() == provenance.KEY), None)


@contextmanager
def _open_video(path: Path) -> Iterator[Any]:
    """The opened container; whatever goes wrong while it is read becomes UnreadableFileError."""
    try:
        with path.open("rb") as file, av.open(file, "r", options=_OPEN_OPTIONS) as container:
            if not container.streams.video or container.streams.video[0].codec_context is None:
                raise UnreadableFileError(f"{path} holds no video that can be read.")
            yield container
    except (OSError, ValueError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableFileError(f"Cannot read {path}: {reason}.") from error
