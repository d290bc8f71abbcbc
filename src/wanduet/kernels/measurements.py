"""Files of measurements on this machine: attention backends, and the VAE's convolution tiles (see `vae.choose`).

A measurement is valid as long as the driver and the installed packages are the same. A failure may be temporary (too
little free memory, a package that was missing): it is valid for a day at most, until the driver or the packages change
or, if memory was short, until more memory is free.
"""

import json
import logging
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from wanduet.folders import replace_json

log = logging.getLogger(__name__)

CACHE_FILE = "attention.json"
FAILURE_S = 24 * 3600.0
MORE_MEMORY = 1.1  # retry after a memory failure once this factor more memory is free
DRIVER = Path("/proc/driver/nvidia/version")  # Linux; on other systems a new driver is not noticed, which is rare


@dataclass(frozen=True, slots=True)
class Timing:
    """Result of one backend or tile: median milliseconds, relative error against float32, or the problem.

    `state`: identifies the driver and packages. For a failure: `since` in seconds since 1970 and, if memory was short,
    `free_bytes` at that time.
    """

    name: str
    milliseconds: float | None
    error: float | None
    problem: str | None = None
    state: str | None = None
    since: float | None = None
    free_bytes: int | None = None

    @property
    def usable(self) -> bool:
        """Whether it computed the correct result."""
        return self.problem is None


Table = tuple[Timing, ...]


def stamped(table: Table, device: torch.device) -> Table:
    """Return the rows with the machine's current state, and failures with the current time."""
    state, now = machine_state(), time.time()
    return tuple(replace(row, state=state, since=None if row.usable else now) for row in table)


def is_valid(table: Table, device: torch.device) -> bool:
    """Return True if a table is still valid on this machine."""
    state, now = machine_state(), time.time()
    return all(row.state == state and (row.usable or _still_fails(row, device, now)) for row in table)


def _still_fails(row: Timing, device: torch.device, now: float) -> bool:
    if row.since is None or not 0 <= now - row.since < FAILURE_S:  # negative: the clock was set back
        return False
    return row.free_bytes is None or free_bytes(device) <= MORE_MEMORY * row.free_bytes


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can be allocated on a device now."""
    if device.type != "cuda":
        return sys.maxsize
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def machine_state() -> str:
    """Return a digest of the driver and of the installed packages."""
    return _state_of(tuple(sys.path), _driver())


def _driver() -> str:
    try:
        return DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@lru_cache(maxsize=4)
def _state_of(folders: tuple[str, ...], driver: str) -> str:
    """Return the digest, from the names of the packages' metadata folders, which include versions. Reads no files."""
    names = set()
    for folder in folders:
        try:
            names |= {name for name in os.listdir(folder or ".") if name.endswith((".dist-info", ".egg-info"))}
        except OSError:  # a zip file, or nothing
            continue
    return sha256("\n".join([driver, *sorted(names)]).encode()).hexdigest()[:16]


def read_all(folder: Path, file: str = CACHE_FILE) -> dict[str, list[dict[str, Any]]]:
    """Return all tables of a folder, by key; empty if the file is damaged."""
    try:
        content = json.loads((folder / file).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_table(folder: Path | None, key: str, file: str = CACHE_FILE) -> Table | None:
    """Return the table stored under `key`; None if there is none or the file is damaged."""
    if folder is None:
        return None
    try:
        table = tuple(Timing(**row) for row in read_all(folder, file)[key])
    except (KeyError, TypeError):
        return None
    return table or None


def write_table(folder: Path | None, key: str, table: Table, file: str = CACHE_FILE) -> None:
    """Store a table under `key`. If the disk fails, logs a warning, and the next process measures again."""
    if folder is None:
        return
    try:
        replace_json(folder / file, read_all(folder, file) | {key: [asdict(row) for row in table]})
    except OSError as problem:
        log.warning("What was measured cannot be kept in %s: %s", folder / file, problem)
