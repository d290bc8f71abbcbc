"""A deleted job's prompt is readable nowhere: the cache of embeddings keeps each text beside its numbers.

Entries are found by the text in their header, so no model, and no torch, is needed to forget a prompt.
"""

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from wanduet.jobs.records import StoredJob

_KEY = "wanduet_embeddings"  # as `wanduet.media.embeddings` writes it
_LONGEST_HEADER = 2**20


def forget_prompts(folder: Path, jobs: Iterable[StoredJob]) -> int:
    """Delete the cached embeddings of the jobs' prompts from a data folder; returns how many.

    Where another job has the same prompt, it is encoded once more when that job needs it.
    """
    asked = [job.request.get(name) for job in jobs for name in ("prompt", "negative_prompt")]
    paths = list((folder / "embeddings").glob("*.safetensors")) if any(asked) else []
    if not paths:
        return 0
    from wanduet.models.tokenizer import clean_text

    texts = {clean_text(text) for text in asked if isinstance(text, str) and text}
    removed = 0
    for path in paths:
        with suppress(OSError):
            text = _text_of(path)
            if text is None or text in texts:  # what cannot be read is of no use and may hold anything
                path.unlink(missing_ok=True)
                removed += 1
    return removed


def _text_of(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length)) if length < _LONGEST_HEADER else {}
        return str(json.loads(header["__metadata__"][_KEY])["text"])
    except (ValueError, LookupError, TypeError):
        return None
