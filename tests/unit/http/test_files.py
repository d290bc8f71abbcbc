"""Files on the wire: parts of them, and nothing where the client has them already."""

from pathlib import Path
from typing import Any

import pytest
from api import CONTENT, Api

MANY = ",".join(f"{2 * i}-{2 * i}" for i in range(9))


@pytest.fixture
def address(api: Api) -> str:
    """Where a finished video of 2,048 bytes is."""
    video_id = api.create()["id"]
    api.finish()
    return f"/v1/videos/{video_id}/content"


@pytest.mark.parametrize(
    ("wanted", "content"),
    [
        ("bytes=0-9", CONTENT[:10]),
        ("bytes=2000-", CONTENT[2000:]),
        ("bytes=2000-99999", CONTENT[2000:]),
        ("bytes=-5", CONTENT[-5:]),
        ("bytes=-99999", CONTENT),
        ("bytes=0-0,9999-", CONTENT[:1]),
        ("bytes=-0, 9999-10000 ,5-6", CONTENT[5:7]),
        ("bytes=,3-4,", CONTENT[3:5]),
        ("Bytes=3-4", CONTENT[3:5]),
        ("bytes=0-9,5-19", CONTENT[:20]),
    ],
)
def test_parts(api: Api, address: str, wanted: str, content: bytes) -> None:
    answer = api.http.get(address, headers={"Range": wanted})
    assert (answer.status_code, answer.content) == (206, content)
    assert answer.headers["content-range"].endswith(f"/{len(CONTENT)}")


def test_several_parts(api: Api, address: str) -> None:
    answer = api.http.get(address, headers={"Range": "bytes=0-1, 100-101"})
    assert answer.status_code == 206
    assert answer.headers["content-type"].startswith("multipart/byteranges")
    assert CONTENT[100:102] in answer.content


@pytest.mark.parametrize("wanted", ["bytes=2048-", "bytes=9999-10000", "bytes=-0", "bytes=-0,2048-"])
def test_parts_outside_of_the_file(api: Api, address: str, wanted: str) -> None:
    answer = api.http.get(address, headers={"Range": wanted})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(CONTENT)}")
    assert answer.json()["error"]["param"] == "Range"


@pytest.mark.parametrize(
    "wanted", ["", "x", "bytes=", "bytes=x", "bytes=-", "bytes=5-2", "items=0-1", f"bytes={MANY}", "bytes=0-\u0662"]
)
def test_what_means_nothing_is_ignored(api: Api, address: str, wanted: str) -> None:
    answer = api.http.get(address, headers={"Range": wanted.encode()})
    assert (answer.status_code, answer.content) == (200, CONTENT)


def test_what_the_client_has_is_not_sent_again(api: Api, address: str) -> None:
    first = api.http.get(address)
    again = api.http.get(address, headers={"If-None-Match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    assert "no-cache" in again.headers["cache-control"], "a deleted video is asked for and not shown"
    assert api.http.get(address, headers={"If-None-Match": '"other"'}).content == CONTENT
    part = {"Range": "bytes=0-1"}
    assert api.http.get(address, headers={**part, "If-Range": first.headers["etag"]}).content == CONTENT[:2]
    assert api.http.get(address, headers={**part, "If-Range": '"other"'}).content == CONTENT
    beyond = {"Range": "bytes=9999-", "If-Range": '"other"'}
    assert api.http.get(address, headers=beyond).content == CONTENT, "of a file that changed, no range is outside"


@pytest.mark.parametrize("wanted", ["bytes=0-9", "bytes=9999-", "bytes=0-0,9-9", "x"])
def test_head_knows_no_parts(api: Api, address: str, wanted: str) -> None:
    answer = api.http.head(address, headers={"Range": wanted})
    assert (answer.status_code, answer.headers["content-length"]) == (200, str(len(CONTENT)))
    assert "content-range" not in answer.headers


def test_a_file_that_goes_while_it_is_asked_for_is_404(api: Api, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = api.store.files.path

    def path(name: str) -> Any:
        found = real(name)
        Path(found or "").unlink()
        return found

    monkeypatch.setattr(api.store.files, "path", path)
    answer = api.http.get(address)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
