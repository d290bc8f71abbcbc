"""The upload of a video whose settings are wanted: hostile ones, many at once, no room for them."""

import asyncio
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from api import Api
from test_limits import GOOD, post_in_loop

from wanduet.doors.http.keys import KeyRing
from wanduet.doors.http.limits import UPLOAD_PATH
from wanduet.doors.http.restore import add_restore
from wanduet.errors import WanduetError

Read = Callable[[Path], dict[str, Any]]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def with_upload(api: Api, read: Read) -> Api:
    add_restore(api.app, read)
    return api


def never(path: Path) -> dict[str, Any]:
    raise AssertionError("it was read")


def test_what_a_reader_says_is_the_answer_and_nothing_is_left(api: Api, temporary: Path) -> None:
    def read(path: Path) -> dict[str, Any]:
        if path.read_bytes() == b"good":
            return {"form": {}}
        raise WanduetError(f"{path} is damaged.")

    with_upload(api, read)
    assert api.http.post(UPLOAD_PATH, content=b"good").json() == {"form": {}}
    assert api.http.post(UPLOAD_PATH, content=b"bad").json() == {"error": "This file is damaged."}
    assert list(temporary.iterdir()) == []


def test_an_empty_file_is_not_given_to_a_reader(api: Api, temporary: Path) -> None:
    assert with_upload(api, never).http.post(UPLOAD_PATH).json() == {"error": "This file is empty."}
    assert list(temporary.iterdir()) == []


def test_while_readers_are_busy_other_routes_answer_and_more_uploads_are_refused(api: Api, temporary: Path) -> None:
    free = threading.Event()

    def read(path: Path) -> dict[str, Any]:
        assert free.wait(120)
        return {}

    with_upload(api, read)
    with ThreadPoolExecutor(60) as pool:
        answers = [pool.submit(api.http.post, UPLOAD_PATH, content=b"x") for _ in range(60)]
        refused = list(islice(as_completed(answers, timeout=120), 56))  # the other four wait for `free`
        assert api.http.get("/v1/videos").status_code == 200
        free.set()
        statuses = sorted(answer.result(120).status_code for answer in answers)
    assert statuses == [200] * 4 + [503] * 56
    assert all("retry-after" in answer.result().headers for answer in refused)
    assert list(temporary.iterdir()) == []


def test_one_key_has_a_share_and_refusals_come_before_the_body(make_api: Any, store: Any) -> None:
    keys = KeyRing(store.files.folder / "keys.json")
    key = keys.add("ann")
    api = with_upload(make_api(keys=keys), never)
    headers = {**GOOD, "authorization": f"Bearer {key}"}
    (owner,) = (record.id for record in keys.records())

    async def unread() -> Any:
        raise AssertionError("the body was read")

    def status() -> int:
        return asyncio.run(post_in_loop(api.app, UPLOAD_PATH, headers, unread))

    gate = api.context.uploads
    with gate.enter(owner), gate.enter(owner):
        assert status() == 429
    with gate.enter("a"), gate.enter("a"), gate.enter("b"), gate.enter("b"):
        assert status() == 503
    api.context.draining.set()
    assert status() == 503


def test_without_a_folder_for_temporary_files_the_server_says_so(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    answer = with_upload(api, never).http.post(UPLOAD_PATH, content=b"x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "no_temporary_space")
    assert "retry-after" in answer.headers
    assert str(tmp_path) not in answer.text


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full")
def test_a_full_folder_for_temporary_files_is_no_error_of_the_server(
    api: Api, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(tempfile.TemporaryDirectory):  # type: ignore[type-arg]
        def __enter__(self) -> str:
            folder = str(super().__enter__())
            (Path(folder) / "video.mp4").symlink_to("/dev/full")
            return folder

    with_upload(api, never)
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryDirectory", Full)
        for size in (10, 2**20):
            assert api.http.post(UPLOAD_PATH, content=bytes(size)).status_code == 507
    assert list(temporary.iterdir()) == []
    assert api.http.get("/v1/videos").status_code == 200


def test_a_client_that_goes_in_the_middle_leaves_nothing(api: Api, temporary: Path) -> None:
    with_upload(api, never)
    messages = [{"type": "http.request", "body": b"x" * 1000, "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there")

    async def upload() -> None:
        scope = {
            "type": "http", "method": "POST", "path": UPLOAD_PATH, "raw_path": b"", "query_string": b"",
            "root_path": "", "headers": [(b"host", b"127.0.0.1")], "http_version": "1.1", "scheme": "http",
        }  # fmt: skip
        await api.app(scope, receive, send)

    asyncio.run(upload())
    assert list(temporary.iterdir()) == []
    with api.context.uploads.enter(), api.context.uploads.enter(), api.context.uploads.enter():
        assert api.http.post(UPLOAD_PATH).status_code == 400, "its place is free again"
