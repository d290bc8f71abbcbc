"""The whole service with the real engine and the miniature: over HTTP, with the client that people use."""

import base64
import io
import json
import os
import re
import signal
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from real_server import LONGER, PATIENCE, PROMPT, Server, serving, wait_until, write_lora

from wanduet.media.read import probe, read_metadata

openai = pytest.importorskip("openai")
pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="POSIX signals and /proc"),
    pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning"),
]
EXTRA = {"num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1, "seed": 7}


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    with openai.OpenAI(base_url=server.url, api_key="none") as client:
        yield client


@pytest.fixture(scope="module")
def video(client: Any) -> Any:
    """A finished video of a size that can be looked at."""
    done = client.videos.create_and_poll(
        prompt=PROMPT, size="64x48", extra_body={**EXTRA, "num_inference_steps": 6}, poll_interval_ms=100
    )
    assert done.status == "completed", done.error
    return done


def test_a_video_is_made_and_is_what_was_asked_for(client: Any, video: Any, tmp_path: Path) -> None:
    assert (video.progress, video.size, video.seconds, video.model) == (100, "64x48", "0.25", "miniature")
    path = tmp_path / "video.mp4"
    path.write_bytes(client.videos.download_content(video.id).read())
    about = probe(path)
    assert (about["width"], about["height"], about["num_frames"]) == (64, 48, 5)
    made_by = read_metadata(path)
    assert made_by["request"]["prompt"] == PROMPT
    assert (made_by["seed"], made_by["model"]["name"]) == (7, "miniature")


def test_thumbnail_spritesheet_and_ranges(client: Any, server: Server, video: Any) -> None:
    for variant, kind, size in (("thumbnail", "WEBP", (64, 48)), ("spritesheet", "JPEG", (256, 96))):
        with Image.open(io.BytesIO(client.videos.download_content(video.id, variant=variant).read())) as image:
            assert (image.format, image.size) == (kind, size)
    whole = server.http.get(f"/v1/videos/{video.id}/content")
    part = server.http.get(f"/v1/videos/{video.id}/content", headers={"Range": "bytes=100-199"})
    assert (whole.headers["content-type"], whole.headers["accept-ranges"]) == ("video/mp4", "bytes")
    assert (part.status_code, part.content) == (206, whole.content[100:200])


def test_remix_list_and_delete(client: Any, server: Server, video: Any) -> None:
    remix = client.videos.poll(client.videos.remix(video.id, prompt="a blue square").id, poll_interval_ms=100)
    assert (remix.status, remix.remixed_from_video_id, remix.size) == ("completed", video.id, video.size)
    assert [one.id for one in client.videos.list(limit=1)][:2] == [remix.id, video.id]
    assert client.videos.delete(remix.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(remix.id)
    assert not list((server.data / "videos").glob(f"{remix.id}*"))


def test_a_video_with_a_lora(client: Any, server: Server, video: Any, tmp_path: Path) -> None:
    """Its metadata and its object have the file's hash, and a page that reads them submits the same again."""
    sha256 = write_lora(server.data / "loras" / "style.safetensors", 0.3)
    extra = {**EXTRA, "num_inference_steps": 6, "loras": [{"name": "style.safetensors", "strength": 0.8}]}
    made = client.videos.create_and_poll(prompt=PROMPT, size="64x48", extra_body=extra, poll_interval_ms=100)
    assert made.status == "completed", made.error
    record = {"name": "style.safetensors", "strength": 0.8, "sha256": sha256}
    assert made.loras == [record]
    (tmp_path / "video.mp4").write_bytes(client.videos.download_content(made.id).read())
    assert read_metadata(tmp_path / "video.mp4")["request"]["loras"] == [record]
    assert not np.array_equal(server.frames(made.id), server.frames(video.id))
    again = client.videos.poll(client.videos.remix(made.id, prompt=PROMPT).id, poll_interval_ms=100)
    assert np.array_equal(server.frames(again.id), server.frames(made.id))


@pytest.mark.parametrize("how", ["changed", "deleted"])
def test_a_queued_job_uses_no_other_file_than_it_was_accepted_with(server: Server, how: str) -> None:
    path = server.data / "loras" / f"{how}.safetensors"
    write_lora(path, 0.3)
    before = [server.create(**LONGER) for _ in range(2)]  # as many as are in the engine at once
    queued = server.create(lora_name=path.name)
    path.unlink()
    if how == "changed":
        write_lora(path, 0.2)
    for job in before:
        assert server.http.post(f"/v1/videos/{job['id']}/cancel").status_code == 200
    error = server.wait(queued["id"])["error"]
    assert (error["code"], path.name in error["message"]) == ("lora_lost", True)
    assert str(server.data) not in error["message"]


@dataclass
class Watched:
    """A job that nothing interrupted, and what its events said."""

    job: str
    names: list[str] = field(default_factory=list)
    percents: list[int] = field(default_factory=list)
    pictures: list[bytes] = field(default_factory=list)


@pytest.fixture(scope="module")
def watched(server: Server) -> Watched:
    seen = Watched(server.create("something else", **LONGER, seed="11")["id"])
    with server.http.stream("GET", f"/v1/videos/{seen.job}/events") as stream:
        for line in stream.iter_lines():
            kind, _, value = line.partition(": ")
            if kind == "event":
                seen.names.append(value)
            elif kind == "data" and seen.names[-1] == "preview":
                seen.pictures.append(base64.b64decode(json.loads(value)["image"].partition(",")[2]))
            elif kind == "data":
                seen.percents.append(json.loads(value)["progress"])
    return seen


@pytest.fixture(scope="module")
def reference(server: Server, watched: Watched) -> np.ndarray:
    """The frames of the job that nothing interrupted."""
    assert server.wait(watched.job)["status"] == "completed"
    return server.frames(watched.job)


def test_events_show_progress_and_the_video_taking_shape(server: Server, watched: Watched) -> None:
    assert watched.names[-1] == "done"
    assert watched.percents == sorted(watched.percents)
    assert watched.percents[-1] == 100
    assert len(set(watched.percents)) > 3
    assert watched.pictures
    with Image.open(io.BytesIO(watched.pictures[-1])) as image:
        assert (image.format, image.size) == ("WEBP", (4, 4))
    assert len(watched.pictures[-1]) < 10_000
    assert server.http.get(f"/v1/videos/{watched.job}/preview").status_code == 404, "the video itself is there"


def denoising(video: dict[str, Any]) -> bool:
    return video["progress"] >= 10


def test_cancel_in_the_denoise_frees_the_worker(server: Server, record_property: Any) -> None:
    job = server.create(**LONGER)
    server.wait(job["id"], denoising)
    began = time.monotonic()
    ended = server.http.post(f"/v1/videos/{job['id']}/cancel").json()
    assert (ended["status"], ended["error"]["code"]) == ("failed", "cancelled")
    following = server.create()
    assert server.wait(following["id"])["status"] == "completed"
    record_property("seconds until the next job was done", time.monotonic() - began)
    assert server.get(job["id"])["error"]["code"] == "cancelled"
    wait_until(lambda: not list((server.data / "checkpoints").glob("*")))
    wait_until(lambda: not (server.data / "work" / job["id"]).exists())


def test_impossible_requests_are_refused_or_fail_with_a_reason(client: Any, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.videos.create(prompt="x", extra_body={"num_frames": 80})
    assert bad.value.param == "num_frames"
    assert "81" in bad.value.message
    assert server.http.post("/v1/videos", data={"prompt": "x", "size": "33x33"}).status_code == 400


def test_the_killed_workers_job_goes_on_to_the_same_frames(
    server: Server, reference: np.ndarray, record_property: Any
) -> None:
    resumed: list[int] = []
    for _ in range(5):  # on a busy machine the job may be done before the kill
        known = len(resumed_at(server))
        job = server.create("something else", **LONGER, seed="11")
        server.wait(job["id"], lambda video: video["progress"] >= 40)
        worker = server.worker()
        began = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        assert server.wait(job["id"])["status"] == "completed"
        assert np.array_equal(server.frames(job["id"]), reference)
        if resumed := resumed_at(server)[known:]:
            break
    record_property("seconds to the end after the kill", time.monotonic() - began)
    assert resumed
    assert resumed[-1] >= 10
    assert server.http.get("/health").status_code == 200


@pytest.mark.slow
def test_a_drained_job_goes_on_where_it_was(tmp_path: Path, reference: np.ndarray, record_property: Any) -> None:
    """SIGTERM in the denoise: a checkpoint, exit 0; the next server goes on, queued jobs too; nothing is leaked."""
    data = tmp_path / "data"
    with serving(data, "--no-page", "--parallel", "1") as first:
        job, queued = first.create("something else", **LONGER, seed="11"), first.create("a secret plan")
        first.wait(job["id"], lambda video: video["progress"] >= 30)
        began = time.monotonic()
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(PATIENCE) == 0
        record_property("seconds to drain", time.monotonic() - began)
        assert len(list((data / "checkpoints").glob("*.safetensors"))) == 1
    with serving(data, "--no-page") as second:
        assert second.get(job["id"])["progress"] >= 30, "what was done is not forgotten"
        assert second.wait(job["id"])["status"] == second.wait(queued["id"])["status"] == "completed"
        assert resumed_at(second)[-1] >= 20
        assert np.array_equal(second.frames(job["id"]), reference)
        assert not list((data / "checkpoints").glob("*"))
        wait_until(lambda: not any((data / "work").iterdir()))
        assert "secret" not in second.log()
        assert "something else" not in second.log()


def resumed_at(server: Server) -> list[int]:
    """The steps after which workers went on."""
    return [int(step) for step in re.findall(r"Going on after step (\d+)", server.log())]


def test_overload_is_refused_politely(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "--no-page", "--max-queue", "3", "--max-queue-per-key", "2") as busy:
        codes = [busy.http.post("/v1/videos", data={"prompt": "x", **LONGER}) for _ in range(4)]
        assert [answer.status_code for answer in codes] == [200, 200, 429, 429]
        assert int(codes[-1].headers["Retry-After"]) > 0
        assert codes[-1].json()["error"]["type"] == "rate_limit_error"


HALF_A_REQUEST = b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le"
HALF_A_BODY = b"POST /v1/videos HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{"


def test_with_few_open_files_clients_that_send_nonsense_stop_nobody(tmp_path: Path) -> None:
    """A hundred half-sent requests, bytes that are no HTTP, two signals: answers go on, and the log is short JSON."""
    with serving(tmp_path / "data", "--no-page", open_files=64) as server, ExitStack() as clients:
        address = (server.http.base_url.host, server.http.base_url.port)
        for sent in (*[HALF_A_REQUEST] * 100, *[b"a secret, no HTTP\r\n\r\n"] * 20, HALF_A_BODY):
            client = clients.enter_context(socket.create_connection(address, timeout=PATIENCE))
            client.sendall(sent)
        for _ in range(20):
            assert server.http.get("/v1/videos", headers={"Connection": "close"}).status_code == 200
        job = server.create()
        assert server.wait(job["id"])["status"] == "completed"
        assert server.http.get(f"/v1/videos/{job['id']}/content").status_code == 200
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0
        for line in server.log().splitlines():
            assert json.loads(line)["event"], line
        assert len(server.log()) < 10_000
        assert "secret" not in server.log()
        assert "Cancelled" not in server.log()
