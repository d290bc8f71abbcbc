"""Limits on connections, requests and threads, derived from this process's limit of open files."""

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MOST_CONNECTIONS = 1000
MOST_THREADS = 40
_RESERVE = 24  # open files: the page's, the pipes of a new worker and of upload readers, files that libraries open
_FILES_PER_THREAD = 2  # a database connection opens the database and its log
_FEWEST = 4


@dataclass(frozen=True, slots=True)
class Capacity:
    """Maximum numbers at one time of open connections, of requests in progress, and of threads that serve them.

    `connections` exceeds `requests`, so that there is always an idle connection that can be closed for a new client.
    """

    connections: int
    requests: int
    threads: int


def find_capacity(max_connections: int | None = None) -> Capacity:
    """Return what fits below this process's limit of open files; `max_connections` caps the connections."""
    wanted = MOST_CONNECTIONS if max_connections is None else max(2, max_connections)
    limit = _file_limit()
    if limit is None:
        return _split(wanted, MOST_THREADS)
    room = limit - _open_files() - _RESERVE
    threads = max(_FEWEST, min(MOST_THREADS, room // 6))
    return _split(min(wanted, max(_FEWEST, _fitting(room - _FILES_PER_THREAD * threads))), threads)


def _fitting(room: int) -> int:
    """Return how many connections fit into `room` open files.

    A connection with a request in progress may also have a stored file open.
    """
    connections = room // 2
    while connections + _requests(connections) < room:
        connections += 1
    return connections - 1


def _requests(connections: int) -> int:
    return max(1, connections - max(_FEWEST, connections // 8))


def _split(connections: int, threads: int) -> Capacity:
    return Capacity(connections, _requests(connections), threads)


def _file_limit() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft


def _open_files() -> int:
    for folder in ("/proc/self/fd", "/dev/fd"):
        if Path(folder).is_dir():
            with suppress(OSError):
                return len(os.listdir(folder))
    return 0
