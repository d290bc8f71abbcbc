"""The page's routes, words and actions; in a browser it is tested in tests/e2e."""

import json
import math
import re
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api import CONTENT, Api
from fastapi.testclient import TestClient
from page_jobs import JOB
from test_limits import check_keys, check_refusals

from wanduet.config import EngineConfig
from wanduet.doors.http.errors import ApiError
from wanduet.doors.http.keys import KeyRing
from wanduet.doors.page import words
from wanduet.doors.page.actions import PageActions
from wanduet.doors.page.forms import Form, Presets, default_form, fields_of
from wanduet.doors.page.models import model_words
from wanduet.doors.page.routes import STATIC, mount_page
from wanduet.errors import InvalidRequestError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.jobs.records import JobError, OutputFile, StoredJob
from wanduet.source_video import SourceVideo
from wanduet.weights.hub import open_model


class Page:
    """A client of a server with the page."""

    def __init__(self, api: Api, **config: Any) -> None:
        self.api = api
        self.config = EngineConfig(data_dir=api.store.files.folder, **config)
        self.actions = PageActions(api.context, self.config)
        self.http = TestClient(
            mount_page(api.app, self.config),
            base_url="http://127.0.0.1:8000",
            raise_server_exceptions=False,
            follow_redirects=False,
        )

    def form(self, **fields: Any) -> Form:
        return {**self.actions.defaults(), "prompt": "x", **fields}

    def submit(self, form: Form) -> StoredJob:
        """Submit a form as the browser does: its fields, from the page's route, to the API."""
        answer = self.http.post("/page/fields", json=form).json()
        assert "fields" in answer, answer
        made = self.http.post("/v1/videos", json=answer["fields"])
        assert made.status_code == 200, made.text
        return self.api.store.get(made.json()["id"])


@pytest.fixture
def page(api: Api) -> Page:
    return Page(api)


def events_of(text: str) -> list[tuple[str, Any]]:
    found = re.findall(r"event: (\w+)\r?\ndata: (.*?)\r?\n", text)
    return [(name, json.loads(data)) for name, data in found]


def test_a_job_in_words() -> None:
    running = replace(JOB, status="in_progress", phase="denoise", progress=42.4, seconds_left=75.0)
    shown = words.card(running)
    assert [shown[name] for name in ("title", "phase", "progress", "seconds_left", "finished")] == [
        "Running", "Denoising", 42, 75.0, False,
    ]  # fmt: skip
    done = words.card(replace(JOB, status="completed", started_at=1.0, completed_at=63.0))
    assert (done["title"], done["took"], done["videos"], done["finished"]) == ("Done", 62.0, 1, True)
    cancelled = replace(JOB, status="failed", error=JobError("cancelled", "The job was cancelled."))
    assert words.title(cancelled) == "Cancelled"
    assert dict(shown["rows"])["Frames"] == "81 at 16 a second"
    assert [words.duration(s) for s in (0.2, 59, 61, 3700, 10**6)] == [
        "1 s", "59 s", "1 min 1 s", "1 h 1 min", "12 days",
    ]  # fmt: skip


def test_what_the_plan_says() -> None:
    devices = [
        {"name": "cuda:0", "phases": {"denoise": 3 * 2**30, "decode": 2**30}, "limit_bytes": 4 * 2**30},
        {"name": "cpu", "phases": {}, "limit_bytes": None},
    ]
    plan = {"fits": True, "devices": devices, "predicted_seconds": {"total": 90.0}, "nearest_that_fits": []}
    told = words.plan_words(plan)
    assert (told["kind"], told["text"]) == ("good", "Fits: about 1 min 30 s")
    first, second = told["memory"]
    assert (first["text"], first["share"], first["fits"]) == ("3.00 GiB of 4.00 GiB", 0.75, True)
    assert second["name"] == "cpu"
    assert words.plan_words(plan | {"predicted_seconds": {"total": 31 * 60}})["kind"] == "slow"
    near = [
        {"num_frames": 41, "predicted_peak_bytes": {}},
        {"height": 480, "width": 832, "predicted_seconds": 1},
        {"decode": "tiled"},
    ]
    devices[0]["phases"] = {"decode": 5 * 2**30}
    told = words.plan_words({**plan, "fits": False, "nearest_that_fits": near})
    assert (told["kind"], [row["fits"] for row in told["memory"]]) == ("bad", [False, True])
    assert told["fixes"] == [
        {"text": "Use frames 41", "set": {"num_frames": 41}},
        {"text": "Use 832 × 480", "set": {"size": "832x480"}},
    ]
    assert "--decode tiled" in told["text"]


