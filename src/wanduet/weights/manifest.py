"""Hashes of every file of a model, so that damaged weights never run.

safetensors notices a truncated file and nothing else. Hashing 20 GB takes half a minute, so a file that was
found good is not hashed again until its size or time changes.
"""

import hashlib
import json
import os
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from wanduet.errors import WeightsError
from wanduet.untrusted import check_regular, cut, open_regular

CHUNK = 8 * 2**20
# Hexadecimal digits of the two hashes that files are published with on the hub: SHA-256 for large files, git's
# own SHA-1 of `blob <size>\0<content>` for small ones.
SHA256_LENGTH, GIT_LENGTH = 64, 40


def file_sha256(path: Path) -> str:
    """Of a file's bytes."""
    return _hash(path, "sha256")


def git_sha1(path: Path) -> str:
    """The name that git gives to a file's bytes."""
    return _hash(path, "sha1", f"blob {path.stat().st_size}\0".encode())


def write_manifest(folder: Path, hashes: Mapping[str, str] | None = None, name: str = "manifest.json") -> None:
    """Write `name` in a model folder: relative path to SHA-256 of every file (hashed here unless given)."""
    if hashes is None:
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != name)
        hashes = {p.relative_to(folder).as_posix(): file_sha256(p) for p in files}
    (folder / name).write_text(json.dumps({"sha256": dict(sorted(hashes.items()))}, indent=2) + "\n")


def verify(
    folder: Path,
    hashes: Mapping[str, str],
    remember: Path | None = None,
    known: MutableMapping[str, str] | None = None,
) -> int:
    """Compare files with their hashes (SHA-256, or git's SHA-1); returns how many were hashed now.

    `remember` is a file where good ones are noted, `known` the same for this process. Raises WeightsError that
    names the files that are bad or missing.
    """
    bad, hashed = find_damaged(folder, hashes, remember, known)
    if bad:
        names = ", ".join(str(folder / name) for name in bad[:5]) + (f" and {len(bad) - 5} more" if bad[5:] else "")
        missing = all(not (folder / name).exists() for name in bad)
        problem = "is missing" if missing else "is damaged: its hash is not the one it was published with"
        problem = problem if len(bad) == 1 else problem.replace("is ", "are ", 1).replace("its hash is", "hashes are")
        raise WeightsError(f"{names} {problem}.", hint=_HINT)
    return hashed


def find_damaged(
    folder: Path,
    hashes: Mapping[str, str],
    remember: Path | None = None,
    known: MutableMapping[str, str] | None = None,
) -> tuple[list[str], int]:
    """Names of files that do not have their hash or are missing, and how many were hashed now. See `verify`."""
    good = _read(remember) | dict(known or {})
    bad: list[str] = []
    hashed = 0
    for name, expected in hashes.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise WeightsError(f"The hashes of {folder} name {cut(name)!r}, which is not in it.", hint=_HINT)
        try:
            check_regular(path)
            stat = path.stat()
            state = f"{expected}:{stat.st_size}:{stat.st_mtime_ns}"
            if good.get(str(path)) == state:
                continue
            actual = git_sha1(path) if len(str(expected)) == GIT_LENGTH else file_sha256(path)
        except FileNotFoundError:
            bad.append(name)
            continue
        except OSError as error:
            raise WeightsError(f"Cannot read {path}: {error.strerror}.", hint=_HINT) from error
        hashed += 1
        if actual == expected:
            good[str(path)] = state
        else:
            bad.append(name)
    if known is not None:
        known.update(good)
    if hashed and remember is not None:
        _write(remember, good)
    return bad, hashed


_HINT = "Fetch the model again with `wanduet download`."


def _hash(path: Path, algorithm: str, start: bytes = b"") -> str:
    digest = hashlib.new(algorithm, start, usedforsecurity=False)
    with open_regular(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path | None) -> dict[str, str]:
    try:
        content = json.loads(path.read_text()) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, known: Mapping[str, str]) -> None:
    """Best effort: without it, files are hashed again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        partial.write_text(json.dumps(known, indent=1))
        os.replace(partial, path)
    except OSError:
        return
