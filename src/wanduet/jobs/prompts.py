"""Deletes the prompts of deleted jobs from the cache of embeddings, whose files contain the prompt's text.

Entries are found by the text in their headers, which needs neither a model nor torch.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from wanduet.jobs.records import StoredJob

_KEY = "wanduet_embeddings"  # as `wanduet.media.embeddings` writes it
_LONGEST_HEADER = 2**20


def forget_prompts(folder: Path, jobs: Iterable[StoredJob]) -> int:
    """Delete the cached embeddings of the jobs' prompts from a data folder; return how many were deleted.

    If another job has the same prompt, it is encoded again when that job runs.
    """
    return PromptIndex(folder).forget(job.request for job in jobs)


class PromptIndex:
    """Digests of the cached prompts, read once, to delete the prompts of many jobs in several calls."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the data folder."""
        self._folder = folder / "embeddings"
        self._digests: dict[str, tuple[int, bytes | None]] = {}  # by file name: modification time, digest of the text

    def forget(self, requests: Iterable[Mapping[str, Any]]) -> int:
        """Delete the entries of the requests' prompts; return how many were deleted."""
        prompts = [request.get(name) for request in requests for name in ("prompt", "negative_prompt")]
        entries = self._read() if any(prompts) else {}
        if not entries:
            return 0
        from wanduet.models.text.tokenizer import clean_text

        texts = {_digest(clean_text(text)) for text in prompts if isinstance(text, str) and text}
        removed = 0
        for name, (_, digest) in entries.items():
            if digest is None or digest in texts:  # an unreadable entry is useless and may contain any prompt
                with suppress(OSError):
                    (self._folder / name).unlink(missing_ok=True)
                    removed += 1
        return removed

    def _read(self) -> dict[str, tuple[int, bytes | None]]:
        found: dict[str, tuple[int, bytes | None]] = {}
        with suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                if entry.name.endswith(".safetensors"):
                    with suppress(OSError):
                        written = entry.stat().st_mtime_ns
                        known = self._digests.get(entry.name)
                        if known is None or known[0] != written:
                            known = (written, _digest_of(Path(entry.path)))
                        found[entry.name] = known
        self._digests = found
        return found


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _digest_of(path: Path) -> bytes | None:
    text = _text_of(path)
    return None if text is None else _digest(text)


def _text_of(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length)) if length < _LONGEST_HEADER else {}
        return str(json.loads(header["__metadata__"][_KEY])["text"])
    except (ValueError, LookupError, TypeError):
        return None
