"""Leases die by standing still in the watcher's own time, or with their process; never by the wall clock."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_engine import open_store

from wanduet.jobs.leases import (
    LeaseWatch,
    SupervisorLock,
    WorkerLock,
    is_dead,
    live_workers,
    outlived_by_supervisor,
    remove_stale_locks,
)
from wanduet.jobs.records import NewJob, Pulse

HOUR = 3600.0


def pulse(beat: int, token: int = 1, worker: str = "elsewhere.1.x") -> Pulse:
    return Pulse("video_a", worker, token, beat, 30.0)


class Watch:
    def __init__(self, folder: Path) -> None:
        self.now = 0.0
        self.watch = LeaseWatch(folder, lambda: self.now)

    def after(self, seconds: float, *pulses: Pulse) -> list[Pulse]:
        self.now += seconds
        return self.watch.look(pulses)


def test_a_beat_that_stands_still_is_dead_after_its_length(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    looks = [bool(watch.after(5.0, pulse(1))) for _ in range(8)]
    assert looks == [False] * 6 + [True] * 2


def test_a_moving_beat_or_a_new_token_starts_again(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    assert not any(watch.after(7.0, pulse(beat)) for beat in (1, 1, 1, 1, 2, 2, 2, 2, 3))
    assert not any(watch.after(7.0, pulse(3, token)) for token in (2, 2, 2, 2, 3, 3))


def test_a_paused_watcher_steals_nothing(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    watch.after(0.0, pulse(1))
    assert watch.after(HOUR, pulse(1)) == [], "both may have been paused; the holder gets time to beat"
    assert watch.after(1.0, pulse(2)) == []


def test_a_dead_lease_is_found_by_rare_looks_too(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    assert [bool(watch.after(HOUR, pulse(1))) for _ in range(5)] == [False] * 4 + [True]


def test_forgets_jobs_that_are_gone(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for _ in range(4):
        watch.after(7.0, pulse(1))
    watch.after(7.0)
    assert watch.after(7.0, pulse(1)) == []


@pytest.mark.parametrize("jump", [HOUR, -HOUR])
def test_clock_jumps(tmp_path: Path, jump: float) -> None:
    """The wall clock jumps at every look: the live lease stays, the dead one is taken after its length."""
    wall = [time.time()]
    jumping = open_store(tmp_path, clock=lambda: wall[0])
    for _ in range(2):
        jumping.submit(NewJob("ann", "m", {"prompt": "x"}))
    live, dead = jumping.claim("elsewhere.1.a", 30.0), jumping.claim("elsewhere.2.b", 30.0)
    assert live is not None
    assert dead is not None
    watch = Watch(tmp_path)
    stolen, taken_at = 0, None
    for second in range(0, 90, 3):
        wall[0] += jump if second % 2 else -jump / 2
        jumping.renew(live)
        for found in watch.after(3.0, *jumping.pulses()):
            stolen += found.job_id == live.job.id
            if found.job_id == dead.job.id and jumping.recover(found, 3) is not None:
                taken_at = second
    assert stolen == 0
    assert taken_at is not None
    assert 30 <= taken_at <= 36
    jumping.complete(live, [])
    jumping.close()


def test_a_dead_process_is_noticed_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from wanduet.jobs.leases import WorkerLock;"
        "lock = WorkerLock(pathlib.Path(sys.argv[1])); print(lock.worker, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        worker = process.stdout.readline().strip()
        assert not is_dead(tmp_path, worker)
        assert live_workers(tmp_path) == [worker]
        process.kill()
        process.wait()
    assert is_dead(tmp_path, worker)
    assert live_workers(tmp_path) == []
    assert len(Watch(tmp_path).after(0.0, pulse(1, worker=worker))) == 1


@pytest.mark.skipif(os.name != "posix", reason="Windows moves no folder in which files are open")
def test_a_folder_that_is_moved_away_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "workers"
    folder.mkdir()
    lock = WorkerLock(folder)
    monkeypatch.setattr(Path, "exists", lambda path: True)  # as it was just before
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    folder.rename(tmp_path / "moved")
    assert not is_dead(folder, lock.worker)
    assert os.listdir(tmp_path) == ["moved"]
    lock.release()


def test_workers_elsewhere_are_never_declared_dead_by_a_lock(tmp_path: Path) -> None:
    lock = WorkerLock(tmp_path)
    assert not is_dead(tmp_path, lock.worker)
    host, rest = lock.worker.split(".", 1)
    lock.release()
    assert is_dead(tmp_path, lock.worker)
    assert not is_dead(tmp_path, f"other{host}.{rest}")
    assert not is_dead(tmp_path, f"{host}.99.gone"), "no file: nothing is known"
    assert not is_dead(tmp_path, f"{host}.../../x")


def test_a_worker_is_outlived_by_its_supervisor_or_not(tmp_path: Path) -> None:
    supervisor = SupervisorLock(tmp_path)
    lock = WorkerLock(tmp_path, supervisor.id)
    lock.release()
    assert not outlived_by_supervisor(tmp_path, lock.worker), "it never was there"
    supervisor.acquire()
    assert outlived_by_supervisor(tmp_path, lock.worker)
    assert live_workers(tmp_path) == []
    assert is_dead(tmp_path, lock.worker)
    supervisor.release()
    assert not outlived_by_supervisor(tmp_path, lock.worker)
    for unknown in (lock.worker.rpartition(".")[0], f"other{lock.worker}", "w1"):
        assert outlived_by_supervisor(tmp_path, unknown), "nothing is known"


def test_old_locks_are_removed(tmp_path: Path) -> None:
    held, left = WorkerLock(tmp_path), WorkerLock(tmp_path)
    left.release()
    (tmp_path / f"{held.worker.split('.')[0]}.0123abcd.supervisor").touch()
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0))
    remove_stale_locks(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{held.worker}.lock"]
    held.release()
