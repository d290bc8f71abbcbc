"""Configs and indices of a checkpoint: JSON objects, from files that may be damaged or a stranger's."""

from pathlib import Path
from typing import Any

from wanduet.errors import ModelNotFoundError
from wanduet.untrusted import cut, parse_json, read_file
from wanduet.weights.safetensors import check_pointer


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises ModelNotFoundError, or WeightsError for a Git LFS pointer."""
    check_pointer(path)
    try:
        value = parse_json(read_file(path).decode("utf-8"), finite=False)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path} is missing.", hint="The folder must be in the Diffusers layout.") from None
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{path} cannot be read: {cut(getattr(error, 'strerror', None) or error)}.") from error
    if not isinstance(value, dict):
        raise ModelNotFoundError(f"{path} is no JSON object.")
    return value
