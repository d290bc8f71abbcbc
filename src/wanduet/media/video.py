"""Writes a video file while its frames are still being decoded.

The encoder runs in a thread with a queue of a few frames, so that the GPU does not wait for it and memory does not grow
with the video's length. The file gets its final name once all of it is on the disk.
"""

import os
import queue
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Self

import av
import numpy as np
from numpy.typing import NDArray

from wanduet.errors import InvalidRequestError, OutputError
from wanduet.media import provenance
from wanduet.media.codecs import (
    CHROMA_SITE,
    DEFAULT_QUALITY,
    ENCODER_THREADS,
    Codec,
    Frame,
    ToVideoFrame,
    container_for,
    find_codec,
    tag_stream,
)
from wanduet.media.files import atomic_output, output_error
from wanduet.media.segments import SegmentEncoder

QUEUE_BYTES = 64 * 2**20
MIN_QUEUE_FRAMES = 4
KEYFRAME_SECONDS = 2  # distance of keyframes, which a player seeks to
MAX_FPS = 120
DEFAULT_CODEC = "h264"


@dataclass(frozen=True, slots=True)
class VideoSpec:
    """Encoding settings. Frames larger than `height` x `width` are cropped at the bottom and right.

    `quality` is 1 (smallest file) to 100 (best), by default 75; from 75 up, video looks like the original. FFV1 is
    lossless and takes no quality. Raises InvalidRequestError.
    """

    height: int
    width: int
    fps: int = 16
    codec: str = DEFAULT_CODEC
    quality: int | None = None

    def __post_init__(self) -> None:
        codec = find_codec(self.codec)
        if not 1 <= self.fps <= MAX_FPS:
            raise InvalidRequestError("fps", self.fps, f"1 to {MAX_FPS}", min(max(self.fps, 1), MAX_FPS))
        if self.quality is not None and codec.lossless:
            raise InvalidRequestError("quality", self.quality, f"{codec.name} is lossless and has no quality setting")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise InvalidRequestError("quality", self.quality, "1 to 100", min(max(self.quality, 1), 100))
        step = 1 if codec.lossless else 2  # 4:2:0 has one chroma sample for two rows and two columns
        for name, side in (("height", self.height), ("width", self.width)):
            if side < 1 or side % step:
                raise InvalidRequestError(name, side, f"an even number of pixels for {codec.name}", max(2, side - 1))

    @property
    def options(self) -> dict[str, str]:
        """The encoder's options."""
        codec = find_codec(self.codec)
        options = dict(codec.options)
        if not codec.lossless:
            options["crf"] = f"{codec.crf(DEFAULT_QUALITY if self.quality is None else self.quality):g}"
            options["chroma_sample_location"] = CHROMA_SITE
            options["g"] = str(KEYFRAME_SECONDS * self.fps)
        return options


@dataclass(frozen=True, slots=True)
class WrittenVideo:
    """A finished file."""

    path: Path
    num_frames: int
    num_bytes: int


