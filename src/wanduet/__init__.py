"""wanduet: an inference engine for Wan2.1 text-to-video."""

__version__ = "0.1.0"
