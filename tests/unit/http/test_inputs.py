"""A request that starts from a video: the file comes with it, and nothing of a refused one is left."""

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api import Api
from test_limits import GOOD, post, post_in_loop, refuse_to_send

from wanduet.doors.http import inputs
from wanduet.doors.http.context import ServerSettings
from wanduet.doors.http.schemas import RequestLimits
from wanduet.errors import InvalidRequestError
from wanduet.jobs.files import JobFiles
from wanduet.jobs.records import Limits
from wanduet.jobs.store import JobStore
from wanduet.source_video import SourceVideo

CLIP = b"\x00\x01\r\n--b" * 4000  # has what looks like a form's boundary
HASH = hashlib.sha256(CLIP).hexdigest()
FORM = {"content-type": "multipart/form-data; boundary=b"}
BEGIN = b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na fox\r\n--b\r\nContent-Disposition: form-data; '


@pytest.fixture(autouse=True)
def looked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The files that were looked through; all are said to be videos of 5 seconds. `test_uploads` really reads some."""
    found = []

    def read(self: Any, video: Path, field: str, filename: str) -> SourceVideo:
        found.append(video.read_bytes())
        return SourceVideo("0" * 64, 480, 832, 5.0)

    monkeypatch.setattr(inputs.SourceReader, "read", read)
    return found


def send(api: Api, content: bytes = CLIP, field: str = "input_video", key: str | None = None, **fields: Any) -> Any:
    headers = {} if key is None else {"Idempotency-Key": key}
    files = {field: ("../../clip.mp4", content, "video/mp4")}
    return api.http.post("/v1/videos", data={"prompt": "a fox", **fields}, files=files, headers=headers)


def error_of(answer: Any, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return answer.json()["error"]


def left(store: JobStore) -> list[Path]:
    return [path for folder in (store.files.uploads, store.files.videos) for path in folder.iterdir()]


def assert_nothing_is_left(api: Api) -> None:
    assert left(api.store) == []
    assert api.store.list().jobs == ()
    with api.context.uploads.enter(), api.context.uploads.enter(), api.context.uploads.enter():
        assert send(api).status_code == 200, "its place is free"


@pytest.mark.parametrize("field", ["input_video", "input_reference"])
def test_an_uploaded_video_is_the_jobs(api: Api, looked: list[bytes], field: str) -> None:
    video = send(api, field=field, strength="0.5").json()
    (path,) = left(api.store)
    assert path.read_bytes() == looked[0] == CLIP
    job = api.store.get(video["id"])
    assert [(file.variant, file.name, file.num_bytes) for file in job.files] == [("input", path.name, len(CLIP))]
    assert path.name.startswith(job.id)
    about = {"input_video": f"sha256:{HASH}", "strength": 0.5, "height": 480, "width": 832, "num_frames": 77}
    assert about.items() <= job.request.items()
    assert about.items() <= video["settings"].items()
    assert "input_reference" not in job.request
    assert (video["size"], video["seconds"]) == ("832x480", "4.75")


def test_without_a_video_nothing_of_it_is_stored(api: Api) -> None:
    assert api.refusal(strength=0.5)["param"] == "strength"
    assert not {"input_video", "strength"} & api.create(input_video=None)["settings"].keys()


@pytest.mark.parametrize("name", ["input_video", "input_reference"])
@pytest.mark.parametrize("kind", ["json", "data", "files"])
@pytest.mark.parametrize("value", ["/etc/passwd", "https://example.com/clip.mp4", f"sha256:{HASH}", ""])
def test_a_text_is_no_file(api: Api, looked: list[bytes], name: str, kind: str, value: str) -> None:
    body: Any = {"prompt": "a fox", name: value}
    if kind == "files":  # a form of texts
        body = {key: (None, text) for key, text in body.items()}
    error = error_of(api.http.post("/v1/videos", **{kind: body}))
    assert error["param"] == name
    assert "upload the file itself, as a part of multipart/form-data" in error["message"]
    assert looked == []
    assert_nothing_is_left(api)


def test_one_file_is_taken_under_one_name(api: Api) -> None:
    both = {"input_video": CLIP, "input_reference": CLIP}
    error = error_of(api.http.post("/v1/videos", data={"prompt": "x"}, files=both))
    assert error["message"] == "Give one file: input_video or input_reference, which mean the same."
    twice = [("input_video", CLIP), ("input_video", CLIP)]
    assert "twice" in error_of(api.http.post("/v1/videos", data={"prompt": "x"}, files=twice))["message"]
    text_too = {"prompt": "x", "input_reference": "clip.mp4"}
    assert "upload" in error_of(api.http.post("/v1/videos", data=text_too, files={"input_video": CLIP}))["message"]
    assert error_of(send(api, field="prompt"))["code"] == "unsupported"
    assert error_of(send(api, field="mask"))["param"] == "mask"
    assert error_of(send(api, b""))["param"] == "input_video"
    assert_nothing_is_left(api)


def test_a_remix_takes_no_file(api: Api) -> None:
    source = api.create()["id"]
    answer = api.http.post(f"/v1/videos/{source}/remix", data={"prompt": "x"}, files={"input_video": CLIP})
    assert error_of(answer)["code"] == "unsupported"
    assert left(api.store) == []


def test_what_the_reader_refuses_is_named_by_the_clients_name(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, video: Path, field: str, filename: str) -> None:
        raise InvalidRequestError(field, filename, "it is a PNG picture")

    with monkeypatch.context() as patch:
        patch.setattr(inputs.SourceReader, "read", refuse)
        error = error_of(send(api, field="input_reference"))
    assert (error["param"], "clip.mp4" in error["message"]) == ("input_reference", True)
    assert str(api.store.files.folder) not in error["message"]
    assert_nothing_is_left(api)


def test_a_strange_file_name_hides_no_reason(api: Api) -> None:
    for name, shown in (("grüße 猫.mp4", "grüße 猫.mp4"), ("n" * 3000 + ".mp4", "nnn…"), ("a\n\x1b[2J.mp4", "a")):
        answer = api.http.post("/v1/videos", data={"prompt": "x"}, files={"input_video": (name, b"")})
        message = error_of(answer)["message"]
        assert shown in message
        assert "the file is empty" in message
        assert message.isprintable()
    latin = BEGIN + b'name="input_video"; filename="gr\xfc.mp4"\r\n\r\n\r\n--b--\r\n'
    assert "gr\ufffd.mp4" in error_of(api.http.post("/v1/videos", content=latin, headers=FORM))["message"]


def test_fields_are_checked_before_the_file_is_looked_through(api: Api, looked: list[bytes]) -> None:
    for fields in ({"strength": "1.5"}, {"sampler": "x"}, {"prompt": ""}, {"nothing": "1"}, {"model": "sora"}):
        assert error_of(send(api, **fields), 404 if "model" in fields else 400)["param"] in fields
    assert looked == []
    assert_nothing_is_left(api)


def test_limits_are_those_of_what_follows_from_the_video(make_api: Any) -> None:
    api = make_api(ServerSettings(limits=RequestLimits(frames=41, pixels=100_000)))
    assert error_of(send(api))["param"] == "size"
    assert error_of(send(api, size="256x256"))["param"] == "num_frames"
    assert error_of(send(api, size="256x256", num_frames="85"))["param"] == "num_frames"
    assert send(api, size="256x256", num_frames="41").status_code == 200


def test_a_long_file_is_refused_by_name_and_number(make_api: Any) -> None:
    api = make_api(ServerSettings(max_body_bytes=2000, max_input_bytes=len(CLIP)))
    error = error_of(send(api, CLIP + b"x"), 413)
    assert (error["code"], error["param"]) == ("body_too_large", "input_video")
    assert "at most" in error["message"]
    headers = {**GOOD, **FORM, "content-length": str(len(CLIP) + 2001)}
    assert post(api.app, "/v1/videos", headers, refuse_to_send) == 413, "before it is read"
    assert_nothing_is_left(api)


def test_a_forms_texts_stay_short_although_its_file_may_be_long(make_api: Any, api: Api) -> None:
    small = make_api(ServerSettings(max_body_bytes=1000, max_input_bytes=10**6))
    texts = {f"f{number}": "x" * 300 for number in range(4)}
    assert error_of(send(small, **texts), 413)["code"] == "body_too_large"
    assert_nothing_is_left(api)


TRUNCATED = [
    b'name="input_video"; filename="a"\r\n\r\n' + CLIP,
    b'name="input_video"; filename="a"\r\n\r\n' + CLIP + b"\r\n--b",
    b'name="input_video"; filename="a"\r\n\r\n' + CLIP + b"\r\n--b\r\nContent-Disposition: ",
    b'name="input_video"; filename="a"\r\n\r\n'
    + CLIP
    + b'\r\n--b\r\nContent-Disposition: form-data; name="seed"\r\n\r\n1',
]


@pytest.mark.parametrize("rest", TRUNCATED)
def test_a_truncated_form_leaves_nothing(api: Api, looked: list[bytes], rest: bytes) -> None:
    assert error_of(api.http.post("/v1/videos", content=BEGIN + rest, headers=FORM))["code"] == "invalid_request"
    assert looked == []
    assert_nothing_is_left(api)


def test_a_client_that_goes_in_the_middle_leaves_nothing(api: Api) -> None:
    messages = [
        {"type": "http.request", "body": BEGIN + TRUNCATED[0], "more_body": True},
        {"type": "http.disconnect"},
    ]
    sizes = []

    async def receive() -> Any:
        if len(messages) == 1:
            sizes.append([path.stat().st_size for path in api.store.files.uploads.iterdir()])
        return messages.pop(0)

    assert asyncio.run(post_in_loop(api.app, "/v1/videos", {**GOOD, **FORM}, receive)) == 400
    assert len(sizes[0]) == 1, "it was being stored"
    assert_nothing_is_left(api)


@pytest.mark.parametrize(("limits", "status"), [(Limits(queue=1), 503), (Limits(per_owner=1), 429)])
def test_a_full_queue_refuses_before_the_file_is_stored(
    make_api: Any, monkeypatch: pytest.MonkeyPatch, limits: Limits, status: int
) -> None:
    api = make_api(ServerSettings(queue=limits))
    video = send(api, key="a").json()
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *_: pytest.fail("a file was made"))
        assert error_of(send(api), status)["code"] == "queue_full"
    assert send(api, key="a").json()["id"] == video["id"], "a repetition needs no room"
    assert len(left(api.store)) == 1


def test_the_same_key_with_the_same_file_is_the_same_job(api: Api, looked: list[bytes]) -> None:
    first = send(api, key="k", seed=1).json()
    assert send(api, key="k", seed=1).json()["id"] == first["id"]
    assert send(api, key="k", seed=1, field="input_reference").json()["id"] == first["id"]
    assert len(looked) == 1, "a repetition is not looked through"
    assert error_of(send(api, CLIP + b"x", key="k", seed=1), 422)["code"] == "idempotency_key_reused"
    assert error_of(send(api, key="k", seed=2), 422)["param"] == "Idempotency-Key"
    assert len(left(api.store)) == len(api.store.list().jobs) == 1


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("place", "name", "instead"),
    [
        (JobFiles, "free_bytes", lambda self: 2**20),
        (inputs.os, "open", raising(OSError(28, "No space left on device"))),
        (inputs.os, "fsync", raising(OSError(5, "Input/output error"))),
    ],
)
def test_a_full_disk_is_507_and_leaves_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, instead: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(place, name, instead)
        answer = send(api)
    assert error_of(answer, 507)["code"] == "no_space"
    assert "retry-after" in answer.headers
    assert_nothing_is_left(api)


def test_a_full_disk_when_the_job_is_stored_is_507(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    full = raising(OSError(28, "No space left on device"))
    with monkeypatch.context() as patch:
        patch.setattr("wanduet.jobs.files.os.link", full)
        patch.setattr("wanduet.jobs.files.shutil.copyfile", full)
        assert error_of(send(api), 507)["code"] == "no_space"
    assert_nothing_is_left(api)


def test_few_files_are_received_at_once(api: Api) -> None:
    gate = api.context.uploads
    with gate.enter(), gate.enter(), gate.enter(), gate.enter():
        answer = send(api)
        assert error_of(answer, 503)["code"] == "overloaded"
        assert "retry-after" in answer.headers
        assert api.create()["status"] == "queued", "others are taken"


def test_a_video_is_deleted_with_its_input(api: Api) -> None:
    video = send(api).json()
    lease = api.claim()
    assert api.http.delete(f"/v1/videos/{video['id']}").status_code == 200
    assert left(api.store) == []
    assert lease.job.inputs


def test_a_finished_video_keeps_its_input_and_shows_it_to_nobody(api: Api) -> None:
    video = send(api).json()
    job = api.finish()
    assert api.store.files.path(job.inputs[0].name) is not None
    for variant, status in (("video", 200), ("input", 400)):
        answer = api.http.get(f"/v1/videos/{video['id']}/content", params={"variant": variant})
        assert answer.status_code == status
    assert str(api.store.files.folder) not in api.http.get(f"/v1/videos/{video['id']}").text


def test_a_remix_starts_from_the_same_video(api: Api) -> None:
    source = send(api, strength="0.3", seed=4).json()
    remix = api.http.post(f"/v1/videos/{source['id']}/remix", json={"prompt": "a hare"}).json()
    assert remix["settings"] == source["settings"]
    api.store.delete(source["id"])
    (path,) = left(api.store)
    assert (path.name.partition(".")[0], path.read_bytes()) == (remix["id"], CLIP)
    path.unlink()
    error = error_of(api.http.post(f"/v1/videos/{remix['id']}/remix", json={"prompt": "a hen"}), 404)
    assert "input video" in error["message"]
    assert len(api.store.list().jobs) == 1


def test_the_schema_has_the_file_as_a_part_of_the_form(api: Api) -> None:
    content = api.app.openapi()["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    form, json = (content[kind]["schema"]["properties"] for kind in ("multipart/form-data", "application/json"))
    for name in ("input_video", "input_reference"):
        assert (form[name]["type"], form[name]["format"]) == ("string", "binary")
        assert name not in json
    assert "strength" in form.keys() & json.keys()
