"""A whole server with the real engine, killed at random: nothing lost, nothing made twice, the same frames."""

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from real_server import LONG, Server, serving

KILLS = int(os.environ.get("WANDUET_KILLS", "200"))
JOBS_A_KILL = 2

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="POSIX signals and /proc"),
    pytest.mark.slow,
    pytest.mark.timeout(7200),
]


def test_killed_at_random_every_video_is_made_once_with_the_same_frames(tmp_path: Path, record_property: Any) -> None:
    data, dice = tmp_path / "data", random.Random(0)
    flags = ("--no-page", "--checkpoint-seconds", "0.2")
    ids: list[str] = []
    seconds: list[float] = []
    with serving(data, *flags) as server:
        first = server.create("job", **LONG, seed="5")["id"]
        assert server.wait(first)["status"] == "completed"
        want = server.frames(first)
    for kill in range(KILLS):
        with serving(data, *flags) as server:
            ids += [server.create("job", **LONG, seed="5")["id"] for _ in range(JOBS_A_KILL)]
            started = time.monotonic()
            worker = server.worker()
            seconds.append(time.monotonic() - started)
            time.sleep(dice.uniform(0.0, 6.0))
            os.kill(worker if kill % 3 == 0 else server.process.pid, signal.SIGKILL)
            if kill % 3:
                server.process.wait()
            else:
                time.sleep(dice.uniform(0.0, 2.0))
    with serving(data, *flags) as server:
        lost, differ = check(server, ids, want)
        left = [path.name for name in ("work", "checkpoints") for path in (data / name).iterdir()]
        videos = list((data / "videos").glob("*.mp4"))
    print(f"kills {KILLS}, jobs {len(ids)}, lost {len(lost)}, different {len(differ)}, ready in {max(seconds):.1f} s")
    for name, value in (("kills", KILLS), ("jobs", len(ids)), ("lost", len(lost)), ("different", len(differ))):
        record_property(name, value)
    assert (lost, differ, left) == ([], [], [])
    assert len(videos) == len(ids) + 1, "no video was published twice"


def check(server: Server, ids: list[str], want: np.ndarray) -> tuple[list[str], list[str]]:
    """Jobs that are not completed, and jobs whose frames are others."""
    lost, differ = [], []
    for video_id in ids:
        if server.wait(video_id)["status"] != "completed":
            lost.append(video_id)
        elif not np.array_equal(server.frames(video_id), want):
            differ.append(video_id)
    return lost, differ
