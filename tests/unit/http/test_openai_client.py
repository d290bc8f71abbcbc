"""The protocol as the real `openai` client speaks it, over a socket, with a worker that only counts."""

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fake_engine import FakeEngine, content

from wanduet.config import EngineConfig
from wanduet.jobs.attempt import AttemptSettings
from wanduet.jobs.records import QueueFullError, Submitted
from wanduet.jobs.runner import Runner, RunnerSettings
from wanduet.jobs.store import JobStore
from wanduet.media.video import write_video

openai = pytest.importorskip("openai")
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")


@pytest.fixture
def served(make_api: Any, store: JobStore) -> Iterator[Any]:
    api = make_api()
    server = uvicorn.Server(uvicorn.Config(api.app, port=0, log_config=None, lifespan="off"))
    engine = FakeEngine(EngineConfig(data_dir=store.files.folder))
    api.engine = engine
    settings = RunnerSettings(attempt=AttemptSettings(poll_seconds=0.01, progress_seconds=0.01))
    runner = Runner(store, engine, settings, hooks=engine.hooks)
    threads = [threading.Thread(target=server.run), threading.Thread(target=runner.run)]
    for thread in threads:
        thread.start()
    while not server.started:
        time.sleep(0.01)
    api.port = server.servers[0].sockets[0].getsockname()[1]
    yield api
    server.should_exit = True
    runner.drain()
    for thread in threads:
        thread.join(120)


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=2) as client:
        yield client


def test_create_and_poll_then_download_every_variant(client: Any) -> None:
    extra = {"seed": 5, "num_inference_steps": 4}
    video = client.videos.create_and_poll(
        prompt="a red circle",
        model="Wan2.1-T2V-1.3B",
        seconds="4",
        size="832x480",
        extra_body=extra,
        poll_interval_ms=20,
    )
    assert (video.status, video.progress, video.seconds, video.size) == ("completed", 100, "4", "832x480")
    assert client.videos.download_content(video.id).read() == content("a red circle", 5)
    for variant, start in (("thumbnail", b"webp"), ("spritesheet", b"jpeg")):
        assert client.videos.download_content(video.id, variant=variant).read().startswith(start)


def test_a_video_to_start_from(client: Any, served: Any, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    write_video([np.zeros((9, 32, 64, 3), np.uint8)], clip)
    extra = {"strength": 0.5, "num_inference_steps": 2}
    with clip.open("rb") as file:
        video = client.videos.create(prompt="red", size="64x32", input_reference=file, extra_body=extra)
    assert video.settings["input_video"] == f"sha256:{hashlib.sha256(clip.read_bytes()).hexdigest()}"
    assert (video.settings["num_frames"], video.settings["strength"]) == (9, 0.5)
    assert client.videos.poll(video.id, poll_interval_ms=20).status == "completed"
    assert Path(served.engine.jobs[0].request.input_video).read_bytes() == clip.read_bytes()


def test_list_with_paging_while_deleting(client: Any) -> None:
    ids = [client.videos.create(prompt=f"job {i}", extra_body={"num_inference_steps": 1}).id for i in range(7)]
    assert [video.id for video in client.videos.list(limit=3, order="asc")] == ids
    for video in client.videos.list(limit=2):
        deleted = client.videos.delete(video.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    assert list(client.videos.list()) == []


def test_remix(client: Any) -> None:
    source = client.videos.create_and_poll(
        prompt="red", extra_body={"seed": 5, "num_inference_steps": 1}, poll_interval_ms=20
    )
    remix = client.videos.remix(source.id, prompt="blue")
    assert remix.remixed_from_video_id == source.id
    remix = client.videos.poll(remix.id, poll_interval_ms=20)
    assert client.videos.download_content(remix.id).read() == content("blue", 5)


def test_a_failed_video_is_an_answer_and_no_exception(client: Any) -> None:
    video = client.videos.create_and_poll(prompt="oom 1", poll_interval_ms=20)
    assert (video.status, video.error.code) == ("failed", "out_of_memory")


def test_errors_arrive_as_the_clients_exceptions(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.videos.create(prompt="x", extra_body={"num_frames": 80})
    assert (bad.value.param, bad.value.code) == ("num_frames", "invalid_request")
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve("video_" + "0" * 32)
    with pytest.raises(openai.NotFoundError) as missing:
        client.videos.create(prompt="x", model="sora-2")
    assert missing.value.code == "model_not_found"


def test_the_clients_own_retries_store_one_job(client: Any, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanduet.doors.http.errors.QUEUE_RETRY_SECONDS", 1)
    submit, refusals = JobStore.submit, []

    def full_at_first(self: JobStore, *values: Any) -> Submitted:
        if not refusals:
            refusals.append(1)
            raise QueueFullError(0, personal=False)
        return submit(self, *values)

    monkeypatch.setattr(JobStore, "submit", full_at_first)
    client.videos.create(prompt="x", extra_body={"num_inference_steps": 1})
    assert refusals
    assert len(served.store.list().jobs) == 1
