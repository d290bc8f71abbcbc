"""wanduet: an inference engine for Wan2.1 text-to-video on one GPU, two, or many."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wanduet.config import EngineConfig
    from wanduet.doors.python.export import export_to_video
    from wanduet.doors.python.pipeline import WanPipeline
    from wanduet.doors.python.video_to_video import WanVideoToVideoPipeline
    from wanduet.engine.job import Job, OutputOptions
    from wanduet.engine.pipeline import Engine
    from wanduet.errors import WanduetError
    from wanduet.request import GenerationRequest

__version__ = "0.1.0"
__all__ = [
    "Engine", "EngineConfig", "GenerationRequest", "Job", "OutputOptions", "WanPipeline", "WanVideoToVideoPipeline",
    "WanduetError", "export_to_video",
]  # fmt: skip

_HOME = {
    "Engine": "wanduet.engine.pipeline",
    "EngineConfig": "wanduet.config",
    "GenerationRequest": "wanduet.request",
    "Job": "wanduet.engine.job",
    "OutputOptions": "wanduet.engine.job",
    "WanPipeline": "wanduet.doors.python.pipeline",
    "WanVideoToVideoPipeline": "wanduet.doors.python.video_to_video",
    "WanduetError": "wanduet.errors",
    "export_to_video": "wanduet.doors.python.export",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used: `wanduet --help` must not wait for PyTorch."""
    if name not in _HOME:
        raise AttributeError(f"module 'wanduet' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