def write_video(
    frames: Iterable[NDArray[np.uint8]],
    path: Path | str,
    spec: VideoSpec | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> WrittenVideo:
    """Encode RGB frames (`[H, W, 3]` or chunks `[t, H, W, 3]`, uint8) as they come and put the file at `path`.

    `spec`: by default the first frame's size, and `VideoSpec`'s own defaults; larger frames than its size are cropped at
    the bottom and right. `metadata` is a provenance dict. After an error, from `frames` or from the encoder, `path` is unchanged. Raises InvalidRequestError,
    OutputError, or ValueError for frames of the wrong shape.
    """
    path = Path(path)
    container_for(path, DEFAULT_CODEC if spec is None else spec.codec)
    writer: VideoWriter | None = None
    with ExitStack() as opened:
        for chunk in frames:
            if writer is None:
                size = spec or VideoSpec(chunk.shape[-3], chunk.shape[-2])
                writer = opened.enter_context(VideoWriter(path, size, metadata))
            writer.write(chunk)
        if writer is None:
            raise ValueError("There are no frames to write.")
        return writer.close()


class VideoWriter:
    """Writes one video from frames that arrive over time, in any number.

    A context manager: finishes the file on exit, or deletes it after an error.
    """

    def __init__(self, path: Path | str, spec: VideoSpec, metadata: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.spec = spec
        self._container = container_for(self.path, spec.codec)
        self._tags = provenance.tags(metadata) if metadata is not None else {}
        room = max(MIN_QUEUE_FRAMES, QUEUE_BYTES // (3 * spec.height * spec.width))
        self._queue: queue.Queue[Frame | Literal["finish", "abort"]] = queue.Queue(room)
        self._last_word: Literal["finish", "abort"] | None = None
        self._error: BaseException | None = None
        self._count = 0
        self._result: WrittenVideo | None = None
        self._thread = threading.Thread(target=self._run, name="wanduet-video", daemon=True)
        self._thread.start()

    def write(self, frames: NDArray[np.uint8]) -> None:
        """Add a copy of one frame `[H, W, 3]` or of a chunk `[t, H, W, 3]`.

        Raises the encoder thread's error, and ValueError for a wrong shape or dtype.
        """
        chunk = frames if frames.ndim == 4 else frames[None]
        height, width = self.spec.height, self.spec.width
        if frames.dtype != np.uint8 or chunk.ndim != 4 or chunk.shape[3] != 3:
            raise ValueError(f"Frames must be uint8 [t, H, W, 3], not {frames.dtype} {list(frames.shape)}.")
        if chunk.shape[1] < height or chunk.shape[2] < width:
            raise ValueError(f"Frames of {chunk.shape[2]}x{chunk.shape[1]} are smaller than {width}x{height}.")
        for frame in chunk[:, :height, :width]:
            if self._error is not None:
                raise self._error
            self._queue.put(frame.copy())

    def close(self) -> WrittenVideo:
        """Finish the file; returns once it is on the disk under its name. Raises the encoder thread's error."""
        self._stop("finish")
        if self._error is not None:
            raise self._error
        if self._result is None:
            raise ValueError(f"{self.path} was aborted, or has no frames.")
        return self._result

    def abort(self) -> None:
        """Stop at once and delete the partial file. Does nothing to a finished file."""
        self._stop("abort")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _stop(self, how: Literal["finish", "abort"]) -> None:
        if self._thread.is_alive():
            self._queue.put(how)
            self._thread.join()

    # The encoder thread. After an error it continues to empty the queue, so that the caller does not block.

    def _run(self) -> None:
        try:
            self._encode_all()
        except _AbortedError:
            return
        except (OSError, av.FFmpegError) as error:
            self._error = output_error(self.path, error)
            self._error.__cause__ = error
        except BaseException as error:
            self._error = error
        while self._last_word is None:
            self._take()

    def _take(self) -> Frame | None:
        """The next frame, or None after the last one."""
        item = self._queue.get()
        if isinstance(item, str):
            self._last_word = item
            return None
        return item

    def _encode_all(self) -> None:
        with atomic_output(self.path, keep_finished=True) as partial:
            encoder = _Encoder(partial, self._container, self.spec, self._tags)
            try:
                while (frame := self._take()) is not None:
                    encoder.add(frame)
                    self._count += 1
                if self._last_word == "abort" or not self._count:
                    raise _AbortedError
                encoder.finish()
            except BaseException:
                encoder.discard()
                raise
            num_bytes = partial.stat().st_size
            if not num_bytes:
                raise OutputError(f"Cannot write {self.path}: the encoder wrote nothing.", hint="Try another --codec.")
        self._result = WrittenVideo(self.path, self._count, num_bytes)


class _AbortedError(Exception):
    """The caller aborted, or sent no frames."""


class _Encoder:
    """A PyAV container with one video stream."""

    def __init__(self, path: Path, container: str, spec: VideoSpec, tags: Mapping[str, str]) -> None:
        codec: Codec = find_codec(spec.codec)
        if codec.name == "av1":
            os.environ.setdefault("SVT_LOG", "1")  # otherwise SVT-AV1 prints its settings to stderr
        # bitexact: no random ids in Matroska. faststart: the index comes before the frames, so that browsers
        # start at once; it costs a second pass over the file, under a millisecond for a 2 MB clip.
        options = {"fflags": "+bitexact"}
        if container in ("mp4", "mov"):
            options["movflags"] = "+faststart+use_metadata_tags"
        self._time_base = Fraction(1, spec.fps)
        self._convert = ToVideoFrame(spec.height, spec.width, codec)
        # FFmpeg takes a prefix with a colon for a protocol (`file:`, `12:`), but not in an absolute path.
        self._output = av.open(str(path.absolute()), "w", format=container, container_options=options)
        self._output.metadata.update(tags)
        self._stream = self._output.add_stream(codec.encoder, rate=spec.fps, options=spec.options)
        first = self._stream.codec_context
        self._set_up(first, spec, codec)

        def more() -> Any:
            context = av.CodecContext.create(codec.encoder, "w")
            context.options, context.framerate, context.flags = spec.options, spec.fps, first.flags
            self._set_up(context, spec, codec)
            context.open()
            return context

        self._segments = SegmentEncoder(first, more, KEYFRAME_SECONDS * spec.fps if codec.segments else sys.maxsize)
        self._next = 0

    def _set_up(self, context: Any, spec: VideoSpec, codec: Codec) -> None:
        context.width, context.height = spec.width, spec.height
        context.pix_fmt = codec.pixel_format
        context.time_base = self._time_base
        context.thread_count = ENCODER_THREADS
        context.thread_type = "AUTO"  # otherwise x264 divides each picture into slices, which costs quality
        tag_stream(context, codec)

    def add(self, frame: Frame) -> None:
        """Encode one frame at the next timestamp."""
        picture = self._convert(frame)
        picture.pts, picture.time_base = self._next, self._time_base
        self._next += 1
        self._mux(self._segments.encode(picture))

    def finish(self) -> None:
        """Write the encoder's buffered frames and the index."""
        self._mux(self._segments.finish())
        self._output.close()

    def _mux(self, packets: Iterator[Any]) -> None:
        for packet in packets:
            packet.stream = self._stream
            self._output.mux(packet)

    def discard(self) -> None:
        """Close the file in any state; errors are ignored, as the first one was reported."""
        self._segments.discard()
        try:
            self._output.close()
        except Exception:
            return
