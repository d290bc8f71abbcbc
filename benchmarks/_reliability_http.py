"""What slow and hostile clients cost a server: `figures(server)` attacks one on this machine, bounded in count and time.

python benchmarks/_reliability_http.py    starts a server with the miniature, attacks it and prints the figures
"""

import argparse
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SLOW_CLIENTS = 1000
SLOW_SECONDS = 20.0
UPLOADS = 60
UPLOAD_SECONDS = 20.0
HALF = b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Le"


@dataclass(frozen=True, slots=True)
class Target:
    """A server of this machine: its address, its process and the file that its log goes to."""

    url: str
    pid: int
    log: Path


def figures(server: Target, slow_clients: int = SLOW_CLIENTS, uploads: int = UPLOADS) -> dict[str, Any]:
    """Attack a server for about a minute. Raises ValueError for one that is not at 127.0.0.1.

    Sizes in bytes, times in seconds. `half_sent`: clients that send half a request and wait; `uploads`: clients
    that upload empty and damaged videos again and again.
    """
    if urlsplit(server.url).hostname != "127.0.0.1":
        raise ValueError("Only a server of this machine is attacked.")
    return {
        "half_sent": _half_sent(server, slow_clients, SLOW_SECONDS),
        "uploads": _hostile_uploads(server, uploads, UPLOAD_SECONDS),
    }


def _half_sent(server: Target, count: int, seconds: float) -> dict[str, Any]:
    memory, log = _memory(server.pid), server.log.stat().st_size
    waits, failures, most = [], 0, memory
    with ExitStack() as open_sockets:
        clients = [open_sockets.enter_context(_socket()) for _ in range(count)]
        for client in clients:
            with suppress(OSError):
                client.connect(_address(server.url))
                client.sendall(HALF)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.monotonic()
            failures += _ask(server.url, "GET", "/v1/videos") != "200"
            waits.append(time.monotonic() - began)
            most = max(most, _memory(server.pid))
            time.sleep(0.2)
    return {
        "clients": count,
        "legitimate_requests": len(waits),
        "legitimate_failures": failures,
        "first_answer_s": round(waits[0], 3),
        "p99_s": round(_p99(waits), 3),
        "log_bytes": server.log.stat().st_size - log,
        "memory_growth_bytes": most - memory,
    }


def _hostile_uploads(server: Target, count: int, seconds: float) -> dict[str, Any]:
    quiet = [_get(server) for _ in range(50)]
    # The clients in a process of their own: they must not keep the one that measures waiting.
    command = [sys.executable, __file__, "--upload-to", server.url, "--clients", str(count), "--seconds", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attack:
        waits = []
        while attack.poll() is None:
            waits.append(_get(server))
            time.sleep(0.02)
        assert attack.stdout is not None
        statuses = json.load(attack.stdout)
    return {
        "clients": count,
        "statuses": statuses,
        "get_videos_p99_s": round(_p99(waits), 3),
        "get_videos_median_s": round(statistics.median(waits), 3),
        "get_videos_quiet_p99_s": round(_p99(quiet), 3),
    }


def _upload(url: str, count: int, seconds: float) -> dict[str, int]:
    """Be `count` clients for some seconds; how often which status came."""
    statuses: dict[str, int] = {}
    guard = threading.Lock()
    end = time.monotonic() + seconds

    def upload(number: int) -> None:
        content = b"" if number % 2 else (b"\0\0\0\x20ftypisom" + os.urandom(2**16))
        while time.monotonic() < end:
            status = _ask(url, "POST", "/page/settings", content)
            with guard:
                statuses[status] = statuses.get(status, 0) + 1
            time.sleep(0.2)

    threads = [threading.Thread(target=upload, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return dict(sorted(statuses.items()))


def _get(server: Target) -> float:
    began = time.monotonic()
    assert _ask(server.url, "GET", "/v1/videos") == "200"
    return time.monotonic() - began


def _ask(url: str, method: str, path: str, content: bytes | None = None) -> str:
    """The status of an answer, or the name of what came instead of one."""
    connection = http.client.HTTPConnection(*_address(url), timeout=60.0)
    try:
        connection.request(method, path, content)
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    return parts.hostname or "", parts.port or 80


def _p99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def _memory(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _socket() -> Iterator[socket.socket]:
    with socket.socket() as made:
        made.settimeout(5.0)
        yield made


@contextmanager
def serving(folder: Path, open_files: int | None) -> Iterator[Target]:
    """`wanduet serve` with the miniature; `open_files` is its limit of them."""
    import resource

    def limit() -> None:
        if open_files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))

    log = folder / "server.log"
    command = [sys.executable, "-m", "wanduet.doors.cli.main", "serve", "--model", "miniature", "--port", "0"]
    environment = {**os.environ, "WANDUET_DATA_DIR": str(folder / "data")}
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, env=environment, text=True, preexec_fn=limit
        ) as process,
    ):
        try:
            assert process.stdout is not None
            url = next(word for word in process.stdout.readline().split() if word.startswith("http"))
            yield Target(url.removesuffix("/v1"), process.pid, log)
        finally:
            process.terminate()
            process.wait(60)


def main() -> None:
    """Print the figures of a server with the usual limit of open files, and of one with 64."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--open-files", type=int, nargs="*", default=[1024, 64])
    parser.add_argument("--slow-clients", type=int, default=SLOW_CLIENTS)
    parser.add_argument("--upload-to", help="Only be clients that upload.")
    parser.add_argument("--clients", type=int, default=UPLOADS)
    parser.add_argument("--seconds", type=float, default=UPLOAD_SECONDS)
    arguments = parser.parse_args()
    if arguments.upload_to:
        print(json.dumps(_upload(arguments.upload_to, arguments.clients, arguments.seconds)))
        return
    found = {}
    for open_files in arguments.open_files:
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder), open_files) as server:
            found[f"{open_files}_open_files"] = figures(server, arguments.slow_clients)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
