"""A disk that fills while a whole server works: nothing acknowledged is lost, and it goes on when there is room."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts and limits of Linux")

PROGRAM = str(Path(__file__).with_name("full_disk.py"))


def survive(folder: Path, way: str, moments: int, record_property: Any) -> None:
    data = folder / "data"
    data.mkdir()
    command = [sys.executable, PROGRAM, str(data), way, "--moments", str(moments)]
    if way == "tmpfs":
        mounted = f'mount -t tmpfs -o size=160m none "{data}" && '
        try:
            subprocess.run(["unshare", "-rm", "sh", "-c", mounted + "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("mounting is not permitted here")
        command = ["unshare", "-rm", "sh", "-c", mounted + 'exec "$@"', "sh", *command]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    seconds = found.pop("seconds to take the next job")
    found |= {"seconds to go on, median": statistics.median(seconds), "seconds to go on, max": max(seconds)}
    for name, value in found.items():
        record_property(name, value)
    print(way, found)
    assert (found["lost"], found["different"], found["unreadable"], found["ready"]) == (0, 0, 0, 200), found
    assert found["refused"] + found["accepted"] > 0


@pytest.mark.parametrize("way", ["tmpfs", "limit"])
def test_a_full_disk_is_survived(tmp_path: Path, way: str, record_property: Any) -> None:
    survive(tmp_path, way, 1, record_property)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", ["tmpfs", "limit"])
def test_a_full_disk_is_survived_at_many_moments(tmp_path: Path, way: str, record_property: Any) -> None:
    survive(tmp_path, way, 20, record_property)
