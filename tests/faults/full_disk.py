"""What a full disk does to a server with the real engine; run by test_jobs_disk.py as a program, in its own mounts.

    full_disk.py DATA tmpfs    DATA is a small disk, which is filled to the last byte
    full_disk.py DATA limit    no file of the server or its worker may be written to (RLIMIT_FSIZE 0)

The disk fills at a random moment of a job (`--moments N` times), is full for some seconds, and has room again. Prints
what was seen as one JSON object.
"""

import argparse
import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))
from real_server import LONG, PROMPT, Server, serving

JOB = {**LONG, "num_inference_steps": "60"}
BALLAST = "ballast"
CHUNK = 2**20


@contextmanager
def filled(server: Server) -> Iterator[None]:
    """No byte is free during the block."""
    ballast = server.data / BALLAST
    with ballast.open("wb", buffering=0) as file:
        size = CHUNK
        while size:
            try:
                file.write(b"x" * size)
            except OSError:
                size //= 2
    yield
    ballast.unlink()


@contextmanager
def limited(server: Server) -> Iterator[None]:
    """No file can be written during the block."""
    processes = [server.process.pid, *(child.pid for child in psutil.Process(server.process.pid).children())]
    for process in processes:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    yield
    for process in processes:
        resource.prlimit(process, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("way", choices=("tmpfs", "limit"))
    parser.add_argument("--moments", type=int, default=1)
    options = parser.parse_args()
    full = filled if options.way == "tmpfs" else limited
    dice = random.Random(0)
    found = {"moments": 0, "refused": 0, "accepted": 0, "unreadable": 0, "lost": 0, "different": 0, "codes": []}
    seconds: list[float] = []
    with serving(options.data, "--no-page", "--checkpoint-seconds", "0.1") as server:
        first = server.create(**JOB, seed="5")["id"]
        assert server.wait(first)["status"] == "completed"
        want = server.frames(first)
        for _ in range(options.moments):
            ids = [server.create(**JOB, seed="5")["id"] for _ in range(2)]
            server.wait(ids[0], lambda video: video["status"] != "queued")
            time.sleep(dice.uniform(0.0, 3.0))
            with full(server):
                found["moments"] += 1
                end = time.monotonic() + dice.uniform(1.0, 4.0)
                while time.monotonic() < end:
                    answer = server.http.post("/v1/videos", data={"prompt": PROMPT, **JOB, "seed": "5"})
                    if answer.status_code == 200:  # there was room in the log's pages
                        ids.append(answer.json()["id"])
                        found["accepted"] += 1
                    else:
                        assert answer.status_code == 503, answer.text
                        assert answer.json()["error"]["code"] == "store_unavailable"
                        assert answer.headers["retry-after"]
                        found["refused"] += 1
                    found["unreadable"] += server.http.get("/v1/videos").status_code != 200
                    found["unreadable"] += server.http.get(f"/v1/videos/{ids[0]}").status_code != 200
                    time.sleep(0.2)
            freed = time.monotonic()
            ids.append(server.create(**JOB, seed="5")["id"])
            seconds.append(time.monotonic() - freed)
            for video_id in ids:
                video = server.wait(video_id)
                if video["status"] != "completed":
                    found["lost"] += 1
                    found["codes"].append(video["error"]["code"])
                elif not np.array_equal(server.frames(video_id), want):
                    found["different"] += 1
                server.http.delete(f"/v1/videos/{video_id}")
        ready = server.http.get("/ready").status_code
    print(json.dumps({**found, "ready": ready, "seconds to take the next job": [round(s, 2) for s in seconds]}))


if __name__ == "__main__":
    main()
