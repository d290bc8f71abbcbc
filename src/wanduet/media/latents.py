"""Latents on disk: kept before the decode starts, so that nothing computed is lost; decoded again at will."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from wanduet.media import provenance
from wanduet.media.files import UnreadableFileError, write_atomically
from wanduet.media.read import has_metadata, read_metadata, tensor_names
from wanduet.untrusted import check_regular, cut

NAME = "latents"
HASH_KEY = "latents_sha256"
MAX_BYTES = 8 * 2**30  # four hours of 1080p have 8 GiB
_HINT = "Latents are kept by --save-latents; another program's must be one tensor named latents."
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def save_latents(path: Path | str, latents: Tensor, metadata: Mapping[str, Any]) -> None:
    """Write latents `[C, T, h, w]` (C is 16 for Wan2.1; float32, bfloat16 or float16, as the denoise left them) to `path`.

    `metadata` is a provenance dict; a hash of it and of the data is kept with it. The file is whole and
    on the disk when this returns, or not there. Raises OutputError, ValueError for another shape or dtype.
    """
    if problem := _problem(latents):
        raise ValueError(problem)
    tensor = latents.detach().cpu().contiguous()
    signed = {**metadata, HASH_KEY: _digest(tensor, metadata)}
    header = {provenance.KEY: provenance.to_json(signed)}  # one entry: safetensors shuffles several
    write_atomically(Path(path), safetensors.torch.save({NAME: tensor}, header), keep_finished=True)


def load_latents(path: Path | str) -> tuple[Tensor, dict[str, Any]]:
    """Latents `[C, T, h, w]` on the CPU and their provenance. Raises UnreadableFileError.

    Latents of another program, one tensor named `latents`, have an empty provenance.
    Refuses files that are damaged (any flipped bit: the hash is checked), of another kind or shape, or
    that hold NaN or infinity.
    """
    path = Path(path)
    names = tensor_names(path)  # reads the header; what is no plain file goes no further
    if names != {NAME}:
        shown = cut(", ".join(sorted(names)[:5])) or "nothing"
        raise UnreadableFileError(f"{path} holds {shown}, not latents.", hint=_HINT)
    foreign = not has_metadata(path)
    metadata = {} if foreign else read_metadata(path)
    try:
        if check_regular(path) > MAX_BYTES:
            raise UnreadableFileError(f"{path} has more bytes than any latents.", hint=_HINT)
        # Copies: Windows neither removes nor replaces a file that is still mapped.
        latents = safetensors.torch.load_file(path)[NAME].clone()
    except (
        OSError,
        SafetensorError,
        LookupError,
        RuntimeError,
        MemoryError,
    ) as error:  # RuntimeError: no memory for it
        raise UnreadableFileError(f"{path} is damaged ({cut(error)}).") from error
    if foreign and latents.ndim == 5 and latents.shape[0] == 1:  # as diffusers' pipelines give them
        latents = latents[0]
    if problem := _problem(latents):
        raise UnreadableFileError(f"{path}: {problem}")
    if not foreign and metadata.pop(HASH_KEY, None) != _digest(latents, metadata):
        raise UnreadableFileError(f"{path} is damaged: its content does not have the hash that it was saved with.")
    if not bool(torch.isfinite(latents).all()):
        raise UnreadableFileError(f"{path} holds NaN or infinity.")
    return latents, metadata


def _problem(latents: Tensor) -> str | None:
    if latents.ndim != 4 or 0 in latents.shape:
        return f"Latents must be [C, T, h, w], not {list(latents.shape)}."
    if latents.dtype not in _DTYPES:
        return f"Latents must be float32, bfloat16 or float16, not {str(latents.dtype).removeprefix('torch.')}."
    return None


def _digest(tensor: Tensor, metadata: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(f"{tensor.dtype}{list(tensor.shape)}{provenance.to_json(metadata)}".encode())
    digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
