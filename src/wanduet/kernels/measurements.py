"""What was measured on a machine, remembered from one run to the next: attention back ends, and tiles (see `conv_choice`).

A measurement holds as long as driver and installed packages are the same. A failure may have been the moment's (too little
memory was free, a package that is there now was missing): it holds for a day at most, and is not believed once driver,
packages or, where memory was short, the free memory have changed.
"""

import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from wanduet.folders import make_folder, replace_file

log = logging.getLogger(__name__)

CACHE_FILE = "attention.json"
FAILURE_S = 24 * 3600.0
MORE_MEMORY = 1.1  # so many times what was free when memory was short is worth another attempt
DRIVER = Path(
    "/proc/driver/nvidia/version"
)  # Linux; other systems' packages change with their drivers too rarely to ask


@dataclass(frozen=True, slots=True)
class Timing:
    """What was seen of one back end or tile: median milliseconds, relative error against float32, or why it was dropped.

    `state` says with which driver and packages. Of a failure: `since`, in seconds since 1970, and where memory was short,
    the bytes that were free then.
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
        """Whether it computed the right thing."""
        return self.problem is None


Table = tuple[Timing, ...]


def stamped(table: Table, device: torch.device) -> Table:
    """The rows with the state in which they were seen, and failures with their time."""
    state, now = machine_state(), time.time()
    return tuple(replace(row, state=state, since=None if row.usable else now) for row in table)


def holds(table: Table, device: torch.device) -> bool:
    """Whether what was seen can be taken for what would be seen now."""
    state, now = machine_state(), time.time()
    return all(row.state == state and (row.usable or _still_fails(row, device, now)) for row in table)


def _still_fails(row: Timing, device: torch.device, now: float) -> bool:
    if row.since is None or not 0 <= now - row.since < FAILURE_S:  # a clock that was set back proves nothing
        return False
    return row.free_bytes is None or free_bytes(device) <= MORE_MEMORY * row.free_bytes


def free_bytes(device: torch.device) -> int:
    """What could be allocated on a device now."""
    if device.type != "cuda":
        return sys.maxsize
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def machine_state() -> str:
    """Changes with the driver and with what is installed beside this package."""
    return _state_of(tuple(sys.path), _driver())


def _driver() -> str:
    try:
        return DRIVER.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@lru_cache(maxsize=4)
def _state_of(folders: tuple[str, ...], driver: str) -> str:
    """From the names of installed packages' folders, which hold their versions; nothing is imported or read."""
    names = set()
    for folder in folders:
        try:
            names |= {name for name in os.listdir(folder or ".") if name.endswith((".dist-info", ".egg-info"))}
        except OSError:  # a zip file, or nothing
            continue
    return sha256("\n".join([driver, *sorted(names)]).encode()).hexdigest()[:16]


def read_all(folder: Path, file: str = CACHE_FILE) -> dict[str, list[dict[str, Any]]]:
    """All tables of a folder; none where the file is damaged."""
    try:
        content = json.loads((folder / file).read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_table(folder: Path | None, key: str, file: str = CACHE_FILE) -> Table | None:
    """None if nothing usable is kept under `key`: a damaged file only costs a new measurement."""
    if folder is None:
        return None
    try:
        table = tuple(Timing(**row) for row in read_all(folder, file)[key])
    except (KeyError, TypeError):
        return None
    return table or None


def write_table(folder: Path | None, key: str, table: Table, file: str = CACHE_FILE) -> None:
    """Keep a table; a disk that cannot costs the next start a measurement."""
    if folder is None:
        return
    try:
        make_folder(folder)
        content = read_all(folder, file) | {key: [asdict(row) for row in table]}
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=file, delete=False) as partial:
            json.dump(content, partial, indent=1)
        replace_file(Path(partial.name), folder / file)
    except OSError as problem:
        log.warning("What was measured cannot be kept in %s: %s", folder / file, problem)