def test_timesteps_in_the_form_replace_the_number_of_steps_and_the_shift(page: Page) -> None:
    job = page.submit(page.form(sampler="euler", timesteps="1000, 757"))
    assert (job.request["timesteps"], job.request["num_inference_steps"]) == ([1000, 757], 2)
    again = page.actions.form_of(job)
    assert again["timesteps"] == "1000,757"
    assert page.submit(again).request == job.request


def test_the_form_of_few_step_weights() -> None:
    few = replace(
        WAN_1_3B.defaults, sampler="renoise", timesteps=(1000.0, 757.0), num_inference_steps=2, guidance_scale=1.0
    )
    form = default_form(few)
    assert (form["sampler"], form["timesteps"]) == ("renoise", "1000,757")
    assert fields_of(form)["timesteps"] == "1000,757"
    assert "num_inference_steps" not in fields_of(form)
    assert fields_of({**form, "timesteps": ""})["num_inference_steps"] == 2
    assert Presets(few).qualities == {"Standard": "exact"}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_frames": 80}, "Frames: 80 does not work, 81 or 77 does."),
        ({"size": "830x480"}, "Size: a width of 830 does not work, 816 or 832 does."),
        ({"size": "big"}, "Size: 480p, 720p, 1080p or WIDTHxHEIGHT, for example 832x480."),
        ({"size": "2560x1440"}, "Size: 2560 × 1440 is too much for this server, 1920 × 1072 is not."),
        ({"seed": "abc"}, "Seed: a whole number."),
        ({"num_inference_steps": 0}, "Steps: 0 does not work, 1 does."),
        ({"num_videos_per_prompt": 5}, "Videos: 5 does not work, 4 does."),
    ],
)
def test_what_is_wrong_is_told_by_the_pages_own_names(page: Page, fields: Any, told: str) -> None:
    refused = page.http.post("/page/fields", json=page.form(**fields)).json()["refused"]
    assert refused["text"] == told
    assert page.http.post("/page/plan", json=page.form(**fields)).json()["text"] == told
    for fix in refused["fixes"]:
        assert "fields" in page.http.post("/page/fields", json=page.form(**fields | fix["set"])).json(), fix


def test_an_empty_prompt_is_refused_and_so_are_texts_that_are_no_form(page: Page) -> None:
    assert "Describe" in page.http.post("/page/fields", json=page.form(prompt=" ")).json()["refused"]["text"]
    for strange in ({"prompt": ["x"]}, {"size": {"path": "/x"}}, {"num_frames": "33 "}, {"seed": [1]}, {"fps": True}):
        for route in ("/page/fields", "/page/plan", "/page/follow"):
            assert page.http.post(route, json=page.form(**strange)).status_code == 200, (route, strange)
    assert page.http.post("/page/plan", content=b"[1]").status_code == 400


