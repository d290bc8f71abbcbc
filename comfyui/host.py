"""What the nodes use of the program that they run in: progress, previews, interrupts, memory, files."""

import io
from collections.abc import Callable

import comfy.model_management
import comfy.utils
import folder_paths
from comfy.model_management import InterruptProcessingException
from PIL import Image

PREVIEW_SIDE = 512  # pixels of the longer side, at most

check_interrupt: Callable[[], None] = comfy.model_management.throw_exception_if_processing_interrupted
is_interrupted: Callable[[], bool] = comfy.model_management.processing_interrupted
__all__ = [
    "InterruptProcessingException",
    "Progress",
    "check_interrupt",
    "file_in",
    "files_in",
    "free_memory",
    "is_interrupted",
]


class Progress:
    """The bar of the node that runs. Created in its thread."""

    def __init__(self) -> None:
        self._bar = comfy.utils.ProgressBar(100)
        self._place = (0, 100)

    def show(self, done: int, total: int) -> None:
        """Set the bar. Raises InterruptProcessingException."""
        self._place = (done, max(total, 1))
        self._bar.update_absolute(*self._place)

    def preview(self, picture: bytes) -> None:
        """Show a picture, of a moving one the frame in its middle. Raises InterruptProcessingException."""
        with Image.open(io.BytesIO(picture)) as image:
            image.seek(getattr(image, "n_frames", 1) // 2)
            frame = image.convert("RGB")
        self._bar.update_absolute(*self._place, ("JPEG", frame, PREVIEW_SIDE))


def free_memory() -> None:
    """Make ComfyUI unload its own models."""
    comfy.model_management.unload_all_models()
    comfy.model_management.soft_empty_cache()


def files_in(folder: str) -> list[str]:
    """Return the files in one of ComfyUI's folders, such as "loras"."""
    return list(folder_paths.get_filename_list(folder))


def file_in(folder: str, name: str) -> str:
    """Return the path of a file in one of ComfyUI's folders. Raises FileNotFoundError."""
    return str(folder_paths.get_full_path_or_raise(folder, name))
