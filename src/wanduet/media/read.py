"""Reads videos that wanduet wrote: frames, properties, hashes, metadata."""

import errno
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

import av

from wanduet.media import provenance
from wanduet.media.codecs import Frame, ToRGB
from wanduet.media.files import UnreadableFileError
from wanduet.media.truncation import promised_bytes
from wanduet.untrusted import check_regular, cut, describe_file, not_safetensors, open_regular, read_safetensors_header

_CONTAINERS = "mov,mp4,matroska,webm"
# A file of latents or embeddings has one tensor, and metadata of about a prompt's size.
_HEADER_LIMIT = 16 * 2**20
# Fail after reading so much without a picture; an uncompressed picture of the largest size takes 0.8 GiB.
_MOST_WITHOUT_A_PACKET = 2**30

# libavutil's values of the names that ffprobe shows.
_PRIMARIES = {1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020"}
_TRANSFERS = {1: "bt709", 6: "smpte170m", 13: "iec61966-2-1"}
_MATRICES = {0: "gbr", 1: "bt709", 5: "bt470bg", 6: "smpte170m", 9: "bt2020nc"}
_RANGES = {1: "tv", 2: "pc"}


@dataclass(frozen=True, slots=True)
class FrameHashes:
    """SHA-256 of each decoded RGB frame, and of all frames together."""

    frames: tuple[str, ...]
    digest: str


def read_frames(path: Path | str) -> Iterator[Frame]:
    """Decode frames as uint8 RGB `[H, W, 3]`, by the file's colour tags. Raises UnreadableFileError."""
    with _open_video(Path(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        convert: ToRGB | None = None
        for packet in packets(container, stream):
            for frame in packet.decode():
                convert = convert or ToRGB(frame)
                yield convert(frame)


def probe(path: Path | str) -> dict[str, Any]:
    """A video's container, codec, size, fps, frames, seconds and colour tags. Decodes no frame."""
    path = Path(path)
    with _open_video(path) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        count = sum(1 for packet in packets(container, stream) if packet.size)
        fps = stream.average_rate or stream.guessed_rate  # both may be unknown for a damaged file
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
    """SHA-256 of a frame's size and pixels. A lossless file gives the hashes of the encoded frames."""
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
        raise UnreadableFileError(f"{path}: its {provenance.KEY} metadata is damaged ({cut(error)}).") from error


def tensor_names(path: Path) -> set[str]:
    """The names of a safetensors file's tensors, of which none is read. Raises UnreadableFileError."""
    return set(_safetensors_header(path)) - {"__metadata__"}


def has_metadata(path: Path) -> bool:
    """Whether a safetensors file has metadata. Without it, the file is another program's, not a damaged one of ours.

    Raises UnreadableFileError.
    """
    entries = _safetensors_header(path).get("__metadata__")
    return bool(entries) and (not isinstance(entries, dict) or set(entries) != {"format"})


def _safetensors_header(path: Path) -> dict[str, Any]:
    """Read only the JSON header of a safetensors file. Raises UnreadableFileError."""
    try:
        return read_safetensors_header(path, _HEADER_LIMIT)
    except OSError as error:
        raise UnreadableFileError(f"Cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise UnreadableFileError(f"{path} is {not_safetensors(path, error)}.") from error


def _header_tag(path: Path) -> str | None:
    entries = _safetensors_header(path).get("__metadata__")
    value = entries.get(provenance.KEY) if isinstance(entries, dict) else None
    return value if isinstance(value, str) else None


def _video_tag(path: Path) -> str | None:
    with _open_video(path) as container:
        # Matroska stores tag names in capitals.
        return next((v for k, v in container.metadata.items() if k.lower() == provenance.KEY), None)


class _Bounded(io.BufferedIOBase):
    """A file that raises after too much was read without a result: a sparse file can have gaps of terabytes."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self.left = _MOST_WITHOUT_A_PACKET

    def read(self, size: int | None = -1) -> bytes:
        data = self._file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise OSError(0, f"{_MOST_WITHOUT_A_PACKET} bytes of it hold no picture")
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return self._file.seek(offset, whence)
        except (OSError, ValueError):  # a damaged file's negative place: libavformat's error, without PyAV's traceback
            return -errno.EINVAL

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def open_container(file: BufferedReader, containers: str, **options: str) -> Any:
    """Open a file with PyAV, for `packets`. `containers`: the names of the allowed ones, separated by commas.

    Files that it refers to are not opened: a playlist could name any file or address.
    """
    options |= {"protocol_whitelist": "none", "format_whitelist": containers}
    return av.open(_Bounded(file), "r", options=options, io_open=_refuse_other_files)


def _refuse_other_files(*_: Any) -> NoReturn:
    raise PermissionError("A video's file may not open others.")


def packets(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the packets of one stream, and a last, empty one that flushes the decoder. Raises OSError if a gigabyte of
    the file has none."""
    for packet in container.demux(stream):
        container.file.file.left = _MOST_WITHOUT_A_PACKET
        yield packet


def _require_whole(path: Path) -> None:
    """Raise UnreadableFileError for a truncated file. Raises OSError."""
    size = check_regular(path)
    if not size:
        raise UnreadableFileError(f"{path} is empty.")
    with open_regular(path) as file:
        promised = promised_bytes(file)
    if size < promised:
        raise UnreadableFileError(
            f"{path} is cut off: it has {size} bytes, and says that it has {promised} or more.",
            hint="Copy or download it again.",
        )


@contextmanager
def _open_video(path: Path) -> Iterator[Any]:
    """Open a container; all errors inside the context are raised as UnreadableFileError."""
    try:
        _require_whole(path)
        with open_regular(path) as file, open_container(file, _CONTAINERS) as container:
            if not container.streams.video or container.streams.video[0].codec_context is None:
                raise UnreadableFileError(f"{path} holds no video that can be read.")
            yield container
    except (OSError, ValueError, av.FFmpegError) as error:
        kind = None
        if isinstance(error, av.FFmpegError):  # whose words would not help: invalid data, invalid argument
            with suppress(OSError):
                kind = describe_file(path)
        if kind is not None:
            raise UnreadableFileError(f"{path} is {kind}, not a video.") from error
        reason = getattr(error, "strerror", None) or str(error)
        raise UnreadableFileError(f"Cannot read {path}: {cut(reason)}.") from error
