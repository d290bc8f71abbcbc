"""What a request needs to know of the video that it starts from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from wanduet.errors import InvalidRequestError

SIDES = ("height", "width")


@dataclass(frozen=True, slots=True)
class SourceVideo:
    """What is known of an input video once its file has been looked through.

    `height` and `width` are those of the picture as it is shown, in pixels; `seconds` is its length.
    """

    sha256: str
    height: int
    width: int
    seconds: float

    def frames_at(self, fps: float) -> int:
        """The number of frames, at least 1, at so many a second."""
        return max(1, round(self.seconds * fps))

    def sizes(self, height: int | None, width: int | None, area: int, multiple: int) -> dict[str, int]:
        """Return the sides, `height` and `width`, that are not given: in the picture's proportions, a multiple of
        `multiple`. Where neither is given they have about `area` pixels."""
        if height is None and width is None:
            return dict(zip(("height", "width"), self.size_like(area, multiple), strict=True))
        if height is None and width is not None:
            return {"height": _rounded(width * self.height / self.width, multiple)}
        if width is None and height is not None:
            return {"width": _rounded(height * self.width / self.height, multiple)}
        return {}

    def size_like(self, area: int, multiple: int) -> tuple[int, int]:
        """Height and width of about `area` pixels in the picture's proportions, each a multiple of `multiple`.

        The same for a portrait as for the picture on its side, and square for a square.
        """
        low, high = sorted((self.height, self.width))
        shorter = _rounded((area * low / high) ** 0.5, multiple)
        longer = shorter if low == high else _rounded(area / shorter, multiple)
        return (shorter, longer) if self.height <= self.width else (longer, shorter)


def _rounded(side: float, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


class GivenSize(Protocol):
    """The size that a request gives, None for a side that it leaves out, and its input video, if any."""

    @property
    def height(self) -> int | None: ...  # noqa: D102
    @property
    def width(self) -> int | None: ...  # noqa: D102
    @property
    def input_video(self) -> str | None: ...  # noqa: D102


def by_what_was_given(
    error: InvalidRequestError, request: GivenSize, values: Mapping[str, Any], multiple: int
) -> InvalidRequestError:
    """Return an error of a side; one that follows from the input video's proportions names what it follows from.

    `values`: both sides, as they follow; `multiple`: what a side must be a multiple of.
    """
    if getattr(request, error.field) is not None or request.input_video is None:
        return error
    allowed = f"{error.field} would be {error.given} in the input video's proportions, and {error.allowed} are allowed"
    given = next((side for side in SIDES if getattr(request, side) is not None), None)
    if given is None or not isinstance(error.nearest, int):
        return InvalidRequestError("input_video", request.input_video, allowed)
    nearest = values[given] * error.nearest // values[error.field] // multiple * multiple
    return InvalidRequestError(given, values[given], allowed, max(nearest, multiple))
