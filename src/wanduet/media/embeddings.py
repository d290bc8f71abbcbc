"""Prompt embeddings on disk: entries of the cache, and the files that `encode` writes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from wanduet.media.files import UnreadableFileError, write_atomically
from wanduet.untrusted import check_regular, cut, parse_json, read_safetensors_header

NAME = "prompt_embeds"
_KEY = "wanduet_embeddings"
_HASH_KEY = "sha256"
_TEXTS = ("text", "cut", "encoder", "dtype")
_UNREADABLE = (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError, RuntimeError)
MAX_BYTES = 64 * 2**20  # 512 tokens of 4,096 float32 take 8 MiB


@dataclass(frozen=True, slots=True)
class PromptEmbeds:
    """Embeddings `[n, text_dim]` float32 on the CPU, of a prompt's `n` tokens without padding.

    `text` is the cleaned prompt, `cut` the part of it beyond the model's limit, `encoder` the fingerprint of text
    encoder and tokenizer, `dtype` the one that the encoder computed in.
    """

    embeds: Tensor
    text: str
    cut: str
    encoder: str
    dtype: str


def save_embeddings(path: Path | str, prompt: PromptEmbeds) -> None:
    """Write to `path` atomically. Raises OutputError."""
    about = {"text": prompt.text, "cut": prompt.cut, "encoder": prompt.encoder, "dtype": prompt.dtype}
    embeds = prompt.embeds.contiguous()
    signed = about | {_HASH_KEY: _digest(embeds, about)}
    data = safetensors.torch.save({NAME: embeds}, {_KEY: json.dumps(signed)})
    write_atomically(Path(path), data)


def load_embeddings(path: Path | str) -> PromptEmbeds:
    """Read what `save_embeddings` wrote. Raises UnreadableFileError, also if the stored hash does not match."""
    path = Path(path)
    try:
        if check_regular(path) > MAX_BYTES:
            raise ValueError("it has more bytes than any embeddings")
        about = parse_json(_metadata(path)[_KEY])
        with safe_open(path, framework="pt") as file:
            embeds = file.get_tensor(NAME).clone()
        expected = about.pop(_HASH_KEY)
        if not all(isinstance(about[name], str) for name in _TEXTS):
            raise ValueError("its metadata is of a wrong kind")
        found = PromptEmbeds(embeds, *(about[name] for name in _TEXTS))
    except OSError as error:
        raise UnreadableFileError(f"Cannot read {path}: {error.strerror or error}.") from error
    except _UNREADABLE as error:
        raise UnreadableFileError(f"{path} holds no prompt embeddings, or is damaged ({cut(error)}).") from error
    if embeds.ndim != 2 or 0 in embeds.shape or embeds.dtype != torch.float32:
        raise UnreadableFileError(f"{path} holds embeddings of a wrong shape or kind.")
    if expected != _digest(embeds, about):
        raise UnreadableFileError(f"{path} is damaged: its content does not have the hash that it was saved with.")
    if not bool(torch.isfinite(embeds).all()):
        raise UnreadableFileError(f"{path} holds NaN or infinity.")
    return found


def contains_embeddings(path: Path | str) -> bool:
    """Whether a file's header says that it contains embeddings, which may be damaged nevertheless."""
    try:
        return _KEY in _metadata(Path(path))
    except (OSError, ValueError):
        return False


def _metadata(path: Path) -> dict[str, str]:
    """The metadata in a file's header. Raises OSError, ValueError."""
    entries = read_safetensors_header(path, MAX_BYTES).get("__metadata__", {})
    if not isinstance(entries, dict) or not all(isinstance(text, str) for text in entries.values()):
        raise ValueError("its metadata is of a wrong kind")
    return entries


def _digest(embeds: Tensor, about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(f"{list(embeds.shape)}{json.dumps(about, sort_keys=True)}".encode())
    digest.update(embeds.view(torch.uint8).numpy().data)
    return digest.hexdigest()
