"""The codecs for writing videos, and conversion between RGB and their colour spaces.

Video is converted to BT.709 in limited range and tagged as such, so that a player that uses the tags shows the model's
colours. The lossless codec stores RGB.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import av
import av.filter
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, ColorTrc
from numpy.typing import NDArray

from wanduet.errors import InvalidRequestError

CodecName = Literal["h264", "av1", "vp9", "ffv1"]
Frame = NDArray[np.uint8]  # [H, W, 3], RGB

# An encoder's output depends on its number of threads; the same number on all machines makes files comparable.
ENCODER_THREADS = 12

_MATRIX_BT709 = 1  # libavutil's AVColorSpace
_MATRIX_RGB = 0
_MATRIX_UNSPECIFIED = 2
_HD_HEIGHT = 720
# swscale's RGB is off by up to 2.7 levels on solid colours without the full-chroma flags, by 0.7 with them.
# bitexact makes its result the same on every CPU.
_SCALER_FLAGS = "+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
# H.264 places the chroma sample of a 2x2 block at its left edge; swscale's default is the middle.
CHROMA_SITE = "left"


@dataclass(frozen=True, slots=True)
class Codec:
    """A codec's settings. `crf_at_0` and `crf_step` map a quality to the encoder's rate factor.

    `segments`: its packets are encoded in parallel, by an encoder for each segment (`media.segments`).
    """

    name: CodecName
    encoder: str
    pixel_format: str
    extensions: tuple[str, ...]  # the first is the default
    options: tuple[tuple[str, str], ...]
    crf_at_0: float | None = None
    crf_step: float = 0.0
    crf_digits: int | None = None  # decimals of the rate factor; None: whole numbers
    segments: bool = False

    @property
    def lossless(self) -> bool:
        """Whether decoding gives the encoded pixels exactly."""
        return self.crf_at_0 is None

    def crf(self, quality: int) -> float:
        """The encoder's rate factor (lower is better) for a quality of 1 to 100."""
        assert self.crf_at_0 is not None
        return round(self.crf_at_0 - self.crf_step * quality, self.crf_digits)


def _x264_repair() -> tuple[tuple[str, str], ...]:
    """Options that disable AVX-512 in x264 165, whose macroblock tree then reads uninitialised memory: the same frames
    give different bytes each time (seen with glibc's MALLOC_PERTURB_). The AVX2 code gives the plain C result."""
    try:
        from numpy._core._multiarray_umath import __cpu_features__ as features
    except ImportError:
        return ()
    return (("x264-params", "asm=AVX2"),) if features.get("AVX512F") and features.get("AVX2") else ()


# H.264: preset "faster" with a lookahead of 16 frames takes half the time of "medium", with 40, for about the same error and
# bytes (benchmarks/video_tail.py), and leaves fewer frames to encode after a video's last one.
# 75 gives CRF 18 (visually lossless), 50 CRF 28, 100 CRF 8. The CRF of AV1 and VP9 goes up to 63, scaled so that a quality
# looks about the same in all codecs.
CODECS: dict[str, Codec] = {
    "h264": Codec(
        "h264", "libx264", "yuv420p", (".mp4", ".mov", ".mkv"),
        (("preset", "faster"), ("rc-lookahead", "16"), ("profile", "high"), *_x264_repair()), 48.0, 0.4, 1, True,
    ),
    "av1": Codec("av1", "libsvtav1", "yuv420p", (".mp4", ".mkv", ".webm"), (("preset", "8"),), 62.0, 0.5),
    "vp9": Codec(
        "vp9", "libvpx-vp9", "yuv420p", (".webm", ".mp4", ".mkv"),
        (("b", "0"), ("deadline", "good"), ("cpu-used", "3"), ("row-mt", "1")), 62.0, 0.5,
    ),
    # Version 3 with a checksum for each slice, to detect damage; intra only, so that damage affects one frame.
    "ffv1": Codec("ffv1", "ffv1", "bgr0", (".mkv",), (("level", "3"), ("g", "1"), ("slices", "4"), ("slicecrc", "1"))),
}  # fmt: skip
CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
DEFAULT_QUALITY = 75


