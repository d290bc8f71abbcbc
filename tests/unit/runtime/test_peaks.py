"""Peaks of memory belong to the job that took it."""

import subprocess
import sys

import pytest
import torch

from wanduet.config import EngineConfig
from wanduet.runtime import peaks as module
from wanduet.runtime.models import Models
from wanduet.runtime.peaks import PeakMemory, add_up


@pytest.fixture
def taken(monkeypatch):
    """A GPU and a host: what is taken now, and the most since the counters began."""
    state = {"now": 0, "most": 0, "host": 0}

    def take(size: int) -> None:
        state["now"] = size
        state["most"] = max(state["most"], size)

    def reset() -> None:
        state["most"] = state["now"]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda index: state["most"])
    monkeypatch.setattr(module, "process_peak_bytes", lambda: 100)
    monkeypatch.setattr(module, "reset", reset)
    return take


def test_a_job_has_nothing_of_what_ran_before(taken) -> None:
    peaks = PeakMemory()
    taken(900)  # another engine of this process
    taken(0)
    peaks.begin("job")
    taken(300)
    taken(50)
    assert peaks.end("job") == {"cpu": 100, "cuda:0": 300}
    peaks.begin("next")
    assert peaks.end("next") == {"cpu": 100, "cuda:0": 50}  # what is still held is held


def test_jobs_that_overlap_each_have_what_was_taken_in_their_time(taken) -> None:
    peaks = PeakMemory()
    peaks.begin("first")
    taken(500)
    taken(10)
    peaks.begin("second")
    taken(200)
    assert peaks.end("first")["cuda:0"] == 500
    taken(20)
    assert peaks.end("second")["cuda:0"] == 200


def test_jobs_of_two_engines_that_overlap_each_have_their_own(taken) -> None:
    one, other = Models(EngineConfig(model="miniature")), Models(EngineConfig(model="miniature"))
    one.peaks.begin("first")
    taken(500)
    taken(10)
    other.peaks.begin("second")
    taken(200)
    assert one.peaks.end("first")["cuda:0"] == 500
    assert other.peaks.end("second")["cuda:0"] == 200


def test_one_that_failed_is_forgotten(taken) -> None:
    peaks = PeakMemory()
    peaks.begin("failed")
    peaks.forget("failed")
    peaks.forget("failed")
    peaks.begin("job")
    taken(30)
    assert peaks.end("job")["cuda:0"] == 30
    assert not peaks._open


def test_processes_of_a_group_share_the_host_and_have_a_device_each(taken) -> None:
    ranks = add_up([{"cpu": 1000, "cuda:0": 641}, {"cpu": 2000, "cuda:1": 630}])
    assert ranks == {"cpu": 3000, "cuda:0": 641, "cuda:1": 630}
    peaks = PeakMemory()
    peaks.begin("job")
    taken(278)  # of the process that gives the tasks: its text encoder
    assert peaks.end("job", ranks) == {"cpu": 3100, "cuda:0": 641 + 278, "cuda:1": 630}
    assert ranks["cpu"] == 3000


# In a process of its own: whether the system lets a count begin anew depends on what a process has done before.
FORGETS = """
from pathlib import Path
from wanduet.planning.host import process_peak_bytes
from wanduet.runtime.peaks import CLEAR, reset
block = bytearray(b"x") * (96 * 2**20)
high = process_peak_bytes()
del block
{how}
print(process_peak_bytes() < high - 48 * 2**20)
"""


def forgets(how: str) -> bool:
    done = subprocess.run([sys.executable, "-c", FORGETS.format(how=how)], capture_output=True, text=True)
    return done.stdout.strip() == "True"


@pytest.mark.skipif(not module.CLEAR.exists(), reason="Linux's")
def test_the_host_s_peak_begins_anew() -> None:
    if not forgets("reset()"):
        assert not forgets('Path("/proc/self/clear_refs").write_text("5")'), "the system would"
        pytest.skip("this system's count of a process's peak does not begin anew")
