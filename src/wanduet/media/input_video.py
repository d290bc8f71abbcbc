"""Reads the video that a request starts from: what it is, and its frames in the size and frame rate of the result.

The file may come from anybody: FFmpeg sees only an open file, never a path or an address, and only containers that
hold their pictures themselves.
"""

import hashlib
import heapq
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import av
import numpy as np
from av.video.reformatter import ColorRange
from numpy.typing import NDArray

from wanduet.errors import InvalidRequestError
from wanduet.family.spec import ModelSpec
from wanduet.family.speeds import Prices, not_measured
from wanduet.media.codecs import Frame, ToRGB
from wanduet.media.read import open_container, packets
from wanduet.media.truncation import promised_bytes
from wanduet.request import INPUT_HASH, GenerationRequest, ResolvedRequest
from wanduet.source_video import SourceVideo
from wanduet.untrusted import cut, describe_file, open_regular

MAX_SIDE = 8192  # of a square frame; the longer side of others may be longer
MAX_PROPORTION = 16  # of the longer to the shorter side
DECODER_THREADS = 4  # each needs memory for a frame
_MAX_PIXELS = str(MAX_SIDE**2)
_CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpegts,mpeg,flv,asf,ogg,mxf"
_MISSING_AT_THE_END = 1  # seconds for which the last frame is repeated, if the container promised more
_CONVERT = "convert it to MP4 with H.264, for example with HandBrake or ffmpeg"
# Decoders with which the alpha channel of these is decoded, too.
_ALPHA_DECODERS = {"vp9": "libvpx-vp9", "vp8": "libvpx"}
# libavutil's AVColorSpace
_MATRIX_RGB = 0
_MATRIX_UNSPECIFIED = 2
_MATRIX_BT2020 = 9
_YUV_MATRICES = (1, 4, 5, 6, 7, _MATRIX_BT2020)  # those that the scaler knows


def resolve(request: GenerationRequest, spec: ModelSpec, prices: Prices = not_measured) -> ResolvedRequest:
    """`GenerationRequest.resolve`, which for an input video reads its size, length and hash first.

    The path becomes absolute: it is read again later, and the current folder may have changed by then.

    Raises InvalidRequestError, also for a file that is not a video.
    """
    if request.input_video is None or request.input_video.startswith(INPUT_HASH):
        return request.resolve(spec, None, prices)
    path = Path(request.input_video)
    source = read_source(path)
    return request.model_copy(update={"input_video": str(_absolute(path))}).resolve(spec, source, prices)


def read_source(path: Path) -> SourceVideo:
    """Return the size, length and hash of a video file. Reads the file once or twice and decodes its first frame.

    Raises InvalidRequestError of the field `input_video`.
    """
    with _open(path) as clip:
        packets_left = clip.packets()
        start, first = next(clip.frames(packets_left))
        for _ in packets_left:
            pass  # the header's length may be wrong or missing
        if clip.container.format.name == "gif" and clip.num_packets == 1:
            _refuse_picture(path, "a GIF picture without animation")
        height, width = clip.shown_size(first)
        return SourceVideo(_hash(clip.file), height, width, max(0.0, float(clip.end - start)))


def frames_of(request: ResolvedRequest) -> Callable[[], Iterator[NDArray[np.uint8]]]:
    """Return a function that reads the frames of a request's input video from the start, see `read_frames`.

    Reading raises InvalidRequestError if the file is not the one that it was when the request was resolved.
    """
    path, size = Path(request.input_video or ""), (request.generated_height, request.generated_width)

    return partial(read_frames, path, size, request.num_frames, request.fps, request.input_sha256)


def check_is_file(request: GenerationRequest) -> None:
    """Raise InvalidRequestError if the input video is named by a hash, as in the records of a video."""
    if request.input_video is not None and request.input_video.startswith(INPUT_HASH):
        wanted = "the path of that file: a record of a video has only its hash"
        raise InvalidRequestError("input_video", request.input_video[:20] + "...", wanted)


def _hash(file: Any) -> str:
    place = file.tell()
    file.seek(0)
    found = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(place)  # where FFmpeg goes on
    return found


