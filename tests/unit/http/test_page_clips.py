"""A video that is dropped on the page: its settings, or its pictures, from which the next one starts."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from api import Api
from page_jobs import JOB, REQUEST

from wanduet.config import EngineConfig
from wanduet.doors.http.context import ServerSettings
from wanduet.doors.http.errors import ApiError
from wanduet.doors.page import views
from wanduet.doors.page.actions import PageActions
from wanduet.doors.page.clips import Clip, Offer, offer_of
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


def test_the_panel_offers_only_what_there_is_and_escapes_names() -> None:
    pictures, settings = 'data-use="start"', 'data-use="settings"'
    panel = views.offer(Offer("<b>.mp4", {"prompt": "x"}, clip=replace(CLIP, name="<b>.mp4")))
    assert pictures in panel
    assert settings in panel
    assert "&lt;b&gt;.mp4" in panel
    assert "<b>.mp4" not in panel
    assert "960 × 720 · 2.5 s" in panel
    assert settings not in views.offer(Offer("fox.mp4", clip=CLIP))
    damaged = views.offer(Offer("fox.mp4", {"prompt": "x"}, error="It is damaged."))
    assert pictures not in damaged
    assert "It is damaged." in damaged
    assert "<b>fox.mp4</b>" in views.clip(CLIP)
    assert "choose one" in views.clip(None)


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
    assert offer_of({"name": "fox.mp4", "source": source}) == Offer("fox.mp4")
    assert offer_of({"name": "fox.mp4", "source": asdict(SOURCE)}).clip == CLIP


def test_size_and_length_follow_the_video_and_frames_that_it_lacks_are_refused(actions: PageActions) -> None:
    form = actions.follow({**actions.defaults(), "prompt": "x"}, "input_video", CLIP)
    assert (form["size"], form["num_frames"], form["strength"]) == ("736x544", 37, 0.8)
    sent = actions.outgoing(form)
    assert sent is not None
    assert sent["files"] == {"input_video": SOURCE.sha256}
    assert (sent["fields"]["strength"], sent["fields"]["num_frames"]) == (0.8, 37)
    assert "input_video" not in sent["fields"]
    for call in (actions.outgoing, actions.plan):
        with pytest.raises(WanduetError) as refused:
            call({**form, "num_frames": 81})
        assert "Frames: 81 does not work, 37 does." in views.refusal(refused.value)
    with pytest.raises(WanduetError, match="Describe"):
        actions.outgoing({**form, "prompt": " "})


def test_without_an_input_video_there_is_no_strength(actions: PageActions) -> None:
    form = {**actions.defaults(), "prompt": "x", "strength": 0.3}
    assert actions.outgoing(form) is None
    job = actions.submit("local", form)
    assert not {"strength", "input_video"} & job.request.keys()
    details = views.details(job)
    assert "Strength" not in details
    assert "Made from" not in details
    assert not {"Step cache", "Guidance gate"} & set(re.findall("<dt>(.*?)</dt>", details))  # they are off


def test_a_jobs_input_and_strength_are_listed() -> None:
    request = {**REQUEST, "input_video": f"sha256:{SOURCE.sha256}", "strength": 0.35}
    details = views.details(replace(JOB, request=request))
    assert "<dt>Strength</dt><dd>0.35</dd>" in details
    assert "<dt>Made from</dt><dd>an input video</dd>" in details
    assert "sha256" not in details


def test_the_plan_counts_the_input_video(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    actions = PageActions(api.context, EngineConfig(model="random:1.3b"))
    seen: list[ResolvedRequest] = []

    class Plan:
        def __init__(self, request: ResolvedRequest, *_: Any) -> None:
            seen.append(request)

        def as_dict(self) -> dict[str, Any]:
            return {}

    monkeypatch.setattr("wanduet.planning.planner.make_plan", Plan)
    form = actions.follow({**actions.defaults(), "num_inference_steps": 20, "strength": 0.25}, "input_video", CLIP)
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
    api: Api, actions: PageActions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = make_video(tmp_path / "fox.mp4")
    readers(monkeypatch, NO_SETTINGS, read_source(tmp_path / "fox.mp4"))
    source = actions.read(tmp_path / "fox.mp4")["source"]
    clip = offer_of({"name": "fox.mp4", "source": source}).clip
    assert clip is not None
    sent = actions.outgoing(actions.follow({**actions.defaults(), "prompt": "x", "seed": "4"}, "input_video", clip))
    assert sent is not None
    answer = api.http.post("/v1/videos", data=sent["fields"], files={"input_video": ("fox.mp4", content)})
    assert answer.status_code == 200, answer.text
    job = actions.find("local", answer.json()["id"])
    assert job is not None

    form = actions.form_of(job)
    assert form["input_video"] == Clip("the same input video", job=job.id)
    again = actions.submit("local", {**form, "strength": 0.5})
    reseeded = actions.repeat("local", job, new_seed=True)
    for other in (again, reseeded):
        path = api.store.files.path(other.inputs[0].name)
        assert path is not None
        assert path.read_bytes() == content
        assert other.request["input_video"] == f"sha256:{source['sha256']}"
    assert (again.request["strength"], reseeded.request["strength"]) == (0.5, 0.8)
    with pytest.raises(WanduetError, match="Choose the input video again"):
        actions.submit("someone", form)
    actions.delete("local", job.id)
    with pytest.raises(WanduetError, match="Choose the input video again"):
        actions.submit("local", form)
    api.store.files.remove(file.name for file in again.inputs)
    with pytest.raises(ApiError, match="gone"):
        actions.repeat("local", again, new_seed=False)


def test_the_panels_buttons(actions: PageActions) -> None:
    gradio = pytest.importorskip("gradio")
    from wanduet.doors.page.events import PageEvents
    from wanduet.doors.page.forms import FORM_FIELDS

    events = PageEvents(actions)

    def press(data: dict[str, Any], offered: Offer | None, **now: Any) -> tuple[Any, str, Any, dict[str, Any]]:
        form = {**actions.defaults(), "prompt": "mine", **now}
        values = events.use("input_video")(gradio.EventData(None, data), offered, *form.values())
        return values[0], values[1], values[2], dict(zip(FORM_FIELDS, values[3:], strict=True))

    told = {"name": "fox.mp4", "form": {"prompt": "a fox", "seed": "5"}, "note": "A note.", "source": asdict(SOURCE)}
    offered, panel, _, form = press({"read": told}, None)
    assert offered == Offer("fox.mp4", told["form"], "A note.", CLIP)
    assert panel == views.offer(offered)
    assert all(value == gradio.skip() for value in form.values()), "nothing changes before a button is pressed"

    left, panel, _, form = press({"use": "start"}, offered)
    assert (left, panel, form["input_video"], form["prompt"]) == (None, views.clip(CLIP), CLIP, "mine")
    left, panel, message, form = press({"use": "settings"}, offered, input_video=CLIP)
    assert (left, panel, form["input_video"], form["prompt"]) == (None, views.clip(None), None, "a fox")
    assert "These are the settings of fox.mp4. A note." in message
    other = replace(CLIP, name="other.mp4")
    left, panel, _, form = press({"use": "remove"}, offered, input_video=other)
    assert (left, panel, form["input_video"]) == (None, views.clip(other), other), "the offer is closed"
    _, panel, _, form = press({"use": "remove"}, None, input_video=other)
    assert (panel, form["input_video"]) == (views.clip(None), None)
    _, panel, _, form = press({"read": {"name": "x", "error": "It is a picture."}}, None, input_video=other)
    assert "It is a picture." in panel
    assert views.clip(other) in panel


def test_the_answer_to_what_the_browser_sent(actions: PageActions) -> None:
    gradio = pytest.importorskip("gradio")
    from wanduet.doors.page.events import PageEvents

    events = PageEvents(actions)
    assert events.sent("") == [gradio.skip(), gradio.skip()]
    assert events.sent(json.dumps({"id": JOB.id})) == [JOB.id, ""]
    for text, words in (
        ("input_video='fox.mp4' is not allowed: it is damaged.", "Input video: it is damaged."),
        ("input_video: this server takes a video of at most 1 MiB.", "Input video: this server takes a video of at"),
    ):
        chosen, message = events.sent(json.dumps({"message": text, "param": "input_video"}))
        assert chosen == gradio.skip()
        assert words in message
    assert ">The queue is full.<" in events.sent(json.dumps({"message": "The queue is full.", "param": None}))[1]
