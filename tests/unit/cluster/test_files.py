"""Files in an object store: a job goes on on another node's disk, and what was published is found from anywhere.

The store is a folder behind fsspec; each "node" has a data folder of its own and sees nothing of the others'.
"""

import hashlib
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))

from fake_engine import FakeEngine, FakeJob, Pace, Turnstile, content, journal

from wanduet.cluster import files as cluster_files
from wanduet.cluster.files import StoredFiles, open_files
from wanduet.config import EngineConfig
from wanduet.errors import ConfigError, OutputError
from wanduet.jobs.attempt import AttemptSettings
from wanduet.jobs.files import JobFiles
from wanduet.jobs.records import ForeignDatabaseError, NewJob, StoredJob
from wanduet.jobs.runner import Runner, RunnerSettings
from wanduet.jobs.store import JobStore

JOB = "video_" + "0" * 31 + "1"
FAST = RunnerSettings(lease_seconds=2.0, attempt=AttemptSettings(poll_seconds=0.02, progress_seconds=0.02))


@pytest.fixture(autouse=True)
def _look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_files, "LOOK_SECONDS", 0.02)


class Cluster:
    """A database, a store and as many nodes as are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.storage = f"file://{folder / 'storage'}"
        self.url = f"sqlite:///{folder / 'jobs.sqlite3'}"

    def files(self, node: str) -> StoredFiles:
        return StoredFiles(self.folder / node, self.storage)

    def node(self, name: str) -> JobStore:
        return JobStore(self.files(name), self.url)

    def stored(self, *folders: str) -> list[str]:
        root = self.folder / "storage"
        found = (path for name in folders or ("videos", "work") for path in (root / name).rglob("*"))
        return sorted(str(path.relative_to(root)) for path in found if path.is_file())


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def run(store: JobStore, until: Callable[[], object], pace: Pace | None = None) -> None:
    runner = Runner(store, FakeEngine(EngineConfig(data_dir=store.files.folder), pace), FAST, hooks=FakeEngine.hooks)
    thread = threading.Thread(target=runner.run)
    thread.start()
    end = time.monotonic() + 120
    while not until() and time.monotonic() < end:
        time.sleep(0.01)
    runner.drain()
    thread.join()
    assert until()


def submit(store: JobStore, steps: int) -> str:
    request = {"prompt": "a cat", "num_inference_steps": steps, "seed": 7}
    return store.submit(NewJob("ann", "m", request)).job.id


def test_a_drained_job_goes_on_on_another_disk_and_no_step_is_done_twice(cluster: Cluster) -> None:
    with closing(cluster.node("a")) as a, closing(cluster.node("b")) as b, closing(cluster.node("api")) as api:
        job = submit(a, 60)
        run(a, lambda: len(journal(a.files.folder)) >= 10, Turnstile(10))
        assert api.get(job).status == "queued"
        assert not (a.files.folder / "work" / job).exists()
        run(b, lambda: api.get(job).finished)
        lines = journal(a.files.folder) + journal(b.files.folder)
        assert lines == [f"{job} step {step}" for step in range(60)] + [f"{job} done"]
        done = api.get(job)
        path = api.files.path(done.files[0].name)
        assert path is not None
        assert path.read_bytes() == content("a cat", 7)
        assert path.is_relative_to(api.files.folder)
        assert [name.partition("/")[0] for name in cluster.stored()] == ["videos"] * 3
        api.delete(job)
        assert cluster.stored() == []
        assert api.files.path(done.files[0].name) is None


def test_checkpoints_and_results_come_back_the_result_last(cluster: Cluster) -> None:
    a, b = cluster.files("a"), cluster.files("b")
    key = "ab" * 16
    with a.attempt(JOB, resume=False):
        work = a.work_path(JOB).parent
        work.mkdir(parents=True)
        (a.folder / "checkpoints").mkdir()
        a.note_checkpoints(JOB, [key])
        (a.folder / "checkpoints" / f"{key}.safetensors").write_bytes(b"latents")
        (work / "result.json").write_bytes(b"{}")
        (work / "video.mp4.partial").write_bytes(b"half")
        assert a._written(JOB)[-1][0] == "result.json"
        a.keep(JOB)
    assert cluster.stored() == [
        f"work/{JOB}/checkpoints.json", f"work/{JOB}/checkpoints/{key}.safetensors", f"work/{JOB}/result.json",
    ]  # fmt: skip
    assert not (a.folder / "checkpoints" / f"{key}.safetensors").exists()
    with b.attempt(JOB, resume=True):
        assert (b.folder / "checkpoints" / f"{key}.safetensors").read_bytes() == b"latents"
        assert b.work_path(JOB).with_name("result.json").read_bytes() == b"{}"
    with b.attempt(JOB, resume=False):
        assert not b.work_path(JOB).parent.exists()


def test_the_preview_of_a_job_is_seen_from_another_node(cluster: Cluster) -> None:
    a = cluster.files("a")
    with a.attempt(JOB, resume=False):
        a.preview_path(JOB).parent.mkdir(parents=True)
        a.preview_path(JOB).write_bytes(b"webp")
        a.keep(JOB)
    assert cluster.files("api").preview(JOB) == b"webp"
    assert cluster.files("api").preview("video_" + "0" * 32) is None


def test_a_store_that_fails_costs_work_but_no_job(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    a = cluster.files("a")

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the store")

    for call in ("put_file", "find", "ls", "rm", "get_file"):
        monkeypatch.setattr(a._fs, call, fail)
    with a.attempt(JOB, resume=True):
        a.work_path(JOB).parent.mkdir(parents=True)
        a.work_path(JOB).write_bytes(b"video")
        a.keep(JOB)
        with pytest.raises(OutputError):  # what nobody could fetch is not completed
            a.publish(JOB, 1, 0, a.work_path(JOB))
    a.discard_work(JOB)
    assert a.path(f"{JOB}.1-0.mp4") is None


def test_what_nobody_owns_goes_to_the_trash_of_the_store(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(cluster.node("a")) as a:
        job = submit(a, 2)
        run(a, lambda: a.get(job).finished)
        other = "video_" + "0" * 31 + "2"
        for name in (f"videos/{other}.1-0.mp4", f"work/{other}/video.latents.safetensors"):
            path = cluster.folder / "storage" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
        assert a.sweep() == 2
        assert all(job in name for name in cluster.stored())
        assert len(cluster.stored()) == 3
        thrown = [name.split("/", 2)[2] for name in cluster.stored("trash")]
        assert thrown == [f"videos/{other}.1-0.mp4", f"work/{other}/video.latents.safetensors"]
        later = time.time() + 8 * 86400
        monkeypatch.setattr("wanduet.jobs.places.time.time", lambda: later)
        assert a.sweep() == 0
        assert cluster.stored("trash") == []


def test_another_clusters_database_is_refused_the_store(cluster: Cluster) -> None:
    with closing(cluster.node("a")) as a, closing(cluster.node("b")):
        job = submit(a, 2)
        run(a, lambda: a.get(job).finished)
    before = cluster.stored()
    with pytest.raises(ForeignDatabaseError, match="storage holds the files of"):
        JobStore(cluster.files("new"), f"sqlite:///{cluster.folder / 'other.sqlite3'}")
    assert cluster.stored() == before
    with closing(cluster.node("c")) as c:
        assert c.sweep() == 0
    assert cluster.stored() == before


def test_a_store_that_does_not_answer_keeps_nobody_from_starting_and_nothing_is_swept(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    JobStore(JobFiles(cluster.folder / "one machine"), cluster.url).close()
    files = cluster.files("a")

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the store")

    with monkeypatch.context() as patch:
        for call in ("cat_file", "ls"):
            patch.setattr(files._fs, call, fail)
        with closing(JobStore(files, cluster.url)) as store:
            orphan = files.videos / f"{JOB}.1-0.mp4"
            orphan.write_bytes(b"x")
            with pytest.raises(OutputError):
                store.sweep()
            assert orphan.exists()
    with closing(JobStore(files, cluster.url)) as store:
        assert files.places[1].mark() == files.places[0].mark() is not None


def test_published_files_of_killed_attempts_go(cluster: Cluster) -> None:
    a = cluster.files("a")
    a.work_path(JOB).parent.mkdir(parents=True)
    a.work_path(JOB).write_bytes(b"video")
    for token in (1, 2):
        a.publish(JOB, token, 0, a.work_path(JOB))
    cluster.files("b").remove_older(JOB, 2)
    assert cluster.stored() == [f"videos/{JOB}.2-0.mp4"]


def test_addresses_that_nobody_knows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="storage"):
        open_files(tmp_path, "nosuch://bucket")
    assert type(open_files(tmp_path, None)) is JobFiles


def test_what_cannot_be_copied_is_copied_later(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    files = cluster.files("a")
    with files.attempt(JOB, resume=False):
        latents = files.work_path(JOB).with_name("video.mp4.latents.safetensors")
        latents.parent.mkdir(parents=True, exist_ok=True)
        with monkeypatch.context() as patch:
            patch.setattr(files, "_put", refuse)
            latents.write_bytes(b"latents")
            files.keep(JOB)
            assert cluster.stored() == []
        files.keep(JOB)
        assert f"work/{JOB}/{latents.name}" in cluster.stored()


def refuse(path: Path, name: str) -> None:
    raise OSError("no room")


CLIP = b"not really a video" * 100


def submit_with_input(store: JobStore, steps: int) -> StoredJob:
    clip = store.files.new_upload()
    clip.write_bytes(CLIP)
    digest = f"sha256:{hashlib.sha256(CLIP).hexdigest()}"
    request = {"prompt": "a cat", "num_inference_steps": steps, "seed": 7, "input_video": digest, "strength": 0.5}
    return store.submit(NewJob("ann", "m", request), None, clip).job


def test_an_input_is_found_by_a_worker_on_another_node(cluster: Cluster) -> None:
    with closing(cluster.node("server")) as server, closing(cluster.node("b")) as b:
        job = submit_with_input(server, 2)
        assert cluster.stored("videos") == [f"videos/{job.id}.input"]
        assert not list(server.files.videos.iterdir())
        given = []

        def pace(running: FakeJob, step: int) -> None:
            path = Path(running.request.input_video)
            time.sleep(3 * cluster_files.LOOK_SECONDS)  # in which the attempt's files are copied
            given.append((path.read_bytes(), path.is_relative_to(b.files.work), cluster.stored("work")))

        run(b, lambda: b.get(job.id).finished, pace)
        assert b.get(job.id).status == "completed"
        assert [one[:2] for one in given] == [(CLIP, True)] * 2
        assert not any(name.endswith("input") for one in given for name in one[2]), "it is there already"
        assert list(b.files.work.iterdir()) == [], "nothing is left on the node's disk"
        path = server.files.path(job.inputs[0].name)  # for a remix
        assert path is not None
        assert path.read_bytes() == CLIP
        server.delete(job.id)
        assert cluster.stored() == []


def test_an_input_that_the_store_has_lost_fails_its_job(cluster: Cluster) -> None:
    with closing(cluster.node("server")) as server, closing(cluster.node("b")) as b:
        job = submit_with_input(server, 2)
        (cluster.folder / "storage" / "videos" / job.inputs[0].name).unlink()
        run(b, lambda: b.get(job.id).finished)
        error = b.get(job.id).error
        assert error is not None
        assert (error.code, b.get(job.id).attempts) == ("input_lost", 1)


def test_an_input_is_fetched_again_while_the_store_is_away(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(cluster.node("server")) as server:
        job = submit_with_input(server, 2)
        get, refusals = StoredFiles._get, [OSError("reset"), OSError("reset")]

        def refuse(self: StoredFiles, remote: str, path: Path) -> None:
            if refusals:
                raise refusals.pop()
            get(self, remote, path)

        monkeypatch.setattr(StoredFiles, "_get", refuse)
        path = server.files.bring_input(job.id)
        assert path is not None
        assert path.read_bytes() == CLIP
        refusals.extend(OSError("reset") for _ in range(cluster_files.TRIES))
        with pytest.raises(OSError, match="reset"):
            server.files.bring_input(job.id)