def read_frames(
    path: Path, size: tuple[int, int], num_frames: int, fps: float, sha256: str | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Yield the first `num_frames` frames at `fps` a second, `[t, H, W, 3]` uint8 of height and width `size`, first
    one frame, then four at a time.

    Frame i is the one shown i/fps seconds after the first. Pictures of other proportions are cropped, around the centre.
    Decodes no more of the file than that needs, and without `sha256` reads no more. Raises InvalidRequestError of the
    field `input_video`, also for a file with another hash than `sha256`.
    """
    with _open(path) as clip:
        if sha256 is not None and _hash(clip.file) != sha256:
            _refuse(path, "it has changed since it was given; give it again")
        chunk: list[Frame] = []
        room, shown = 1, None
        for frame in _at_rate(clip, num_frames, Fraction(fps)):
            if frame is not shown:
                shown, picture = frame, clip.picture(frame, size)
            chunk.append(picture)
            if len(chunk) == room:
                yield np.stack(chunk)
                chunk, room = [], 4
        if chunk:
            yield np.stack(chunk)


def _at_rate(clip: "_Clip", count: int, fps: Fraction) -> Iterator[Any]:
    """Yield the frame that is shown at each of `count` moments."""
    frames = clip.frames(clip.packets())
    start, current = next(frames)
    now, (later, following) = start, next(frames, (None, None))
    for moment in (start + index / fps for index in range(count)):
        # Containers round times to ticks: to the millisecond in WebM, to 1/100 s in GIF. Without this tolerance, a
        # clip of the wanted frame rate would lose some frames and show others twice.
        while later is not None and moment >= later - clip.tolerance(later - now):
            now, current = later, following
            later, following = next(frames, (None, None))
        if later is None and moment >= now + clip.duration_of(current) + _MISSING_AT_THE_END:
            end, wanted = float(now - start), float(count / fps)
            _refuse(clip.path, f"its pictures end after {end:.1f} of {wanted:.1f} seconds; it has been changed, or is "
                    "damaged")  # fmt: skip
        yield current


class _Clip:
    """The video stream of an open file. Times are in seconds of the file's own clock.

    `num_packets`: the number of pictures in the packets so far.
    """

    def __init__(self, path: Path, file: Any, container: Any) -> None:
        self.path, self.file, self.container = path, file, container
        self.stream = _choose_stream(path, container)
        self.num_packets = 0
        self._end = 0  # in ticks
        self._decoder = _decoder(self.stream)
        self._orientation: _Orientation | None = None
        self._converters: dict[Any, ToRGB] = {}
        self._tick = self.stream.time_base or Fraction(1, 1000)
        rate = self.stream.average_rate or self.stream.guessed_rate
        self._interval = 1 / rate if rate else Fraction(0)
        self._frame_ticks = round(self._interval / self._tick)
        # AVI has no presentation times, and FFmpeg's guesses are wrong with B-frames: frames get the packets' times in
        # ascending order.
        self._is_in_order = container.format.name == "avi"

    @property
    def end(self) -> Fraction:
        """When the last picture of the packets so far is no longer shown."""
        return Fraction(self._end * self._tick)

    def packets(self) -> Iterator[Any]:
        """Yield the packets with pictures, and None at the end."""
        for packet in packets(self.container, self.stream):
            if packet.size:  # an empty one repeats a picture, but means the end to a decoder
                packet.pts = packet.dts if self._is_in_order or packet.pts is None else packet.pts
                if not packet.is_discard:  # which is decoded, but cut out of the video
                    end = (packet.pts or 0) + (packet.duration or self._frame_ticks)
                    self._end = max(self._end, end) if self.num_packets else end
                    self.num_packets += 1
                yield packet
        yield None

    def frames(self, of_packets: Iterator[Any]) -> Iterator[tuple[Fraction, Any]]:
        """Yield frames and the times at which they are shown, which never decrease. There is at least one."""
        now: Fraction | None = None
        times: list[int] = []
        for packet in of_packets:
            if self._is_in_order and packet is not None and packet.pts is not None:
                heapq.heappush(times, packet.pts)
            for frame in self._decode(packet):
                frame.pts = heapq.heappop(times) if times else frame.pts
                time = self._time_of(frame, now)
                now = time if now is None else max(now, time)
                yield now, frame
        if now is None:
            _refuse(self.path, f"none of its pictures can be decoded, or they have more than {MAX_SIDE}x{MAX_SIDE} "
                    f"pixels; {_CONVERT}")  # fmt: skip

    def _decode(self, packet: Any) -> list[Any]:
        """Decode a packet; None: what the decoder still has. Damaged pictures are left out, as in players."""
        with suppress(av.FFmpegError):
            return list(self._decoder.decode(packet))
        return []

    def _time_of(self, item: Any, before: Fraction | None = None) -> Fraction:
        """When a frame or packet is shown; if it does not say, a frame after `before`."""
        ticks = item.dts if item.pts is None else item.pts
        if ticks is not None:
            return Fraction(ticks * self._tick)
        return Fraction(0) if before is None else before + self._interval

    def duration_of(self, item: Any) -> Fraction:
        """How long a frame or packet is shown."""
        return item.duration * self._tick if item.duration else self._interval

    def tolerance(self, interval: Fraction) -> Fraction:
        """How far the rounding to ticks may shift frames at this interval; times in units of frames are exact."""
        return min(self._tick, interval / 4) if interval > self._tick else Fraction(0)

    def shown_size(self, frame: Any) -> tuple[int, int]:
        """Return the height and width of a frame in square pixels, upright. Raises InvalidRequestError."""
        ratio = self.stream.sample_aspect_ratio or 1
        height, width = frame.height, max(1, round(frame.width * ratio))
        if max(height, width) > MAX_PROPORTION * min(height, width):  # scaled to cover a size, they would be huge
            _refuse(self.path, f"its pictures have {width}x{height} pixels; the longer side may be at most "
                    f"{MAX_PROPORTION} times the shorter; crop it")  # fmt: skip
        return (width, height) if self._orientation_of(frame).transposed else (height, width)

    def _orientation_of(self, frame: Any) -> "_Orientation":
        # Of the first frame only: reading it makes a circle of references, and so a leak until the next collection.
        if self._orientation is None:
            self._orientation = _Orientation.of(frame)
        return self._orientation

    def picture(self, frame: Any, size: tuple[int, int]) -> Frame:
        """Return a frame as RGB `[H, W, 3]` of height and width `size`: scaled to cover it, and cropped."""
        height, width = size
        shown_height, shown_width = self.shown_size(frame)
        scale = max(Fraction(height, shown_height), Fraction(width, shown_width))
        covering = max(height, round(shown_height * scale)), max(width, round(shown_width * scale))
        orientation = self._orientation_of(frame)
        rgb = self._rgb(frame, covering[::-1] if orientation.transposed else covering)
        rgb = orientation.upright(rgb)
        top, left = (rgb.shape[0] - height) // 2, (rgb.shape[1] - width) // 2
        return np.ascontiguousarray(rgb[top : top + height, left : left + width])

    def _rgb(self, frame: Any, size: tuple[int, int]) -> Frame:
        _repair_tags(frame)
        if any(part.is_alpha for part in frame.format.components):
            frame = _over_black(self._converted(frame, (frame.height, frame.width), "rgba"))
        return self._converted(frame, size, "rgb24")

    def _converted(self, frame: Any, size: tuple[int, int], pixel_format: str) -> Frame:
        tags = int(frame.colorspace), int(frame.color_range)
        key = frame.width, frame.height, frame.format.name, tags, size, pixel_format  # a stream may change them
        if key not in self._converters:
            if len(self._converters) > 1:
                self._converters.clear()
            self._converters[key] = ToRGB(frame, size, pixel_format)
        return self._converters[key](frame)


@dataclass(frozen=True, slots=True)
class _Orientation:
    """How a stored picture is shown upright: first transposed, then flipped."""

    transposed: bool = False
    flipped_rows: bool = False
    flipped_columns: bool = False

    @classmethod
    def of(cls, frame: Any) -> "_Orientation":
        """Read the display matrix, which maps (x, y) to (a x + c y, b x + d y). Angles are rounded to 90 degrees."""
        with suppress(KeyError, ValueError, struct.error):  # ValueError: side data that PyAV does not know
            a, b, _, c, d, *_ = struct.unpack("9i", bytes(frame.side_data["DISPLAYMATRIX"]))
            transposed = abs(b) > abs(a)
            return cls(transposed, (b if transposed else d) < 0, (c if transposed else a) < 0)
        return cls()

    def upright(self, picture: Frame) -> Frame:
        """Return a view of a picture `[H, W, 3]`."""
        picture = picture.swapaxes(0, 1) if self.transposed else picture
        return picture[:: -1 if self.flipped_rows else 1, :: -1 if self.flipped_columns else 1]


def _repair_tags(frame: Any) -> None:
    """Replace colour tags that the scaler does not know, as those of ICtCp, by ones that it does."""
    matrix = int(frame.colorspace)
    if matrix == _MATRIX_BT2020 + 1:  # constant luminance
        frame.colorspace = _MATRIX_BT2020
    elif matrix not in _YUV_MATRICES and not (frame.format.is_rgb and matrix == _MATRIX_RGB):
        frame.colorspace = _MATRIX_UNSPECIFIED


def _over_black(rgba: NDArray[np.uint8]) -> Any:
    """An `av.VideoFrame` of pictures `[H, W, 4]` on black."""
    colours, alpha = rgba[..., :3].astype(np.uint16), rgba[..., 3:]
    frame = av.VideoFrame.from_ndarray(((colours * alpha + 127) // 255).astype(np.uint8), "rgb24")
    frame.colorspace, frame.color_range = _MATRIX_RGB, ColorRange.JPEG
    return frame


@contextmanager
def _open(path: Path) -> Iterator[_Clip]:
    """Open a video file; errors of the file inside the context are raised as InvalidRequestError."""
    try:
        _refuse_addresses(path)
        path = _absolute(path)
        with open_regular(path) as file:
            _check_kind(path, file)
            with open_container(file, _CONTAINERS, max_pixels=_MAX_PIXELS) as container:
                yield _Clip(path, file, container)
    except (FileNotFoundError, NotADirectoryError):
        _refuse(path, "there is no such file; it must be the path of a video file")
    except (ValueError, av.FFmpegError):  # ValueError: also NUL in the path
        _refuse(path, f"it is damaged, or not a video of a known kind; {_CONVERT}")
    except OSError as error:
        _refuse(path, f"{cut(error.strerror or error)}; it must be a video file that can be read")


def _absolute(path: Path) -> Path:
    """Expand `~/x`, which no shell expands in the environment, in a settings file or after `=`."""
    with suppress(OSError, RuntimeError):  # no current folder, no such user: opening the file raises the error
        return path.expanduser().absolute()
    return path


def _refuse(path: Path, reason: str) -> NoReturn:
    raise InvalidRequestError("input_video", cut(path.name or path), reason) from None


def _refuse_picture(path: Path, kind: str) -> NoReturn:
    _refuse(path, f"it is {kind}; image to video needs another model of the Wan family, as this one, for text to "
            "video, starts from noise or from a video")  # fmt: skip


def _refuse_addresses(path: Path) -> None:
    """Raise InvalidRequestError for what people write instead of a file."""
    name = path.as_posix()  # which has http:// as http:/
    if (name == "-" or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", name)) and not path.exists():
        kind = "the standard input" if name == "-" else "an address"
        _refuse(path, f"{kind} is not read; it must be a file; save the video first, and give its path")


def _check_kind(path: Path, file: Any) -> None:
    """Raise InvalidRequestError for an empty or truncated file, a picture, or what is known not to be a video."""
    size = os.fstat(file.fileno()).st_size
    if not size:
        _refuse(path, "it is empty; it must be a video file")
    kind = describe_file(path)
    if kind is not None and kind.endswith("picture") and "GIF" not in kind:
        _refuse_picture(path, kind)
    if kind is not None and "GIF" not in kind:
        _refuse(path, f"it is {kind}; it must be a video file")
    if size < promised_bytes(file):
        _refuse(path, f"it is cut off after {size} bytes; copy or download it again")
    file.seek(0)


def _choose_stream(path: Path, container: Any) -> Any:
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:  # the cover of a song
        _refuse(path, "it has no pictures, only sound or other data; it must be a video file")
    if stream.codec_context is None:
        _refuse(path, f"its pictures are compressed by a method that cannot be read; {_CONVERT}")
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    return stream


def _decoder(stream: Any) -> Any:
    """The stream's decoder, or one that also decodes its alpha channel."""
    decoder = stream.codec_context
    name = _ALPHA_DECODERS.get(decoder.codec.canonical_name)
    if name in av.codecs_available and stream.metadata.get("alpha_mode", stream.metadata.get("ALPHA_MODE")) == "1":
        decoder = av.CodecContext.create(name, "r")
        decoder.extradata = stream.codec_context.extradata
    decoder.options = decoder.options | {"max_pixels": _MAX_PIXELS}
    decoder.thread_count, decoder.thread_type = DECODER_THREADS, "AUTO"
    return decoder
