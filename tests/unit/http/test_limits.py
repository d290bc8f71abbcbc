"""What is refused before anything of it is read, on every route: strange hosts and pages, long bodies, one too many."""

import asyncio
import sys
from typing import Any

import pytest
from api import Api

from wanduet.doors.http import limits as http_limits
from wanduet.doors.http.capacity import find_capacity
from wanduet.doors.http.errors import ApiError
from wanduet.doors.http.gates import Gate
from wanduet.doors.http.keys import KeyRing
from wanduet.doors.http.limits import MAX_UPLOAD_BYTES, UPLOAD_PATH

WRITES = ["/v1/videos", "/v1/videos/x/remix", "/login", "/logout", UPLOAD_PATH, "/page/plan", "/page/fields",
          "/page/follow", "/page/videos/x/again", "/", "/nothing"]  # fmt: skip
GOOD = {"host": "127.0.0.1"}


async def refuse_to_send() -> Any:
    raise AssertionError("the body was read")


def post(app: Any, path: str, headers: dict[str, str], receive: Any = refuse_to_send) -> int:
    """One POST without any server around; the answer's status."""
    return asyncio.run(post_in_loop(app, path, headers, receive))


async def post_in_loop(app: Any, path: str, headers: dict[str, str], receive: Any) -> int:
    statuses = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80), "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }  # fmt: skip
    await app(scope, receive, send)
    assert len(statuses) == 1
    return int(statuses[0])


def check_refusals(app: Any) -> None:
    """No route of an application reads a body that is too long, or comes from a strange host or page."""
    for path in WRITES:
        longest = MAX_UPLOAD_BYTES if path == UPLOAD_PATH else 2**20
        assert post(app, path, {"host": "evil.example.com"}) == 400, path
        assert post(app, path, {**GOOD, "origin": "http://evil.example.com"}) == 403, path
        assert post(app, path, {**GOOD, "content-length": str(longest + 1)}) == 413, path
        assert post(app, path, {**GOOD, "content-length": "-1"}) == 400, path


def check_keys(app: Any) -> None:
    """No route of an application that has keys reads a body without one."""
    for path in WRITES:
        if path not in ("/login", "/logout"):
            assert post(app, path, GOOD) in (401, 404, 405), path


def test_every_route_refuses_before_it_reads(api: Api) -> None:
    check_refusals(api.app)


def test_every_route_asks_for_the_key_before_it_reads(make_api: Any, store: Any) -> None:
    keys = KeyRing(store.files.folder / "keys.json")
    keys.add("ann")
    check_keys(make_api(keys=keys).app)


def test_nothing_speaks_over_a_websocket(api: Any) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect) as closed, api.http.websocket_connect("/page/events"):
        pass
    assert closed.value.code == 1008


def test_all_bodies_together_have_a_limit(make_api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_limits, "MAX_BYTES_AT_ONCE", 1000)
    app = make_api().app
    headers = {**GOOD, "content-type": "application/json"}

    async def both() -> tuple[int, int, int]:
        came, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> Any:
            if came.is_set():
                await go_on.wait()
                return {"type": "http.request", "body": b'"x"}', "more_body": False}
            came.set()
            return {"type": "http.request", "body": b'{"prompt":' + b" " * 800, "more_body": True}

        async def quick() -> Any:
            return {"type": "http.request", "body": b'{"prompt":"x"}' + b" " * 800, "more_body": False}

        first = asyncio.create_task(post_in_loop(app, "/v1/videos", headers, slow))
        await came.wait()
        await asyncio.sleep(0)
        refused = await post_in_loop(app, "/v1/videos", headers, quick)
        go_on.set()
        return await first, refused, await post_in_loop(app, "/v1/videos", headers, quick)

    assert asyncio.run(both()) == (200, 503, 200)


def test_a_gate_has_shares() -> None:
    gate = Gate(3, "uploads", share=2)
    with gate.enter("ann"), gate.enter("ann"):
        with pytest.raises(ApiError) as personal, gate.enter("ann"):
            pass
        with gate.enter("bob"), pytest.raises(ApiError) as full, gate.enter("cid"):
            pass
    assert (personal.value.status, full.value.status) == (429, 503)
    assert all(int(error.value.headers["Retry-After"]) > 0 for error in (personal, full))
    with gate.enter("ann"), gate.enter("ann"), gate.enter():
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit")
@pytest.mark.parametrize("limit", [64, 100, 256, 1024, 1_000_000, -1])
def test_all_that_clients_cause_fits_below_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    import resource

    limit = resource.RLIM_INFINITY if limit == -1 else limit
    monkeypatch.setattr("os.listdir", lambda path: [""] * 16)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    found = find_capacity()
    assert 1 <= found.requests < found.connections <= 1000
    assert 4 <= found.threads <= 40
    if limit != resource.RLIM_INFINITY:
        assert 16 + found.connections + found.requests + 2 * found.threads < limit
    assert find_capacity(6).connections <= 6
