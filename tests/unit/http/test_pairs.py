"""Two things at once on the wire: a key that is revoked, a video that is deleted, a request that comes twice."""

import asyncio
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from api import Api
from fake_engine import open_store

from wanduet.doors.http.context import ServerSettings
from wanduet.doors.http.keys import KeyRing
from wanduet.jobs.records import Limits, NewJob, QueueFullError, StaleLeaseError
from wanduet.jobs.store import JobStore

LONG = os.urandom(300_000)  # some chunks of what is sent at a time


@pytest.fixture
def keys(store: JobStore) -> KeyRing:
    return KeyRing(store.files.folder / "keys.json")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def finished(api: Api, **fields: Any) -> str:
    """A completed video of `LONG` bytes."""
    video_id = api.create(**fields)["id"]
    (file,) = [file for file in api.finish().files if file.variant == "video"]
    (api.store.files.videos / file.name).write_bytes(LONG)
    return str(video_id)


def get(
    api: Api, path: str, headers: dict[str, str], meanwhile: Callable[[int, bytes], None]
) -> tuple[int, list[bytes]]:
    """Ask the application itself; `meanwhile` is called with the number and the content of each part of the answer
    before the next one can be sent. The client stays until the answer ends. Status and parts.
    """
    parts: list[bytes] = []
    statuses: list[int] = []
    asked = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if asked.is_set():
            await asyncio.Event().wait()
        asked.set()
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])
        elif message.get("body"):
            await asyncio.to_thread(meanwhile, len(parts), message["body"])
            parts.append(message["body"])

    raw = [(b"host", b"127.0.0.1"), *((k.lower().encode(), v.encode()) for k, v in headers.items())]
    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": raw,
        "asgi": {"version": "3.0", "spec_version": "2.3"}, "scheme": "http", "http_version": "1.1", "root_path": "",
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000),
    }  # fmt: skip
    asyncio.run(asyncio.wait_for(api.app(scope, receive, send), 60))
    return statuses[0], parts


def once(deed: Callable[[], Any]) -> Callable[[int, bytes], None]:
    """Do it while the first part is on its way."""
    return lambda number, _: deed() if number == 0 else None


def test_a_stream_of_a_revoked_key_ends_before_the_next_event(make_api: Any, keys: KeyRing) -> None:
    key, other = keys.add("ann"), keys.add("bob")
    api = make_api(keys=keys)
    video_id = api.http.post("/v1/videos", json={"prompt": "x"}, headers=bearer(key)).json()["id"]
    lease = api.claim()
    mine = keys.owner(key)

    def revoke() -> None:
        keys.remove(str(mine))
        api.store.progress(lease, 50.0, "denoise", 1.0)
        picture = api.store.files.preview_path(video_id)
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(b"secret")

    status, parts = get(api, f"/v1/videos/{video_id}/events", bearer(key), once(revoke))
    text = b"".join(parts).decode().replace("\r\n", "\n")
    events = [block.split("\n")[0] for block in text.split("\n\n") if block]
    assert (status, events) == (200, ["event: video", "event: error"])
    assert json.loads(text.split("data: ")[2])["error"]["code"] == "invalid_api_key"
    assert '"progress": 50' not in text
    assert api.http.get("/v1/videos", headers=bearer(other)).status_code == 200
    with ExitStack() as places:  # all that it may have: the stream's is free again
        for _ in range(api.context.settings.max_streams_per_key):
            places.enter_context(api.context.streams.enter(str(mine)))


def test_a_stream_of_a_revoked_key_ends_though_nothing_happens(make_api: Any, keys: KeyRing) -> None:
    key = keys.add("ann")
    api = make_api(keys=keys)
    video_id = api.http.post("/v1/videos", json={"prompt": "x"}, headers=bearer(key)).json()["id"]
    deed = once(lambda: (api.store.files.folder / "keys.json").write_text("damaged"))
    _, parts = get(api, f"/v1/videos/{video_id}/events", bearer(key), deed)
    assert [part.split(b"\r\n")[0] for part in parts] == [b"event: video", b"event: error"]