def find_codec(name: str) -> Codec:
    """A codec by name. Raises InvalidRequestError if it is unknown or this PyAV cannot encode it."""
    codec = CODECS.get(name)
    if codec is None:
        raise InvalidRequestError("codec", name, "one of " + ", ".join(CODECS))
    if codec.encoder not in av.codecs_available:
        usable = [other.name for other in CODECS.values() if other.encoder in av.codecs_available]
        raise InvalidRequestError("codec", name, "this PyAV was built without it; it has " + ", ".join(usable))
    return codec


def container_for(path: Path, codec_name: str) -> str:
    """libavformat's name of the container for the extension of `path`. Raises InvalidRequestError."""
    codec = find_codec(codec_name)
    extension = path.suffix.lower()
    if extension not in codec.extensions:
        allowed = f"a name that ends in {' or '.join(codec.extensions)} for {codec.name}"
        raise InvalidRequestError("output", path.name, allowed, path.with_suffix(codec.extensions[0]).name)
    return CONTAINERS[extension]


def tag_stream(context: Any, codec: Codec) -> None:
    """Set the stream's colour tags."""
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.colorspace = _MATRIX_RGB if codec.lossless else _MATRIX_BT709
    context.color_range = ColorRange.JPEG if codec.lossless else ColorRange.MPEG


class ToVideoFrame:
    """Converts RGB `[H, W, 3]` to tagged `av.VideoFrame`s in a codec's colour space."""

    def __init__(self, height: int, width: int, codec: Codec) -> None:
        self._codec = codec
        colours = "" if codec.lossless else f"out_color_matrix=bt709:out_range=tv:out_chroma_loc={CHROMA_SITE}:"
        source = f"video_size={width}x{height}:pix_fmt=rgb24:colorspace=gbr:range=pc:time_base=1/1"
        self._graph = _scale_graph(source, colours, codec.pixel_format)

    def __call__(self, frame: Frame) -> Any:
        """Convert one contiguous frame. The data is copied."""
        rgb = av.VideoFrame.from_numpy_buffer(frame, "rgb24")
        rgb.colorspace, rgb.color_range = _MATRIX_RGB, ColorRange.JPEG
        self._graph.push(rgb)
        result = self._graph.pull()
        tag_stream(result, self._codec)
        return result


class ToRGB:
    """Converts the `av.VideoFrame`s of one video to RGB `[H, W, 3]` by their colour tags, or to RGBA.

    As in players, video without tags is BT.709 from 720 rows up, BT.601 below. `size`, height and width: also scales.
    """

    def __init__(self, first: Any, size: tuple[int, int] | None = None, pixel_format: str = "rgb24") -> None:
        height, width = size or (first.height, first.width)
        scaling = "" if (height, width) == (first.height, first.width) else f"w={width}:h={height}:"
        matrix = "auto"
        if int(first.colorspace) == _MATRIX_UNSPECIFIED and not first.format.is_rgb:
            matrix = "bt709" if first.height >= _HD_HEIGHT else "bt601"
        source = (
            f"video_size={first.width}x{first.height}:pix_fmt={first.format.name}:time_base=1/1"
            f":colorspace={int(first.colorspace)}:range={int(first.color_range)}"
        )
        options = f"{scaling}in_color_matrix={matrix}:out_range=pc:"
        self._graph = _scale_graph(source, options, pixel_format, "lanczos" if scaling else "bicubic")

    def __call__(self, frame: Any) -> Frame:
        """Convert one frame."""
        self._graph.push(frame)
        return cast(Frame, self._graph.pull().to_ndarray())


def _scale_graph(source: str, options: str, pixel_format: str, method: str = "bicubic") -> Any:
    """A filter graph that converts colours, and scales if `options` has a size. PyAV's own reformatter cannot set the chroma location."""
    graph = av.filter.Graph()
    graph.threads = 1
    steps = (
        graph.add("buffer", source),
        graph.add("scale", f"{options}flags={method}{_SCALER_FLAGS}"),
        graph.add("format", f"pix_fmts={pixel_format}"),
        graph.add("buffersink"),
    )
    for one, following in itertools.pairwise(steps):
        one.link_to(following)
    graph.configure()
    return graph
