"""Looks up the published hashes of a model folder's files.

There are four sources, of which the first with an entry is used: a `manifest.json` in the folder; the names of the hub
cache's blobs; the metadata files that `hf download --local-dir` writes; and `published.json`, wanduet's table of known
models, for folders that were copied by hand.
"""

import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from wanduet.weights.json_files import read_json
from wanduet.weights.manifest import GIT_LENGTH, MANIFEST_FILE, SHA256_LENGTH, file_sha256

_HASH = re.compile(rf"[0-9a-f]{{{GIT_LENGTH}}}|[0-9a-f]{{{SHA256_LENGTH}}}")
_NOTES = Path(".cache/huggingface/download")  # huggingface_hub's metadata folder in a `--local-dir`
_CLOCK_STEP = 1.0  # seconds by which a file's time may exceed the time in its metadata: file systems round


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """Size in bytes and SHA-256 of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PublishedModel:
    """A model on the hub: its id, and every file of one revision by relative path."""

    model: str
    revision: str
    files: Mapping[str, PublishedFile]

    @property
    def num_bytes(self) -> int:
        """Size of all files, in bytes."""
        return sum(file.num_bytes for file in self.files.values())

    def bytes_of(self, parts: Collection[str]) -> int:
        """Size of the files of some components, in bytes."""
        return sum(file.num_bytes for path, file in self.files.items() if path.partition("/")[0] in parts)


@cache
def published_models() -> Mapping[str, PublishedModel]:
    """Return the models of `published.json` by hub id."""
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
    """Return the published hash of each file of a folder: SHA-256, or git's SHA-1 for a small file of the hub's cache.

    Empty for an unknown folder, for example a model that the user trained.
    """
    if (folder / MANIFEST_FILE).exists():
        hashes = read_json(folder / MANIFEST_FILE).get("sha256")
        return {str(k): str(v) for k, v in hashes.items()} if isinstance(hashes, Mapping) else {}
    return _cache_links(folder) or _download_notes(folder) or _known_files(folder)


def unverified_weights(folder: Path) -> list[str]:
    """Return the names of a folder's weight files without a known hash: damage to these cannot be detected."""
    hashes = published_hashes(folder)
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.glob("*/*.safetensors")))
    return [name for name in names if name not in hashes]


def _cache_links(folder: Path) -> dict[str, str]:
    """Return hashes from the hub's cache, where a file is a link to `blobs/<hash>`."""
    # Not `Path.resolve`, which raises on circular links.
    links = {
        p.relative_to(folder).as_posix(): Path(os.path.realpath(p)) for p in sorted(folder.rglob("*")) if p.is_symlink()
    }
    return {
        name: blob.name for name, blob in links.items() if blob.parent.name == "blobs" and _HASH.fullmatch(blob.name)
    }


def _download_notes(folder: Path) -> dict[str, str]:
    """Return hashes from the metadata files of `hf download --local-dir` (commit, hash, time), without those of files
    that were changed later."""
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
    """Return the hashes of components that match a published model: config.json byte for byte, and all file sizes.

    Each component is matched separately, because a user may combine a transformer of their own with the published VAE.
    A component that diffusers saved again has a different config, so it does not match.
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
