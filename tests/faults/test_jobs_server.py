"""A whole server under attack: its process, its worker and its clients, over real sockets."""

import asyncio
import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from job_server import server
from job_workers import journal, open_store, wait

pytestmark = pytest.mark.skipif(os.name != "posix", reason="POSIX signals")


def create(http: httpx.Client, what: int | str, steps: int = 20) -> str:
    prompt, seed = (f"job {what}", what) if isinstance(what, int) else (what, 0)
    form = {"prompt": prompt, "seed": str(seed), "num_inference_steps": str(steps)}
    answer = http.post("/v1/videos", data=form)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def finish(http: httpx.Client, ids: list[str], seconds: float = 240.0) -> list[dict[str, Any]]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        videos = [http.get(f"/v1/videos/{video_id}").json() for video_id in ids]
        if all(video["status"] in ("completed", "failed") for video in videos):
            return videos
        time.sleep(0.05)
    raise AssertionError("the videos did not finish in time")


def test_the_server_is_killed_and_every_acknowledged_video_is_made_once(tmp_path: Path, record_property) -> None:
    data = tmp_path / "data"
    ids: list[str] = []
    for _ in range(2):
        with server(data) as running:
            ids += [create(running.http, len(ids), steps=25) for _ in range(2)]
            time.sleep(0.3)
            running.process.send_signal(signal.SIGKILL)
            running.process.wait()
    with server(data) as running:
        videos = finish(running.http, ids)
        assert [video["status"] for video in videos] == ["completed"] * len(ids)
        for video_id in ids:
            assert len(running.http.get(f"/v1/videos/{video_id}/content").content) == 32 * 40
        running.process.terminate()
        assert running.process.wait(120) == 0
    lines = (data / "journal").read_text().splitlines()
    assert all(lines.count(f"{video_id} done") <= 1 for video_id in ids)
    record_property("videos", len(ids))


