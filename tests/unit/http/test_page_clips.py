"""A video that is dropped on the page: its settings, or its pictures, from which the next one starts."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from api import Api
from fastapi.testclient import TestClient
from page_jobs import JOB, REQUEST

from wanduet.config import EngineConfig
from wanduet.doors.http.context import ServerSettings
from wanduet.doors.page import words
from wanduet.doors.page.actions import PageActions
from wanduet.doors.page.clips import Clip, clip_of
from wanduet.doors.page.routes import mount_page
from wanduet.errors import InvalidRequestError, WanduetError
from wanduet.media.input_video import read_source
from wanduet.request import ResolvedRequest
from wanduet.source_video import SourceVideo

SOURCE = SourceVideo("ab" * 32, 720, 960, 2.5)
CLIP = Clip("fox.mp4", SOURCE)
ABOUT = {"request": {"prompt": "a fox", "num_frames": 33}, "seed": 5}
NO_SETTINGS = WanduetError("This video does not say how it was made.")
NO_PICTURES = InvalidRequestError("input_video", "this file", "it is damaged")


@pytest.fixture
def actions(api: Api) -> PageActions:
    return PageActions(api.context, EngineConfig(data_dir=api.store.files.folder))


@pytest.fixture
def upload(tmp_path: Path) -> Path:
    (tmp_path / "upload").write_bytes(b"x")
    return tmp_path / "upload"


def readers(monkeypatch: pytest.MonkeyPatch, about: Any, source: Any) -> None:
    """Let the readers of an upload return these, or raise them."""
    for name, answer in (("MetadataReader", about), ("SourceReader", source)):

        def read(*_: Any, answer: Any = answer) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(f"wanduet.doors.http.uploads.{name}.read", read)


def test_a_video_is_offered_for_what_it_can_be_used_for(
    actions: PageActions, upload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers(monkeypatch, ABOUT, SOURCE)
    both = actions.read(upload)
    assert (both["form"]["num_frames"], both["form"]["seed"], both["source"]) == (33, "5", asdict(SOURCE))
    readers(monkeypatch, NO_SETTINGS, SOURCE)
    assert actions.read(upload) == {"source": asdict(SOURCE)}
    readers(monkeypatch, ABOUT, NO_PICTURES)
    settings = actions.read(upload)
    assert (settings["form"], settings["error"]) == (both["form"], "It is damaged.")
    readers(monkeypatch, NO_SETTINGS, NO_PICTURES)
    with pytest.raises(WanduetError, match=r"^It is damaged\.$"):
        actions.read(upload)


def test_settings_of_a_video_that_had_an_input_say_that_it_must_be_chosen_too(
    actions: PageActions, upload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {"prompt": "a fox", "input_video": f"sha256:{SOURCE.sha256}", "strength": 0.4}
    readers(monkeypatch, {"request": made, "seed": 5}, SOURCE)
    found = actions.read(upload)
    assert (found["form"]["strength"], found["form"]["input_video"]) == (0.4, None)
    assert "choose that video too" in found["note"]


def test_a_video_that_is_too_large_for_a_submission_is_refused_when_it_is_chosen(
    make_api: Any, upload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_api(ServerSettings(max_input_bytes=2**20))
    actions = PageActions(api.context, EngineConfig(data_dir=api.store.files.folder))
    readers(monkeypatch, NO_SETTINGS, SOURCE)
    upload.write_bytes(bytes(2**20 + 1))
    with pytest.raises(WanduetError, match=r"at most 1 MiB"):
        actions.read(upload)


@pytest.mark.parametrize(
    "source",
    [
        None,
        [1],
        {},
        {**asdict(SOURCE), "path": "/etc/passwd"},
        {**asdict(SOURCE), "sha256": "../x"},
        {**asdict(SOURCE), "height": 0},
        {**asdict(SOURCE), "width": True},
        {**asdict(SOURCE), "seconds": float("nan")},
        {**asdict(SOURCE), "seconds": "1"},
    ],
)
def test_of_what_a_browser_repeats_only_a_possible_video_is_taken(source: Any) -> None:
    assert clip_of({"name": "fox.mp4", "source": source}) is None
    assert clip_of({"name": "fox.mp4", "source": asdict(SOURCE)}) == CLIP
    assert clip_of({"name": "the same", "job": JOB.id}) == Clip("the same", job=JOB.id)
    for strange in ({"name": "x", "job": "../x"}, "fox.mp4", [1], None):
        assert clip_of(strange) is None


def test_size_and_length_follow_the_video_and_frames_that_it_lacks_are_refused(actions: PageActions) -> None:
    form = {**actions.defaults(), "prompt": "x", "input_video": CLIP}
    form |= actions.follow(form)
    assert (form["size"], form["num_frames"], form["strength"]) == ("736x544", 37, 0.8)
    fields = actions.fields(form)
    assert (fields["strength"], fields["num_frames"]) == (0.8, 37)
    assert "input_video" not in fields, "the browser sends it"
    for call in (actions.fields, actions.plan):
        with pytest.raises(WanduetError) as refused:
            call({**form, "num_frames": 81})
        answer = words.refusal(refused.value, form)
        assert answer["text"] == "Frames: 81 does not work, 37 does."
        assert answer["fixes"] == [{"text": "Use frames 37", "set": {"num_frames": 37}}]


def test_without_an_input_video_there_is_no_strength(actions: PageActions) -> None:
    form = {**actions.defaults(), "prompt": "x", "strength": 0.3}
    assert not {"strength", "input_video"} & actions.fields(form).keys()
    assert not {"Strength", "Made from", "Step cache"} & dict(words.card(JOB)["rows"]).keys()


def test_a_jobs_input_and_strength_are_listed() -> None:
    request = {**REQUEST, "input_video": f"sha256:{SOURCE.sha256}", "strength": 0.35, "step_cache": "off"}
    rows = dict(words.card(replace(JOB, request=request))["rows"])
    assert (rows["Strength"], rows["Made from"]) == ("0.35", "an input video")
    assert "sha256" not in str(rows)
    assert "Step cache" not in rows, "it is off"


def test_the_plan_counts_the_input_video(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    actions = PageActions(api.context, EngineConfig(model="random:1.3b"))
    seen: list[ResolvedRequest] = []

    class Plan:
        def __init__(self, request: ResolvedRequest, *_: Any) -> None:
            seen.append(request)

        def as_dict(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr("wanduet.planning.planner.make_plan", Plan)
    form = {**actions.defaults(), "num_inference_steps": 20, "strength": 0.25, "input_video": CLIP}
    form |= actions.follow(form)
    for clip in (CLIP, Clip("the same", job=JOB.id), None):
        actions.plan({**form, "input_video": clip})
    assert [(one.uses_input, one.num_denoising_steps) for one in seen] == [(True, 5), (True, 5), (False, 20)]


def make_video(path: Path) -> bytes:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.width = stream.height = 32
        for level in range(9):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 20 * level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path.read_bytes()


def test_what_the_browser_sends_is_a_job_whose_input_is_kept_for_the_next_ones(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    http = TestClient(mount_page(api.app, EngineConfig(data_dir=api.store.files.folder)), base_url="http://127.0.0.1")
    content = make_video(tmp_path / "fox.mp4")
    readers(monkeypatch, NO_SETTINGS, read_source(tmp_path / "fox.mp4"))
    source = http.post("/page/settings", content=content).json()["source"]
    form = http.get("/page/about").json()["defaults"] | {"prompt": "x", "seed": "4"}
    form["input_video"] = {"name": "fox.mp4", "source": source}
    form |= http.post("/page/follow", json=form).json()["set"]
    fields = http.post("/page/fields", json=form).json()["fields"]
    answer = http.post("/v1/videos", data=fields, files={"input_video": ("fox.mp4", content)})
    assert answer.status_code == 200, answer.text
    first = answer.json()["id"]

    again = http.get(f"/page/videos/{first}").json()
    assert again["video"]["has_input"]
    assert again["form"]["input_video"] == {"name": "the same input video", "source": None, "job": first}
    fields = http.post("/page/fields", json=again["form"] | {"strength": 0.5}).json()["fields"]
    second = http.post(f"/page/videos/{first}/again", json=fields).json()
    job = api.store.get(second["id"])
    path = api.store.files.path(job.inputs[0].name)
    assert path is not None
    assert path.read_bytes() == content
    assert (job.request["strength"], job.request["input_video"]) == (0.5, f"sha256:{source['sha256']}")

    api.store.delete(first)
    gone = http.post(f"/page/videos/{first}/again", json=fields)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")
    api.store.files.remove(file.name for file in job.inputs)
    gone = http.post(f"/page/videos/{job.id}/again", json=fields)
    assert "Upload it again" in gone.json()["error"]["message"]
    assert len(api.store.list().jobs) == 1
