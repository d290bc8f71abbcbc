"""The video that a job starts from: stored before the job, deleted with it, checked before it is used."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, finish_job
from sqlalchemy.exc import OperationalError
from test_runner import finished, running

from wanduet.errors import InvalidRequestError, OutputError
from wanduet.jobs import files as job_files
from wanduet.jobs import sweep as sweeping
from wanduet.jobs.records import (
    IdempotencyError,
    Lease,
    Limits,
    NewJob,
    OutputFile,
    QueueFullError,
    StoredJob,
    demand_of,
)
from wanduet.jobs.store import JobStore

CLIP = b"not really a video" * 100
HASH = hashlib.sha256(CLIP).hexdigest()


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    path.write_bytes(CLIP)
    return path


def submit(store: JobStore, clip: Path, key: str | None = None, limits: Limits | None = None) -> StoredJob:
    request = {"prompt": "a fox", "num_inference_steps": 2, "seed": 1, "input_video": f"sha256:{HASH}", "strength": 0.5}
    return store.submit(NewJob("ann", "miniature", request, idempotency_key=key), limits, clip).job


def inputs_in(store: JobStore) -> list[str]:
    return sorted(path.name for path in store.files.videos.glob("*.input"))


def publish(store: JobStore, lease: Lease, name: str = "video.mp4") -> OutputFile:
    path = store.files.work_path(lease.job.id).with_name(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"0123456789")
    return store.files.publish(lease.job.id, lease.token, 0, path)


def test_the_engine_gets_the_file_and_the_finished_job_keeps_it(store: JobStore, clip: Path) -> None:
    job = submit(store, clip)
    with running(store) as engine:
        done = finished(store, job.id)
    (given,) = [one.request for one in engine.jobs]
    assert given.input_video == str(store.files.videos / f"{job.id}.input")
    assert Path(given.input_video).read_bytes() == CLIP
    assert (given.strength, done.request) == (0.5, job.request)
    assert done.status == "completed"
    assert done.inputs == job.inputs == job.files
    assert [file.variant for file in done.files] == ["video", "thumbnail", "spritesheet", "input"]


@pytest.mark.parametrize(("harm", "word"), [(Path.unlink, "missing"), (lambda path: path.write_bytes(b"x"), "changed")])
def test_without_its_file_a_job_fails_at_once(
    store: JobStore, clip: Path, harm: Callable[[Path], Any], word: str
) -> None:
    job = submit(store, clip)
    harm(store.files.videos / job.inputs[0].name)
    with running(store) as engine:
        done = finished(store, job.id)
    assert done.error is not None
    assert (done.status, done.error.code, done.attempts) == ("failed", "input_lost", 1)
    assert word in done.error.message
    assert not engine.jobs


@pytest.mark.parametrize(("harm", "code"), [(Path.unlink, "input_lost"), (Path.exists, "invalid_request")])
def test_a_file_that_the_engine_cannot_read_is_lost_or_the_clients(
    store: JobStore, clip: Path, harm: Callable[[Path], Any], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(store, clip)

    def refuse(self: Any, request: Any, *rest: Any, **more: Any) -> None:
        harm(path := Path(request.input_video))
        raise InvalidRequestError("input_video", path.name, "there are no pictures in it")

    monkeypatch.setattr(FakeEngine, "submit", refuse)
    with running(store):
        done = finished(store, job.id)
    assert done.error is not None
    assert (done.status, done.error.code, done.attempts) == ("failed", code, 1)
    assert job.id not in done.error.message
    assert ("no pictures" in done.error.message) == (code == "invalid_request")


def test_the_file_is_on_the_disk_before_its_job_is_seen(
    store: JobStore, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    add = type(store.files).add_input

    def look(self: Any, job_id: str, source: Path) -> OutputFile:
        file = add(self, job_id, source)
        seen.append((store.list().jobs, store.files.path(file.name)))
        return file

    monkeypatch.setattr(type(store.files), "add_input", look)
    job = submit(store, clip)
    ((jobs, path),) = seen
    assert (jobs, path) == ((), store.files.videos / f"{job.id}.input")


def test_a_kill_between_file_and_job_is_swept(store: JobStore, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("gone"))  # which leaves open whether the job is stored

    finish_job(store)
    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "_insert", fail)
        with pytest.raises(OperationalError):
            submit(store, clip)
    kept = submit(store, clip)
    assert len(inputs_in(store)) == 2
    assert store.sweep() == 0, "its job may be stored in this moment"
    assert len(inputs_in(store)) == 2
    later = time.time() + sweeping.ARRIVAL_SECONDS + 60
    for sweeper in store._sweepers:
        monkeypatch.setattr(sweeper, "_clock", lambda: later)
    assert store.sweep() == 1
    assert inputs_in(store) == [f"{kept.id}.input"]


def test_a_refused_or_repeated_submission_leaves_no_file(store: JobStore, clip: Path) -> None:
    job = submit(store, clip, key="k")
    assert submit(store, clip, key="k").id == job.id
    with pytest.raises(QueueFullError):
        submit(store, clip, limits=Limits(queue=1))
    with pytest.raises(QueueFullError):
        store.check_room("ann", "other", Limits(per_owner=1))
    store.check_room("ann", "k", Limits(per_owner=1))
    with pytest.raises(IdempotencyError):
        store.submit(NewJob("ann", "miniature", {"prompt": "other"}, idempotency_key="k"), None, clip)
    assert inputs_in(store) == [f"{job.id}.input"]
    assert clip.exists()


def test_a_file_that_cannot_be_copied_stores_no_job(store: JobStore, clip: Path) -> None:
    clip.unlink()
    with pytest.raises(OutputError):
        submit(store, clip)
    assert store.list().jobs == ()
    assert list(store.files.videos.iterdir()) == []


def test_where_there_are_no_hard_links_it_is_copied(
    store: JobStore, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    job = submit(store, clip)
    path = store.files.path(job.inputs[0].name)
    assert path is not None
    assert (path.read_bytes(), path.samefile(clip)) == (CLIP, False)


def test_who_lost_a_job_deletes_its_results_only(store: JobStore, clip: Path) -> None:
    job = submit(store, clip)
    first = store.claim("w1", 30.0)
    assert first is not None
    late = publish(store, first)
    store.release(first)
    second = store.claim("w2", 30.0)
    assert second is not None
    store.files.remove_older(job.id, second.token)
    assert store.files.path(late.name) is None
    done = store.complete(second, [publish(store, second, "again.mp4")])
    store.files.remove_older(job.id, second.token + 1)
    store.files.discard_work(job.id)
    assert inputs_in(store) == [done.inputs[0].name]
    store.delete(job.id)
    assert list(store.files.videos.iterdir()) == []


def test_a_failed_job_keeps_its_input_until_it_expires(tmp_path: Path, store: JobStore, clip: Path) -> None:
    job = submit(store, clip)
    store.cancel(job.id)
    store.sweep()
    assert inputs_in(store)
    store._retention._clock = lambda: time.time() + 1000.0
    assert store.expire() == 1
    assert inputs_in(store) == []


def test_the_disk_limit_counts_inputs_and_spares_those_of_open_jobs(store: JobStore, clip: Path) -> None:
    waiting, old = submit(store, clip), submit(store, clip)
    store.cancel(old.id)
    assert store.trim(2 * len(CLIP)) == 0
    assert store.trim(len(CLIP)) == 1, "the oldest file is of a job that waits"
    assert inputs_in(store) == [f"{waiting.id}.input"]
    assert store.trim(0) == 0


def test_uploads_of_a_killed_server_are_deleted(store: JobStore) -> None:
    old, new = store.files.new_upload(), store.files.new_upload()
    for path in (old, new):
        path.write_bytes(CLIP)
    long_ago = time.time() - job_files.UPLOAD_SECONDS - 60
    os.utime(old, (long_ago, long_ago))
    store.sweep()
    assert [path.exists() for path in (old, new)] == [False, True]


def test_the_demand_has_the_strength(store: JobStore, clip: Path) -> None:
    request = submit(store, clip).request
    assert demand_of(request).endswith("/2/-/1/0.5")
    assert demand_of({**request, "strength": None}).endswith("/2/-/1/-")
    assert demand_of({**request, "input_video": None}).endswith("/2/-/1")