@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/{}/remix"])
def test_a_body_of_a_key_that_is_revoked_meanwhile_stores_nothing(make_api: Any, keys: KeyRing, path: str) -> None:
    key, _ = keys.add("ann"), keys.add("bob")
    api = make_api(keys=keys)
    video_id = api.http.post("/v1/videos", json={"prompt": "x"}, headers=bearer(key)).json()["id"]

    def body() -> Iterator[bytes]:
        keys.remove(str(keys.owner(key)))
        yield b'{"prompt": "y"}'

    answer = api.http.post(path.format(video_id), content=body(), headers=bearer(key))
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert [job.id for job in api.store.list().jobs] == [video_id]


@pytest.mark.skipif(os.name != "posix", reason="elsewhere an open file cannot be deleted")
@pytest.mark.parametrize("wanted", ["", "bytes=1-299000", "bytes=0-99999,150000-299999"])
def test_a_download_that_has_begun_ends_whatever_happens_to_the_video(api: Api, wanted: str) -> None:
    headers = {"Range": wanted} if wanted else {}
    whole: list[list[bytes]] = []
    for deed in ("nothing", "delete", "make room"):
        video_id = finished(api)

        def meanwhile(video_id: str = video_id, deed: str = deed) -> None:
            if deed == "delete":
                assert api.http.delete(f"/v1/videos/{video_id}").status_code == 200
            if deed == "make room":
                assert api.store.trim(0) > 0

        status, parts = get(api, f"/v1/videos/{video_id}/content", headers, once(meanwhile))
        assert status == (206 if wanted else 200)
        whole.append(parts)
        found = api.http.get(f"/v1/videos/{video_id}/content", headers=headers).status_code
        assert found == (status if deed == "nothing" else 404)
    lengths = {sum(map(len, parts)) for parts in whole}
    assert len(lengths) == 1
    if not wanted.count(","):
        assert len({b"".join(parts) for parts in whole}) == 1


def test_a_download_goes_on_after_its_key_was_revoked(make_api: Any, keys: KeyRing) -> None:
    key = keys.add("ann")
    api = make_api(keys=keys)
    new = NewJob(str(keys.owner(key)), "m", {"prompt": "x"})
    video_id = api.store.submit(new).job.id
    (file,) = [file for file in api.finish().files if file.variant == "video"]
    (api.store.files.videos / file.name).write_bytes(LONG)
    address = f"/v1/videos/{video_id}/content"
    status, parts = get(api, address, bearer(key), once(lambda: keys.remove(new.owner)))
    assert (status, b"".join(parts)) == (200, LONG)
    assert api.http.get(address, headers=bearer(key)).status_code == 401


@pytest.mark.parametrize("wanted", ["", "bytes=0-9", "bytes=0-9,20-29"])
def test_a_video_deleted_just_before_it_is_opened_is_404(
    api: Api, monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    class Vanishing(type(Path())):  # type: ignore[misc]
        def stat(self, **_: Any) -> Any:
            found = super().stat()
            self.unlink()
            return found

    address = f"/v1/videos/{finished(api)}/content"
    real = api.store.files.path
    monkeypatch.setattr(api.store.files, "path", lambda name: Vanishing(str(real(name))))
    answer = api.http.get(address, headers={"Range": wanted} if wanted else {})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_cancel_and_completion_at_once_leave_one_outcome(api: Api) -> None:
    first = api.create()["id"]
    lease = api.claim()
    assert api.http.post(f"/v1/videos/{first}/cancel").json()["error"]["code"] == "cancelled"
    with pytest.raises(StaleLeaseError):
        api.store.complete(lease, [])
    second = finished(api)
    done = api.http.get(f"/v1/videos/{second}").json()
    assert api.http.post(f"/v1/videos/{second}/cancel").json() == done
    third = api.create()["id"]
    lease = api.claim()
    go = threading.Barrier(2)

    def complete() -> str:
        go.wait(60)
        try:
            return api.store.complete(lease, []).status
        except StaleLeaseError:
            return "failed"

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(complete)
        go.wait(60)
        seen = api.http.post(f"/v1/videos/{third}/cancel").json()["status"]
        assert seen == other.result(60) == api.store.get(third).status


def test_one_idempotency_key_in_two_servers_is_one_job(api: Api, make_api: Any) -> None:
    second = open_store(api.store.files.folder)
    try:
        servers = [api, Api(second)]
        for (
            server
        ) in servers:  # what a first request builds hides warnings for all threads, which is not safe in several
            server.http.post("/v1/videos", json={"prompt": "x", "seed": -1})
        go = threading.Barrier(8)

        def send(number: int) -> Any:
            go.wait(60)
            headers = {"Idempotency-Key": "k"}
            return servers[number % 2].http.post("/v1/videos", json={"prompt": "x"}, headers=headers)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(send, range(8)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.json()["id"] for answer in answers}) == len(api.store.list().jobs) == 1
    finally:
        second.close()