def test_the_worker_dies_and_the_server_does_not_notice(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with server(data) as running:
        video_id = create(running.http, "once 30", steps=60)
        assert finish(running.http, [video_id])[0]["status"] == "completed"
        assert running.http.get("/health").status_code == 200
    store = open_store(data)
    assert store.get(video_id).attempts == 2
    assert sum(line.startswith(f"{video_id} step") for line in journal(data)) == 60
    store.close()


def test_drain_ends_streams_puts_the_job_back_and_exits_with_0(tmp_path: Path, record_property) -> None:
    data = tmp_path / "data"
    with server(data, step_seconds=0.2) as running:
        video_id = create(running.http, "job 0", steps=200)
        with running.http.stream("GET", f"/v1/videos/{video_id}/events") as stream:
            lines = stream.iter_lines()
            while "denoise" not in next(lines):
                pass
            started = time.monotonic()
            running.process.terminate()
            for _ in lines:
                pass
        assert running.process.wait(120) == 0
        record_property("drain_seconds", round(time.monotonic() - started, 2))
    store = open_store(data)
    job = store.get(video_id)
    assert (job.status, job.crashes) == ("queued", 0)
    store.close()


UNENDING = "hold 1"  # a prompt: such a job runs until it is cancelled


def p99(values: list[float]) -> float:
    return round(sorted(values)[int(0.99 * len(values))], 2)


def drain_often(data: Path, times: int, record_property) -> None:
    """Jobs that are put back again and again, by servers that are told to end in the middle of one."""
    seconds = []
    with server(data, step_seconds=0.2) as running:
        ids = [create(running.http, f"job {number}", steps=60) for number in range(1 + times // 3)]  # enough to drain
    for _ in range(times):
        with server(data, step_seconds=0.5) as running:
            known = len(journal(data))
            wait(lambda known=known: len(journal(data)) > known)
            began = time.monotonic()
            running.process.terminate()
            assert running.process.wait(120) == 0
            seconds.append(time.monotonic() - began)
    with server(data) as running:
        assert {video["status"] for video in finish(running.http, ids)} == {"completed"}
    done = [line for line in journal(data) if " step " in line]
    found = {"drains": times, "seconds, p99": p99(seconds), "steps redone": len(done) - len(set(done))}
    print(found)
    for name, value in found.items():
        record_property(name, value)
    assert found["steps redone"] == 0


def test_drained_twice_no_step_is_done_twice(tmp_path: Path, record_property) -> None:
    drain_often(tmp_path / "data", 2, record_property)


@pytest.mark.slow
def test_drained_often_no_step_is_done_twice(tmp_path: Path, record_property) -> None:
    drain_often(tmp_path / "data", 30, record_property)


def cancel_often(data: Path, times: int, record_property) -> None:
    """Jobs cancelled at random moments; the seconds until the worker has begun the next one."""
    dice = random.Random(0)
    seconds = []
    with server(data, step_seconds=0.05) as running:

        def status(video_id: str) -> str:
            return str(running.http.get(f"/v1/videos/{video_id}").json()["status"])

        for _ in range(times):
            first, second = (create(running.http, "job 0", steps=200) for _ in range(2))
            wait(lambda first=first: status(first) == "in_progress")
            time.sleep(dice.uniform(0.0, 0.2))
            began = time.monotonic()
            ended = running.http.post(f"/v1/videos/{first}/cancel").json()
            assert (ended["status"], ended["error"]["code"]) == ("failed", "cancelled")
            wait(lambda second=second: status(second) == "in_progress")
            seconds.append(time.monotonic() - began)
            running.http.post(f"/v1/videos/{second}/cancel")
    print({"cancels": times, "seconds to the next job, p99": p99(seconds)})
    record_property("cancels", times)
    record_property("seconds to the next job, p99", p99(seconds))


def test_cancels_free_the_worker(tmp_path: Path, record_property) -> None:
    cancel_often(tmp_path / "data", 5, record_property)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_cancels_free_the_worker(tmp_path: Path, record_property) -> None:
    cancel_often(tmp_path / "data", 200, record_property)


async def submit_at_once(url: str, bodies: list[tuple[str, str]]) -> list[tuple[httpx.Response, float]]:
    """Send all of them, `(idempotency key, prompt)`, each over a connection of its own, and only then read answers."""
    ready, sent = asyncio.Event(), asyncio.Semaphore(0)

    async def one(key: str, prompt: str) -> tuple[httpx.Response, float]:
        async with httpx.AsyncClient(base_url=url, timeout=240.0) as client:
            await client.get("/health")  # the connection is open
            sent.release()
            await ready.wait()
            started = time.monotonic()
            headers = {"Idempotency-Key": key}
            answer = await client.post("/v1/videos", json={"prompt": prompt}, headers=headers)
            return answer, time.monotonic() - started

    tasks = [asyncio.create_task(one(*body)) for body in bodies]
    for _ in bodies:
        await sent.acquire()
    ready.set()
    return await asyncio.gather(*tasks)


def overload(tmp_path: Path, submissions: int, queue: int, record_property) -> None:
    """So many at the same moment, every third key twice; then what was refused again, until nothing more fits.

    The worker finishes none of them, however long that takes.
    """
    data = tmp_path / "data"
    keys = [f"key {number - number % 3 if number % 3 == 2 else number}" for number in range(submissions)]
    with server(data, queue=queue) as running:
        url = str(running.http.base_url)
        answers = asyncio.run(submit_at_once(url, [(key, UNENDING) for key in keys]))
        accepted: dict[str, str] = {}
        refused = 0
        for key, (answer, _) in zip(keys, answers, strict=True):
            if answer.status_code == 200:
                assert accepted.setdefault(key, answer.json()["id"]) == answer.json()["id"], "a key is one job"
            else:
                refused += 1
                assert answer.status_code == 503
                assert int(answer.headers["retry-after"]) > 0
        at_once = len(accepted)
        for key in keys:  # as a client does that was refused, one by one
            answer = running.http.post("/v1/videos", json={"prompt": UNENDING}, headers={"Idempotency-Key": key})
            if answer.status_code == 200:
                assert accepted.setdefault(key, answer.json()["id"]) == answer.json()["id"], "a key is one job"
        rows, after = [], None
        while True:
            page = running.http.get("/v1/videos", params={"limit": 100, **({"after": after} if after else {})}).json()
            rows += [video["id"] for video in page["data"]]
            after = page["last_id"]
            if not page["has_more"]:
                break
        found = {
            "submissions": submissions,
            "keys": len(set(keys)),
            "accepted at once": at_once,
            "refused at once": refused,
            "rows": len(rows),
            "p99, seconds": p99([seconds for _, seconds in answers]),
        }
        print(found)
        for name, value in found.items():
            record_property(name, value)
        assert sorted(rows) == sorted(accepted.values()), "rows are what was acknowledged"
        assert len(rows) == min(queue, len(set(keys)))
        assert at_once > 0


def test_80_submissions_at_once(tmp_path: Path, record_property) -> None:
    overload(tmp_path, 80, 40, record_property)


@pytest.mark.slow
def test_1000_submissions_at_once(tmp_path: Path, record_property) -> None:
    overload(tmp_path, 1000, 500, record_property)


def test_no_prompt_is_logged(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with server(data) as running:
        done = running.http.post("/v1/videos", json={"prompt": "a secret lighthouse"}).json()["id"]
        finish(running.http, [done])
        running.http.post("/v1/videos", json={"prompt": "raise 2"})
        wait(lambda: "job crashed" in (data / "server.log").read_text())
        running.http.post("/v1/videos", json={"prompt": "a secret lighthouse", "num_frames": 80})
        running.process.terminate()
        running.process.wait(120)
    log = (data / "server.log").read_text()
    assert all(json.loads(line)["event"] for line in log.splitlines())
    assert "lighthouse" not in log
    assert "secret" not in log
