"""The codecs that videos are written with, and RGB to their colours and back.

Video is BT.709 in limited range, converted and tagged: a player that trusts the tags shows the colours
that the model made. The lossless codec keeps RGB itself.
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

# Encoders are bit-exact for a given number of threads; one number on every machine makes files comparable.
ENCODER_THREADS = 12

_MATRIX_BT709 = 1  # libavutil's numbers (AVColorSpace)
_MATRIX_RGB = 0
_MATRIX_UNSPECIFIED = 2
_HD_HEIGHT = 720
# Without the full-chroma flags swscale's RGB is off by up to 2.7 levels on solid colours, with them by 0.7.
# bitexact keeps its result the same on every CPU.
_SCALER_FLAGS = "flags=bicubic+accurate_rnd+full_chroma_int+full_chroma_inp+bitexact"
# H.264 puts the colour of a 2x2 block at its left edge; swscale would put it in the middle unless told.
CHROMA_SITE = "left"


@dataclass(frozen=True, slots=True)
class Codec:
    """How one codec is used. `crf_at_0` and `crf_step` turn a quality into the encoder's rate factor."""

    name: CodecName
    encoder: str
    pixel_format: str
    extensions: tuple[str, ...]  # the first is the usual one
    options: tuple[tuple[str, str], ...]
    crf_at_0: float | None = None
    crf_step: float = 0.0
    crf_digits: int | None = None  # decimals of the rate factor; None: whole numbers

    @property
    def lossless(self) -> bool:
        """Whether every pixel comes back as it went in."""
        return self.crf_at_0 is None

    def crf(self, quality: int) -> float:
        """The encoder's rate factor (lower is better) for a quality of 1 to 100."""
        assert self.crf_at_0 is not None
        return round(self.crf_at_0 - self.crf_step * quality, self.crf_digits)


def _x264_repair() -> tuple[tuple[str, str], ...]:
    """x264 165's macroblock tree reads memory that nobody wrote in its AVX-512 form: the same frames give other
    bytes each time (seen with glibc's MALLOC_PERTURB_). Its AVX2 form gives what plain C gives."""
    try:
        from numpy._core._multiarray_umath import __cpu_features__ as features
    except ImportError:
        return ()
    return (("x264-params", "asm=AVX2"),) if features.get("AVX512F") and features.get("AVX2") else ()


# H.264: 75 gives CRF 18 (visually lossless), 50 CRF 28, 100 CRF 8. AV1 and VP9 count to 63; their
# scale is set so that a quality looks about the same in each.
CODECS: dict[str, Codec] = {
    "h264": Codec(
        "h264", "libx264", "yuv420p", (".mp4", ".mov", ".mkv"),
        (("preset", "medium"), ("profile", "high"), *_x264_repair()), 48.0, 0.4, 1,
    ),
    "av1": Codec("av1", "libsvtav1", "yuv420p", (".mp4", ".mkv", ".webm"), (("preset", "8"),), 62.0, 0.5),
    "vp9": Codec(
        "vp9", "libvpx-vp9", "yuv420p", (".webm", ".mp4", ".mkv"),
        (("b", "0"), ("deadline", "good"), ("cpu-used", "3"), ("row-mt", "1")), 62.0, 0.5,
    ),
    # Version 3 with a checksum for each slice, so that damage is noticed; intra only, so that it stays local.
    "ffv1": Codec("ffv1", "ffv1", "bgr0", (".mkv",), (("level", "3"), ("g", "1"), ("slices", "4"), ("slicecrc", "1"))),
}  # fmt: skip
CONTAINERS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
DEFAULT_QUALITY = 75


def find_codec(name: str) -> Codec:
    """A codec by name. Raises InvalidRequestError if there is none or this PyAV cannot encode it."""
    codec = CODECS.get(name)
    if codec is None:
        raise InvalidRequestError("codec", name, "one of " + ", ".join(CODECS))
    if codec.encoder not in av.codecs_available:
        usable = [other.name for other in CODECS.values() if other.encoder in av.codecs_available]
        raise InvalidRequestError("codec", name, "this PyAV was built without it; it has " + ", ".join(usable))
    return codec


def container_for(path: Path, codec_name: str) -> str:
    """libavformat's name of the container that `path` asks for. Raises InvalidRequestError."""
    codec = find_codec(codec_name)
    extension = path.suffix.lower()
    if extension not in codec.extensions:
        allowed = f"a name that ends in {' or '.join(codec.extensions)} for {codec.name}"
        raise InvalidRequestError("output", path.name, allowed, path.with_suffix(codec.extensions[0]).name)
    return CONTAINERS[extension]


def tag_stream(context: Any, codec: Codec) -> None:
    """Say in the stream which colours it holds."""
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    context.colorspace = _MATRIX_RGB if codec.lossless else _MATRIX_BT709
    context.color_range = ColorRange.JPEG if codec.lossless else ColorRange.MPEG


class ToVideoFrame:
    """RGB `[H, W, 3]` to `av.VideoFrame`s in a codec's colours, tagged."""

    def __init__(self, height: int, width: int, codec: Codec) -> None:
        self._codec = codec
        colours = "" if codec.lossless else f"out_color_matrix=bt709:out_range=tv:out_chroma_loc={CHROMA_SITE}:"
        source = f"video_size={width}x{height}:pix_fmt=rgb24:colorspace=gbr:range=pc:time_base=1/1"
        self._graph = _scale_graph(source, colours, codec.pixel_format)

    def __call__(self, frame: Frame) -> Any:
        """Convert one frame; it must be contiguous and is not needed afterwards."""
        rgb = av.VideoFrame.from_numpy_buffer(frame, "rgb24")
        rgb.colorspace, rgb.color_range = _MATRIX_RGB, ColorRange.JPEG
        self._graph.push(rgb)
        result = self._graph.pull()
        tag_stream(result, self._codec)
        return result


class ToRGB:
    """`av.VideoFrame`s of one video to RGB `[H, W, 3]` by their tags.

    Video without tags is taken for BT.709 from 720 rows up and BT.601 below, as players do.
    """

    def __init__(self, first: Any) -> None:
        matrix = "auto"
        if int(first.colorspace) == _MATRIX_UNSPECIFIED and not first.format.is_rgb:
            matrix = "bt709" if first.height >= _HD_HEIGHT else "bt601"
        source = (
            f"video_size={first.width}x{first.height}:pix_fmt={first.format.name}:time_base=1/1"
            f":colorspace={int(first.colorspace)}:range={int(first.color_range)}"
        )
        self._graph = _scale_graph(source, f"in_color_matrix={matrix}:out_range=pc:", "rgb24")

    def __call__(self, frame: Any) -> Frame:
        """Convert one frame."""
        self._graph.push(frame)
        return cast(Frame, self._graph.pull().to_ndarray())


def _scale_graph(source: str, colours: str, pixel_format: str) -> Any:
    """A filter graph that converts colours only. Used because PyAV's own reformatter cannot say where chroma sits."""
    graph = av.filter.Graph()
    graph.threads = 1
    steps = (
        graph.add("buffer", source),
        graph.add("scale", colours + _SCALER_FLAGS),
        graph.add("format", f"pix_fmts={pixel_format}"),
        graph.add("buffersink"),
    )
    for one, following in itertools.pairwise(steps):
        one.link_to(following)
    graph.configure()
    return graph
