"""The hashes that a model's files were published with, wherever the folder came from.

Four sources, the first that says something counts: a `manifest.json` in the folder, the names of the hub cache's
blobs, the notes that `hf download --local-dir` leaves, and the published models that wanduet knows by heart
(`published.json`), for a folder that was copied by hand.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from wanduet.weights.diffusers import MANIFEST_FILE, read_json
from wanduet.weights.manifest import GIT_LENGTH, SHA256_LENGTH, file_sha256

_HASH = re.compile(rf"[0-9a-f]{{{GIT_LENGTH}}}|[0-9a-f]{{{SHA256_LENGTH}}}")
_NOTES = Path(".cache/huggingface/download")  # huggingface_hub's folder beside the files of a `--local-dir`
_CLOCK_STEP = 1.0  # seconds by which a file system's time may be coarser than the clock of the note


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """Size in bytes and SHA-256 of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model on the hub: its id and every file by relative path, at one revision."""

    model: str
    revision: str
    files: Mapping[str, PublishedFile]

    @property
    def num_bytes(self) -> int:
        """What fetching all of it takes."""
        return sum(file.num_bytes for file in self.files.values())


@cache
def published_models() -> Mapping[str, PublishedModel]:
    """The published models whose files wanduet knows, by hub id."""
    content = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return {
        name: PublishedModel(
            name,
            model["revision"],
            {path: PublishedFile(file["bytes"], file["sha256"]) for path, file in model["files"].items()},
        )
        for name, model in content["models"].items()
    }


def published_hashes(folder: Path) -> dict[str, str]:
    """The hash that each of a folder's files should have: SHA-256, or git's SHA-1 for a small file of the hub's cache.

    Empty for a folder of which nothing is known, for example a model of the user's own.
    """
    if (folder / MANIFEST_FILE).exists():
        hashes = read_json(folder / MANIFEST_FILE).get("sha256")
        return {str(k): str(v) for k, v in hashes.items()} if isinstance(hashes, Mapping) else {}
    return _cache_links(folder) or _download_notes(folder) or _known_files(folder)


def unverified_weights(folder: Path) -> list[str]:
    """Names of the files of weights in a folder whose published hash is not known: nobody notices when one is damaged."""
    hashes = published_hashes(folder)
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.glob("*/*.safetensors")))
    return [name for name in names if name not in hashes]


def _cache_links(folder: Path) -> dict[str, str]:
    """In the hub's cache a file is a link to `blobs/<hash>`."""
    # Not `resolve`, which fails where links lead in a circle.
    links = {
        p.relative_to(folder).as_posix(): Path(os.path.realpath(p)) for p in sorted(folder.rglob("*")) if p.is_symlink()
    }
    return {
        name: blob.name for name, blob in links.items() if blob.parent.name == "blobs" and _HASH.fullmatch(blob.name)
    }


def _download_notes(folder: Path) -> dict[str, str]:
    """What `hf download --local-dir` noted of each file: commit, hash, time; not of a file that was changed since."""
    notes = folder / _NOTES
    found: dict[str, str] = {}
    for note in sorted(notes.rglob("*.metadata")) if notes.is_dir() else ():
        name = note.relative_to(notes).as_posix().removesuffix(".metadata")
        try:
            _, etag, time, *_ = note.read_text(encoding="utf-8").split("\n")
            changed = (folder / name).stat().st_mtime - _CLOCK_STEP > float(time)
        except (OSError, ValueError):
            continue
        if not changed and _HASH.fullmatch(etag.strip()):
            found[name] = etag.strip()
    return found


def _known_files(folder: Path) -> dict[str, str]:
    """Those parts of a folder that claim to be a published model's: config equal byte for byte, all files of its sizes.

    Part by part: whoever trained a transformer of their own may keep the published VAE beside it. A part saved again
    by diffusers has another config, and so is the user's own.
    """
    found: dict[str, str] = {}
    for model in published_models().values():
        parts: dict[str, dict[str, PublishedFile]] = {}
        for name, file in model.files.items():
            parts.setdefault(name.partition("/")[0], {})[name] = file
        for part in ("transformer", "vae", "text_encoder", "tokenizer"):
            files = parts.get(part, {})
            if files and all(_claims(folder / name, file) for name, file in files.items()):
                found |= {name: file.sha256 for name, file in files.items()}
    return found


def _claims(path: Path, file: PublishedFile) -> bool:
    try:
        if path.stat().st_size != file.num_bytes:
            return False
        return path.name != "config.json" or file_sha256(path) == file.sha256
    except OSError:
        return False
