"""Verifies a model's files by their hashes, so that damaged weights are never used.

safetensors detects truncated files only. Hashing 29 GB takes half a minute or more, so a verified file is not hashed
again until its size or modification time changes.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from wanduet.errors import WeightsError
from wanduet.folders import make_folder, replace_file
from wanduet.untrusted import check_regular, cut, open_regular

CHUNK = 8 * 2**20
THREADS = 4  # hashing releases the GIL; more files at once only make a disk seek
# Number of hexadecimal digits of the two hashes that the hub publishes: SHA-256 for large files, git's SHA-1 of
# `blob <size>\0<content>` for small ones.
MANIFEST_FILE = "manifest.json"
SHA256_LENGTH, GIT_LENGTH = 64, 40
_LOCK_SECONDS = 5.0  # wait so long for another process that writes to the same notes

Progress = Callable[[int, int], None]  # called with bytes hashed and total bytes; may raise to stop


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return _hash(path, "sha256")


def write_manifest(folder: Path, hashes: Mapping[str, str] | None = None, name: str = MANIFEST_FILE) -> None:
    """Write `name` in a model folder: the SHA-256 of every file by relative path, computed unless passed in
    `hashes`."""
    if hashes is None:
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != name)
        hashes = {p.relative_to(folder).as_posix(): file_sha256(p) for p in files}
    (folder / name).write_text(json.dumps({"sha256": dict(sorted(hashes.items()))}, indent=2) + "\n")


@dataclass(frozen=True, slots=True)
class Notes:
    """Records of verified files: `file` is shared by all processes, `known` is of this process."""

    file: Path | None = None
    known: MutableMapping[str, str] | None = None


def verify(
    folder: Path, hashes: Mapping[str, str], notes: Notes | None = None, progress: Progress | None = None
) -> int:
    """Compare files with their hashes (SHA-256, or git's SHA-1); return the number of files hashed in this call.

    Files recorded in `notes` are not hashed again. Raises WeightsError, which names the damaged or missing files, and
    whatever `progress` raises.
    """
    bad, hashed = find_damaged(folder, hashes, notes, progress)
    if bad:
        names = ", ".join(str(folder / name) for name in bad[:5]) + (f" and {len(bad) - 5} more" if bad[5:] else "")
        missing = all(not (folder / name).exists() for name in bad)
        problem = "is missing" if missing else "is damaged: its hash is not the one it was published with"
        if len(bad) > 1:
            problem = "are missing" if missing else "are damaged: their hashes are not those they were published with"
        raise WeightsError(f"{names} {problem}.", hint=_HINT if missing else f"{_HINT} {_OR_TRUST}")
    return hashed


def find_damaged(
    folder: Path, hashes: Mapping[str, str], notes: Notes | None = None, progress: Progress | None = None
) -> tuple[list[str], int]:
    """Return the names of damaged or missing files, and the number of files hashed in this call. See `verify`."""
    notes = notes or Notes()
    good = _read(notes.file) | dict(notes.known or {})
    states: dict[str, str] = {}
    bad: set[str] = set()
    for name, expected in hashes.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise WeightsError(f"The hashes of {folder} name {cut(name)!r}, which is not in it.", hint=_HINT)
        try:
            check_regular(folder / name)
            stat = (folder / name).stat()
        except FileNotFoundError:
            bad.add(name)
            continue
        except OSError as error:
            raise WeightsError(f"Cannot read {folder / name}: {error.strerror}.", hint=_HINT) from error
        state = f"{expected}:{stat.st_size}:{stat.st_mtime_ns}"
        if good.get(str(folder / name)) != state:
            states[name] = state
    actual = _hash_all({name: (folder / name, len(str(hashes[name])) == GIT_LENGTH) for name in states}, progress)
    bad |= {name for name in states if actual[name] != hashes[name]}
    found = {str(folder / name): state for name, state in states.items() if name not in bad}
    if notes.known is not None:
        notes.known.update(good | found)
    if found and notes.file is not None:
        _write(notes.file, found)
    return [name for name in hashes if name in bad], len(states)


_HINT = "Fetch the model again with `wanduet download`."
_OR_TRUST = "Weights of your own: `wanduet download --model FOLDER --trust` takes them as they are."


def _hash_all(files: Mapping[str, tuple[Path, bool]], progress: Progress | None) -> dict[str, str]:
    """Return each file's hash by name, computed in `THREADS` threads; empty for a missing file. Raises WeightsError.

    `files`: by name, the path and whether to compute git's SHA-1.
    """
    sizes = {name: path.stat().st_size for name, (path, _) in files.items()}
    total, done, guard = sum(sizes.values()), 0, threading.Lock()
    stop = threading.Event()

    def count(num_bytes: int) -> None:
        nonlocal done
        if stop.is_set():
            raise _StoppedError
        with guard:
            done += num_bytes
            if progress is not None:
                progress(done, total)

    def one(name: str) -> str:
        path, is_git = files[name]
        try:
            start = f"blob {sizes[name]}\0".encode() if is_git else b""
            return _hash(path, "sha1" if is_git else "sha256", start, count)
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise WeightsError(f"Cannot read {path}: {error.strerror}.", hint=_HINT) from error

    with ThreadPoolExecutor(THREADS, "wanduet-hash") as pool:
        try:
            return dict(zip(files, pool.map(one, files), strict=True))
        except BaseException:
            stop.set()  # the other threads end at their next chunk
            raise


class _StoppedError(Exception):
    """Ends a hashing thread after an error in another one, or after a cancel."""


def _hash(path: Path, algorithm: str, start: bytes = b"", count: Callable[[int], None] | None = None) -> str:
    digest = hashlib.new(algorithm, start, usedforsecurity=False)
    with open_regular(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            if count is not None:
                count(len(chunk))
    return digest.hexdigest()


def _read(path: Path | None) -> dict[str, str]:
    try:
        content = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, found: Mapping[str, str]) -> None:
    """Add entries to a notes file, under a lock between processes. Errors are ignored: files are then hashed again."""
    with suppress(OSError, Timeout):
        make_folder(path.parent)
        with FileLock(path.with_name(f"{path.name}.lock"), timeout=_LOCK_SECONDS):
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            partial.write_text(json.dumps(_read(path) | dict(found), indent=1))
            replace_file(partial, path)