def test_a_repeated_remix_is_answered_after_its_source_went(api: Api) -> None:
    source = api.create()["id"]

    def remix(prompt: str, key: str = "k") -> Any:
        return api.http.post(f"/v1/videos/{source}/remix", json={"prompt": prompt}, headers={"Idempotency-Key": key})

    first = remix("y")
    assert api.http.delete(f"/v1/videos/{source}").status_code == 200
    again = remix("y")
    assert (again.status_code, again.json()) == (200, first.json())
    assert remix("z").status_code == 422
    assert remix("y", "another").status_code == 404
    assert len(api.store.list().jobs) == 1


def test_a_repeated_submission_is_answered_after_the_server_changed(api: Api, make_api: Any) -> None:
    from dataclasses import replace

    from wanduet.doors.http.schemas import RequestLimits

    body = {"prompt": "x", "model": api.context.spec.name, "num_frames": 81}
    headers = {"Idempotency-Key": "k"}
    first = api.http.post("/v1/videos", json=body, headers=headers)
    later = make_api(ServerSettings(limits=RequestLimits(frames=17), queue=Limits(queue=1)))
    later.context.spec = replace(later.context.spec, name="another")
    again = later.http.post("/v1/videos", json=body, headers=headers)
    assert (again.status_code, again.json()) == (200, first.json())
    assert later.http.post("/v1/videos", json=body).status_code == 404


def test_the_key_of_a_deleted_video_is_free_again(api: Api) -> None:
    headers = {"Idempotency-Key": "k"}
    first = api.http.post("/v1/videos", json={"prompt": "x"}, headers=headers).json()["id"]
    api.http.delete(f"/v1/videos/{first}")
    other = api.http.post("/v1/videos", json={"prompt": "y"}, headers=headers)
    assert other.status_code == 200
    assert other.json()["id"] != first


def test_pages_go_on_after_the_last_video_of_one_was_deleted(api: Api) -> None:
    ids = [api.create()["id"] for _ in range(5)]
    page = api.http.get("/v1/videos", params={"limit": 2}).json()
    for video_id in (page["last_id"], ids[1]):
        api.http.delete(f"/v1/videos/{video_id}")
    rest = api.http.get("/v1/videos", params={"limit": 2, "after": page["last_id"]}).json()
    assert ([video["id"] for video in rest["data"]], rest["has_more"]) == ([ids[2], ids[0]], False)


def test_a_keys_limit_holds_for_submissions_at_the_same_moment(make_api: Any, keys: KeyRing) -> None:
    key, other = keys.add("ann"), keys.add("bob")
    api = make_api(ServerSettings(queue=Limits(queue=100, per_owner=3)), keys=keys)
    go = threading.Barrier(8)

    def send(number: int) -> Any:
        go.wait(60)
        return api.http.post("/v1/videos", json={"prompt": "x"}, headers=bearer(key))

    with ThreadPoolExecutor(8) as pool:
        statuses = [answer.status_code for answer in pool.map(send, range(8))]
    assert (statuses.count(200), statuses.count(429)) == (3, 5)
    assert api.http.post("/v1/videos", json={"prompt": "x"}, headers=bearer(other)).status_code == 200
    with pytest.raises(QueueFullError):
        api.store.submit(NewJob(str(keys.owner(key)), "m", {"prompt": "x"}), api.context.settings.queue)