def test_several_videos_of_one_prompt(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    job = page.submit(page.form(num_videos_per_prompt=3.0))
    assert job.request["num_videos_per_prompt"] == 3
    assert dict(words.card(replace(job, report={"seeds": [5, 6, 7]}))["rows"])["Seed"] == "5, 6, 7"
    files = tuple(OutputFile(kind, i, f"{i}.mp4", 1) for i in (0, 1) for kind in ("video", "thumbnail"))
    assert words.card(replace(JOB, status="completed", files=files))["videos"] == 2
    about = {"request": job.request, "seed": 6}
    monkeypatch.setattr("wanduet.doors.http.uploads.MetadataReader.read", lambda *_: about)
    monkeypatch.setattr("wanduet.doors.http.uploads.SourceReader.read", lambda *_: SourceVideo("0" * 64, 480, 832, 5.0))
    restored = page.http.post("/page/settings", content=b"x").json()["form"]
    assert (restored["seed"], restored["num_videos_per_prompt"]) == ("6", 1), "this one, and not its sisters"


@pytest.mark.parametrize(
    "about",
    [
        {"request": {"prompt": "x", "guidance_scale": math.nan}, "seed": 1},
        {"request": {"prompt": "x", "flow_shift": math.inf}, "seed": 1},
        {"request": {"prompt": "x"}, "seed": math.nan},
        {"request": {"prompt": "x"}, "seed": True},
        {"request": {"prompt": "a \ud800"}, "seed": 1},
        {"request": {"prompt": "x", "sampler": "\ud800"}, "seed": 1},
        {"request": {"prompt": "x", "negative_prompt": ["\ud800"]}, "seed": 1},
        {"request": {"prompt": {"path": "/etc/passwd"}}, "seed": 1},
        {"request": {"prompt": "x", "width": -1}, "seed": 1},
        {"request": {"\ud800": 1}, "seed": 1},
        {"request": {}},
        {"request": [1]},
        {},
    ],
)
def test_settings_that_no_video_has_are_refused(
    restoring: TestClient, monkeypatch: pytest.MonkeyPatch, about: dict[str, Any]
) -> None:
    monkeypatch.setattr("wanduet.doors.http.uploads.MetadataReader.read", lambda *_: about)
    answer = restoring.post("/page/settings", content=b"x")
    assert (answer.status_code, list(answer.json())) == (400, ["error"])


def test_of_a_strangers_video_only_the_settings_are_taken(
    restoring: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model that a file names is not looked up")

    for module in ("weights.hub.open_model", "weights.hub.download", "weights.hub.local_model"):
        monkeypatch.setattr(f"wanduet.{module}", never)
    for model in ({"name": "evil/model"}, {"name": str(tmp_path)}, "evil\ud800", {"name": ["x"]}, 5, None):
        about = {"request": {"prompt": "x", "from_the_future": [1], "seed": 4}, "model": model, "seed": 5}
        monkeypatch.setattr("wanduet.doors.http.uploads.MetadataReader.read", lambda *_, about=about: about)
        answer = restoring.post("/page/settings", content=b"x")
        assert (answer.status_code, answer.json()["form"]["seed"]) == (200, "5")
        assert str(tmp_path) not in answer.text


@pytest.fixture
def restoring(page: Page, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A client of a page to which videos are uploaded, of which none has pictures."""

    def refuse(*_: Any) -> None:
        raise InvalidRequestError("input_video", "x", "it has no pictures")

    monkeypatch.setattr("wanduet.doors.http.uploads.SourceReader.read", refuse)
    return page.http


def test_a_quality_stands_for_the_fields_that_its_speed_sets(page: Page) -> None:
    exact = page.form(seed="1")
    draft = {**exact, "speed": "draft"}
    job = page.submit(draft)
    assert (job.request["speed"], job.request["step_cache"]) == ("draft", "easycache:0.2")
    again = page.actions.form_of(job)
    assert (again["speed"], again["step_cache"], again["guidance_gate"]) == ("draft", "off", 1.0)
    finer = page.submit({**again, "speed": "exact"}).request
    assert finer == page.submit(exact).request
    assert "speed" not in finer
    cached = page.submit({**draft, "step_cache": "easycache:0.1"})
    assert page.actions.form_of(cached)["step_cache"] == cached.request["step_cache"] == "easycache:0.1"


@pytest.mark.parametrize(
    ("fields", "speed"),
    [({"guidance_gate": 1.0}, "exact"), ({"step_cache": "off"}, "exact"), ({"guidance_scale": 1.0}, "draft")],
)
def test_a_speed_of_which_a_part_was_off_stays_so(page: Page, fields: Any, speed: str) -> None:
    made = page.http.post("/v1/videos", json={"prompt": "x", "seed": 1, "speed": "draft"} | fields).json()
    job = page.api.store.get(made["id"])
    form = page.http.get(f"/page/videos/{job.id}").json()["form"]
    assert form["speed"] == speed
    again = page.submit(form).request
    names = ("step_cache", "guidance_gate", "guidance_scale")
    assert [again[name] for name in names] == [job.request[name] for name in names]


def test_presets_follow_from_the_model() -> None:
    wan = Presets(WAN_1_3B.defaults)
    assert wan.shapes == {"Wide": "832x480", "Tall": "480x832", "Square": "624x624"}
    assert wan.lengths == {"3 s": 49, "5 s": 81, "8 s": 129}
    assert wan.qualities == {"Draft": "draft", "Standard": "near", "Fine": "exact"}
    form = default_form(WAN_1_3B.defaults)
    assert [wan.rows[field][name] for field, name in (("size", "Wide"), ("num_frames", "5 s"), ("speed", "Fine"))] == [
        form[field] for field in ("size", "num_frames", "speed")
    ]
    small = Presets(replace(WAN_1_3B.defaults, height=96, width=96, num_frames=33, num_inference_steps=20))
    assert small.shapes == {"Wide": "160x96", "Tall": "96x160", "Square": "96x96"}
    assert small.lengths == {"1 s": 17, "2 s": 33, "3 s": 49}
    tiny = Presets(replace(WAN_1_3B.defaults, height=16, width=16, num_frames=1, num_inference_steps=1))
    assert tiny.lengths == {"1 s": 17}
    assert tiny.qualities == {"Standard": "exact"}, "there is nothing to skip in one step"


def test_the_form_becomes_a_job_and_back(page: Page) -> None:
    form = page.form(prompt="a fox", num_frames=33.0, seed=" 5 ", size="480x832")
    job = page.submit(form)
    assert (job.request["height"], job.request["width"], job.request["num_frames"]) == (832, 480, 33)
    assert page.actions.form_of(job) == {**form, "num_frames": 33, "seed": "5"}
    assert page.submit({**form, "seed": ""}).request["seed"] is not None


def test_what_the_page_is_built_from(page: Page) -> None:
    about = page.http.get("/page/about").json()
    assert about["fields"].keys() | {"loras"} == about["defaults"].keys()
    assert {name for row in about["rows"] for name in row} <= about["fields"].keys()
    assert all(field["help"] for field in about["fields"].values()), "each has a hint"
    for preset in about["presets"]:
        for value in preset["values"].values():
            assert "fields" in page.http.post("/page/fields", json=page.form(**{preset["field"]: value})).json()
    assert "PSNR" in about["speeds"]["fine"]
    assert about["speeds"]["exact"] == ""


def test_the_models_that_could_be_served_instead_with_what_they_cost(page: Page) -> None:
    models = page.http.get("/page/about").json()["models"]
    assert models["served"] == "832 × 480 · 5.1 s · 50 steps"
    about = {other["name"]: other["about"] for other in models["others"]}
    assert "50 steps · 6 times the work · weights of 21.3 GB" in about["Wan-AI/Wan2.1-T2V-14B-Diffusers"]
    assert "3 steps without guidance · 1/33 of the work" in about["FastVideo/FastWan-QAD-1.3B"]
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers" not in about, "it is the one that is served"
    assert not any("NVFP4" in name or "Self-Forcing" in name for name in about), "they do not run here"
    small = open_model("miniature").spec
    about = {other["name"]: other["about"] for other in model_words(small, "miniature")["others"]}
    assert next(iter(about)) == "miniature-fast"
    assert "1/10 of the work" in about["miniature-fast"]
    assert "the work" not in about["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"], "another kind of video"


def test_notes_on_prompts_beyond_the_miniatures_world(api: Api) -> None:
    page = Page(api, model="miniature")
    for prompt, count in (("a dog on a skateboard", 1), ("a red circle moving left on a black background", 0), ("", 0)):
        assert len(page.http.post("/page/plan", json=page.form(prompt=prompt)).json()["notes"]) == count
    job = page.submit(page.form(prompt="a dog on a skateboard"))
    assert "beyond its world" in page.http.get(f"/page/videos/{job.id}").json()["video"]["notes"][0]


def test_older_videos_come_by_the_page(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanduet.doors.page.events.PAGE_CARDS", 2)
    ids = [page.submit(page.form(prompt=str(i))).id for i in range(5)][::-1]
    first = page.http.get("/page/videos", params={"after": ids[1]}).json()
    assert ([video["id"] for video in first["videos"]], first["more"]) == (ids[2:4], True)
    last = page.http.get("/page/videos", params={"after": ids[3]}).json()
    assert ([video["id"] for video in last["videos"]], last["more"]) == (ids[4:], False)
    assert page.http.get("/page/videos", params={"after": "x"}).status_code == 400


def test_the_stream_has_every_change_of_ones_own_jobs(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store changes between two polls; the stream ends when the server drains."""
    monkeypatch.setattr("wanduet.doors.page.events.PAGE_CARDS", 2)
    store, context = page.api.store, page.api.context
    oldest, middle, newest = [page.submit(page.form(prompt=prompt)).id for prompt in ("a", "b", "c")]
    changes: list[Any] = [
        lambda: store.claim("w", 30.0),
        lambda: store.cancel(middle),
        lambda: store.delete(newest),
        context.draining.set,
    ]
    list_jobs = store.list

    def changing(*args: Any, **options: Any) -> Any:
        found = list_jobs(*args, **options)
        if "status" not in options and changes:
            changes.pop(0)()
        return found

    monkeypatch.setattr(store, "list", changing)
    told = events_of(page.http.get("/page/events").text)
    assert [name for name, _ in told][:2] == ["server", "videos"]
    first = told[1][1]
    assert [(video["id"], video["title"]) for video in first["videos"]] == [
        (newest, "Waiting"), (middle, "Waiting"), (oldest, "Running"),
    ], "an open job is shown however many are newer"  # fmt: skip
    assert (first["more"], first["last"]) == (True, middle)
    later = [(video["id"], video["title"]) for _, data in told[2:] for video in data["videos"]]
    assert (middle, "Cancelled") in later
    assert [id for _, data in told[2:] for id in data["deleted"]] == [newest]


def test_the_page_is_closed_without_a_key_and_open_with_its_cookie(make_api: Any, store: Any) -> None:
    keys = KeyRing(store.files.folder / "keys.json")
    key, other = keys.add("ann"), keys.add("bob")
    page = Page(make_api(keys=keys))
    with page.http as http:
        assert (http.get("/").status_code, http.get("/").headers["location"]) == (303, "/login")
        check_keys(page.api.app)
        in_browser = http.get("/docs", headers={"Accept": "text/html,*/*;q=0.8"})
        assert (in_browser.status_code, in_browser.headers["location"]) == (303, "/login")
        assert http.get("/docs").status_code == 401
        asked = ["/page/about", "/page/events", f"/page/videos/{JOB.id}", f"/page/videos?after={JOB.id}"]
        assert {http.get(path).status_code for path in asked} == {401}
        assert http.post("/login", data={"key": "wrong"}).status_code == 401
        assert http.post("/login", data={"key": key}, headers={"Origin": "http://evil.example"}).status_code == 403
        proxied = [
            {"X-Forwarded-Proto": "https"},
            {"Forwarded": "for=1.2.3.4;proto=https"},
            {"X-Forwarded-Proto": "HTTPS, http"},
        ]
        for headers in [*proxied, {"Origin": "https://127.0.0.1:8000"}]:
            cookie = http.post("/login", data={"key": key}, headers=headers).headers["set-cookie"].lower()
            assert "secure" in cookie, "a proxy speaks TLS for this server"
        http.cookies.clear()
        cookie = http.post("/login", data={"key": key}).headers["set-cookie"].lower()
        assert all(word in cookie for word in ("httponly", "samesite=strict"))
        assert "secure" not in cookie, "plain HTTP would not send it back"
        assert http.get("/").status_code == http.get("/docs").status_code == 200
        video_id = page.submit(page.form()).id
        assert http.get(f"/page/videos/{video_id}").status_code == 200
        for path in (f"/v1/videos/{video_id}", f"/page/videos/{video_id}"):
            strange = {"Authorization": f"Bearer {other}"}
            assert http.get(path, headers=strange).status_code == 404, "a header counts before a cookie"
        answer = http.post(f"/page/videos/{video_id}/again", json={"prompt": "x"}, headers=strange)
        assert answer.status_code == 404
        no_video = http.post("/page/settings", content=b"x" * 2**21)
        assert (no_video.status_code, list(no_video.json())) == (400, ["error"])
        assert str(store.files.folder) not in no_video.text
        keys.remove(keys.records()[0].id)
        assert http.get("/page/about").status_code == 401
        assert http.post("/page/settings", content=b"x").status_code == 401
        assert http.get("/").status_code == 303, "a revoked key closes the page"


def test_a_revoked_key_ends_the_stream_of_an_open_page(
    make_api: Any, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KeyRing(store.files.folder / "keys.json")
    key = keys.add("ann")
    page = Page(make_api(keys=keys))
    look = store.list

    def revoking(*args: Any, **options: Any) -> Any:
        for record in keys.records():
            keys.remove(record.id)
        return look(*args, **options)

    monkeypatch.setattr(store, "list", revoking)
    told = events_of(page.http.get("/page/events", headers={"Authorization": f"Bearer {key}"}).text)
    assert told[-1][0] == "error"
    assert "videos" not in [name for name, _ in told]


def test_the_pages_files(page: Page) -> None:
    html = page.http.get("/")
    policy = html.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<style|style=|<script(?! type=\"module\" src=)|\son\w+=", html.text), "nothing inline"
    types = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for path in STATIC.iterdir():
        answer = page.http.get(f"/page/{path.name}")
        if path.suffix == ".html":
            assert answer.status_code == 404, "pages have their own routes"
            continue
        assert (answer.status_code, answer.content) == (200, path.read_bytes())
        assert answer.headers["content-type"].partition(";")[0] == types[path.suffix]
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = page.http.get(f"/page/{path.name}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        for other in re.findall(r"from '\./([\w.]+)'", path.read_text("utf-8")):
            assert (STATIC / other).is_file()
        assert not re.search(r"https?://(?!www\.w3\.org)", path.read_text("utf-8")), "nothing of other hosts"
    for path in ("/page/x.js", "/page/..%2froutes.py", "/page/../routes.py", "/page/%00.js"):
        assert page.http.get(path).status_code == 404


def luminance(color: str) -> float:
    parts = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_enough_contrast(scheme: str) -> None:
    """WCAG 2.2, 1.4.3: 4.5:1 for texts; 1.4.11: 3:1 for what marks a state."""
    css = (STATIC / "page.css").read_text("utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    color = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", light))
    color |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", dark)) if scheme == "dark" else {}
    texts = [(ink, ground) for ink in ("ink", "quiet") for ground in ("page", "panel")]
    texts += [(ink, "page") for ink in ("bad", "slow")]
    texts += [("ink", ground) for ground in ("raised", "button", "button-over")] + [("on-primary", "primary")]
    marks = [(mark, "page") for mark in ("accent", "good", "slow", "bad")]
    for pairs, least in ((texts, 4.5), (marks, 3.0)):
        for ink, ground in pairs:
            low, high = sorted((luminance(color[ink]), luminance(color[ground])))
            assert (high + 0.05) / (low + 0.05) >= least, (ink, ground)


def test_beside_the_page_the_api_speaks_for_itself(page: Page) -> None:
    with page.http as http:
        for path in (
            "/v1",
            "/v1/nothing",
            "/v1/videos/",
            "/v1/videos/../../etc",
            "/nothing",
            "/redoc",
            "/page/nothing",
        ):
            answer = http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        for method, path in (("PUT", "/v1/videos"), ("PATCH", "/v1/videos/x"), ("GET", "/v1/videos/x/remix")):
            answer = http.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
            assert answer.headers["allow"]
        check_refusals(page.api.app)
        with ExitStack() as others:
            with suppress(ApiError):
                while True:
                    others.enter_context(page.api.context.page_streams.enter())
            assert http.get("/page/events").status_code == 503, "one open page too many"
        assert http.head("/health").status_code == http.head("/").status_code == 200
        near = {"Origin": "http://localhost:3000"}  # another server's page on this machine
        for path in ("/", "/page/about", "/v1/videos"):
            answer = http.get(path, headers=near)
            assert answer.status_code == 200
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_damaged_file_of_keys_opens_nothing(page: Page) -> None:
    (page.api.store.files.folder / "keys.json").write_text("damaged")
    for path in ("/", "/page/about", "/page/events"):
        assert page.http.get(path).json()["error"]["code"] == "internal_error"


def test_only_the_pages_upload_may_be_long(api: Api) -> None:
    for path, status in (("/v1/videos", 413), ("/page/settings", 404)):
        assert api.http.post(path, content=b"x" * (2**20 + 1)).status_code == status


def test_a_preview_is_served_while_the_job_runs(api: Api) -> None:
    job = api.create()
    path = f"/v1/videos/{job['id']}/preview"
    assert api.http.get(path).status_code == 404
    api.claim()
    picture = api.store.files.preview_path(job["id"])
    picture.parent.mkdir()
    picture.write_bytes(CONTENT)
    answer = api.http.get(path)
    assert (answer.content, answer.headers["content-type"]) == (CONTENT, "image/webp")
    assert answer.headers["cache-control"] == "no-store"
