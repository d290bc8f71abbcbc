"""The page's HTML, its gate, its actions; in a browser it is tested in tests/e2e."""

import asyncio
import gc
import math
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api import CONTENT, Api
from fastapi.testclient import TestClient
from page_jobs import JOB
from structlog.testing import capture_logs
from test_limits import check_keys, check_refusals

from wanduet.config import EngineConfig
from wanduet.doors.http.errors import ApiError
from wanduet.doors.http.keys import KeyRing
from wanduet.doors.http.restore import add_restore
from wanduet.doors.page import views
from wanduet.doors.page.actions import PageActions
from wanduet.doors.page.forms import Presets, default_form, fields_of
from wanduet.doors.page.routes import PageGate
from wanduet.errors import InvalidRequestError, WanduetError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.jobs.records import JobError, OutputFile, StoredJob
from wanduet.source_video import SourceVideo

STATES = [
    JOB,
    replace(JOB, status="in_progress", phase="denoise", progress=42.4, seconds_left=75.0),
    replace(JOB, status="completed", progress=100.0, started_at=1.0, completed_at=63.0),
    replace(JOB, status="failed", error=JobError("out_of_memory", "<b>no</b> memory")),
    replace(JOB, status="failed", error=JobError("cancelled", "The job was cancelled.")),
]


@pytest.mark.parametrize("job", STATES, ids=lambda job: views.title(job))
def test_what_users_wrote_is_escaped(job: StoredJob) -> None:
    everything = views.stage(job) + views.progress(job) + views.details(job) + views.gallery([job], job.id)
    for bad in ("<script>", "<i>none", "<b>no</b>"):
        assert bad not in everything
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &#x27;co&quot;" in everything


def test_progress_in_words() -> None:
    line = views.progress(STATES[1])
    assert "Denoising" in line
    assert "about 1 min 15 s left" in line
    assert "42 %" in line
    assert "made in 1 min 2 s" in views.progress(STATES[2])
    assert [views.duration(s) for s in (0.2, 59, 61, 3700)] == ["1 s", "59 s", "1 min 1 s", "1 h 1 min"]


def test_what_the_plan_says() -> None:
    devices = [
        {"name": "cuda:0", "phases": {"denoise": 3 * 2**30, "decode": 2**30}, "limit_bytes": 4 * 2**30},
        {"name": "cpu", "phases": {}, "limit_bytes": None},
    ]
    plan = {"fits": True, "devices": devices, "predicted_seconds": {"total": 90.0}, "nearest_that_fits": []}
    panel = views.plan_panel(plan, "832 × 480")
    for part in (
        "Fits: about 1 min 30 s",
        "832 × 480",
        "cuda:0",
        "3.00 GiB of 4.00 GiB",
        "width:75%",
        "cpu",
        "message good",
    ):
        assert part in panel
    small = {**plan, "fits": False, "nearest_that_fits": [{"num_frames": 41, "predicted_peak_bytes": {}}]}
    panel = views.plan_panel(small, "")
    assert "message bad" in panel
    assert "Try num frames 41." in panel


def test_the_form_in_a_line() -> None:
    form = {"size": "832x480", "num_frames": 81, "fps": 16, "num_inference_steps": 50, "seed": ""}
    assert views.settings_line(form) == "832 × 480 · 5.1 s · 50 steps · a new seed"
    assert views.settings_line({**form, "num_frames": 1, "seed": "0"}) == "832 × 480 · 1 frame · 50 steps · seed 0"


def test_timesteps_in_the_form_replace_the_number_of_steps_and_the_shift(actions: PageActions) -> None:
    form = {**actions.defaults(), "prompt": "x", "sampler": "euler", "timesteps": "1000, 757"}
    job = actions.submit("local", form)
    assert (job.request["timesteps"], job.request["num_inference_steps"]) == ([1000, 757], 2)
    assert "timesteps 1000, 757 ·" in views.settings_line(form)
    again = actions.form_of(job)
    assert again["timesteps"] == "1000,757"
    assert actions.submit("local", again).request == job.request


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
    ("fields", "words"),
    [
        ({"num_frames": 80}, "Frames: 80 does not work, 81 or 77 does."),
        ({"size": "830x480"}, "Size: a width of 830 does not work, 816 or 832 does."),
        ({"size": "big"}, "Size: 480p, 720p, 1080p or WIDTHxHEIGHT, for example 832x480."),
        ({"size": "2560x1440"}, "Size: this server takes at most 2088960 pixels."),
        ({"seed": "abc"}, "Seed: a whole number."),
        ({"num_inference_steps": 0}, "Steps: 0 does not work, 1 does."),
        ({"num_videos_per_prompt": 5}, "Videos: 5 does not work, 4 does."),
    ],
)
def test_what_is_wrong_is_told_by_the_pages_own_names(actions: PageActions, fields: Any, words: str) -> None:
    with pytest.raises(WanduetError) as told:
        actions.submit("local", {**actions.defaults(), "prompt": "x", **fields})
    assert words in views.refusal(told.value)


def test_several_videos_of_one_prompt(actions: PageActions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    form = {**actions.defaults(), "prompt": "x", "num_videos_per_prompt": 3.0}
    job = actions.submit("local", form)
    assert job.request["num_videos_per_prompt"] == 3
    assert "3 videos" in views.settings_line(form)
    assert "3 videos" in views.gallery([job], None)
    assert "<dd>5, 6, 7</dd>" in views.details(replace(job, report={"seeds": [5, 6, 7]}))
    about = {"request": job.request, "seed": 6}
    monkeypatch.setattr("wanduet.doors.http.uploads.MetadataReader.read", lambda *_: about)
    monkeypatch.setattr("wanduet.doors.http.uploads.SourceReader.read", lambda *_: SourceVideo("0" * 64, 480, 832, 5.0))
    (tmp_path / "second.mp4").write_bytes(b"x")
    restored = actions.read(tmp_path / "second.mp4")["form"]
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
def restoring(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A client of a page that only reads videos, of which none has pictures."""

    def refuse(*_: Any) -> None:
        raise InvalidRequestError("input_video", "x", "it has no pictures")

    monkeypatch.setattr("wanduet.doors.http.uploads.SourceReader.read", refuse)
    actions = PageActions(api.context, EngineConfig(model="miniature", data_dir=tmp_path))
    add_restore(api.app, actions.read)
    return api.http


def test_a_quality_stands_for_the_fields_that_its_speed_sets(actions: PageActions) -> None:
    exact = {**actions.defaults(), "prompt": "x", "seed": "1"}
    draft = {**exact, "speed": "draft"}
    job = actions.submit("local", draft)
    assert (job.request["speed"], job.request["step_cache"]) == ("draft", "easycache:0.2")
    again = actions.form_of(job)
    assert (again["speed"], again["step_cache"], again["guidance_gate"]) == ("draft", "off", 1.0)
    finer = actions.submit("local", {**again, "speed": "exact"}).request
    assert finer == actions.submit("local", exact).request
    assert "speed" not in finer
    cached = actions.submit("local", {**draft, "step_cache": "easycache:0.1"})
    assert actions.form_of(cached)["step_cache"] == cached.request["step_cache"] == "easycache:0.1"


@pytest.mark.parametrize(
    ("fields", "speed"),
    [({"guidance_gate": 1.0}, "exact"), ({"step_cache": "off"}, "exact"), ({"guidance_scale": 1.0}, "draft")],
)
def test_a_speed_of_which_a_part_was_off_stays_so(api: Any, actions: PageActions, fields: Any, speed: str) -> None:
    made = api.http.post("/v1/videos", json={"prompt": "x", "seed": 1, "speed": "draft"} | fields).json()
    job = actions.find("local", made["id"])
    form = actions.form_of(job)
    assert form["speed"] == speed
    again = actions.submit("local", form).request
    names = ("step_cache", "guidance_gate", "guidance_scale")
    assert [again[name] for name in names] == [job.request[name] for name in names]


def test_presets_follow_from_the_model() -> None:
    wan = Presets(WAN_1_3B.defaults)
    assert wan.shapes == {"Wide": "832x480", "Tall": "480x832", "Square": "624x624"}
    assert wan.lengths == {"3 s": 49, "5 s": 81, "8 s": 129}
    assert wan.qualities == {"Draft": "draft", "Standard": "near", "Fine": "exact"}
    form = default_form(WAN_1_3B.defaults)
    assert wan.chosen(form) == ("Wide", "5 s", "Fine")
    assert wan.chosen({**form, "speed": "draft"}) == ("Wide", "5 s", "Draft")
    assert wan.chosen({**form, "size": "640x640", "num_frames": 5, "speed": "fast"}) == (None, None, None)
    small = Presets(replace(WAN_1_3B.defaults, height=96, width=96, num_frames=33, num_inference_steps=20))
    assert small.shapes == {"Wide": "160x96", "Tall": "96x160", "Square": "96x96"}
    assert small.lengths == {"1 s": 17, "2 s": 33, "3 s": 49}
    tiny = Presets(replace(WAN_1_3B.defaults, height=16, width=16, num_frames=1, num_inference_steps=1))
    assert tiny.lengths == {"1 s": 17}
    assert tiny.qualities == {"Standard": "exact"}, "there is nothing to skip in one step"


def test_every_video_of_a_job_is_shown() -> None:
    files = tuple(OutputFile(kind, i, f"{i}.mp4", 1) for i in (0, 1) for kind in ("video", "thumbnail"))
    job = replace(JOB, status="completed", files=files)
    stage, details = views.stage(job), views.details(job)
    assert stage.count("<video") == 2
    assert 'id="player"' in stage
    assert f"/v1/videos/{job.id}/content?variant=video&index=1" in stage
    assert "Download MP4 2" in details
    assert views.stage(STATES[2]).count("<video") == 1


def test_a_job_that_waits_says_behind_what() -> None:
    assert "2 of your videos are before it" in views.progress(JOB, ahead=2)
    assert "1 of your videos is before it" in views.progress(JOB, ahead=1)
    assert "before it" not in views.progress(JOB)


@pytest.fixture
def actions(api: Api) -> PageActions:
    return PageActions(api.context, EngineConfig(data_dir=api.store.files.folder))


def test_the_form_becomes_a_job_and_back(actions: PageActions) -> None:
    form = {**actions.defaults(), "prompt": "a fox", "num_frames": 33.0, "seed": " 5 ", "size": "480x832"}
    job = actions.submit("local", form)
    assert (job.request["height"], job.request["width"], job.request["num_frames"]) == (832, 480, 33)
    assert actions.form_of(job) == {**form, "num_frames": 33, "seed": "5"}
    drawn = actions.submit("local", {**form, "seed": ""})
    assert drawn.request["seed"] is not None
    assert [one.id for one in actions.jobs("local")[0]] == [drawn.id, job.id]
    assert actions.find("someone", job.id) is None
    actions.cancel("someone", job.id)
    actions.cancel("local", job.id)
    assert [actions.find("local", one.id).status for one in (job, drawn)] == ["failed", "queued"]  # type: ignore[union-attr]
    actions.delete("local", job.id)
    assert actions.find("local", job.id) is None


@pytest.mark.parametrize("kept", [None, "", "null", "{}", '["a fox", ""]', "5", "{"])
def test_a_form_that_no_browser_remembers_stays_as_it_is(actions: PageActions, kept: str | None) -> None:
    gradio = pytest.importorskip("gradio")
    from wanduet.doors.page.events import PageEvents

    assert PageEvents(actions).recall(kept) == [gradio.skip()] * len(actions.defaults())


def test_what_a_browser_remembers_goes_by_name(actions: PageActions) -> None:
    pytest.importorskip("gradio")
    from wanduet.doors.page.events import PageEvents

    kept = '{"seed": "7", "gone_since": 1, "prompt": "a fox"}'
    assert PageEvents(actions).recall(kept) == list({**actions.defaults(), "prompt": "a fox", "seed": "7"}.values())


def test_an_empty_prompt_and_wrong_sizes_are_told(actions: PageActions) -> None:
    for change in ({"prompt": "  "}, {"size": "100x100"}, {"size": "huge"}, {"num_frames": 80}, {"seed": "many"}):
        with pytest.raises(WanduetError):
            actions.submit("local", {**actions.defaults(), "prompt": "x", **change})
    assert actions.jobs("local") == ((), False)


def test_the_same_again_and_with_another_seed(actions: PageActions) -> None:
    job = actions.submit("local", {**actions.defaults(), "prompt": "a fox", "seed": "5", "negative_prompt": ""})
    again = actions.repeat("local", job, new_seed=False)
    assert again.id != job.id
    assert again.request == job.request
    other = actions.repeat("local", job, new_seed=True)
    assert other.request["seed"] != 5
    assert {**other.request, "seed": 5} == job.request


def test_older_videos_come_by_the_page(actions: PageActions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wanduet.doors.page.actions.PAGE_CARDS", 2)
    ids = [actions.submit("local", {**actions.defaults(), "prompt": str(i)}).id for i in range(5)][::-1]
    for pages, (count, more) in {1: (2, True), 2: (4, True), 3: (5, False), 9: (5, False)}.items():
        jobs, has_more = actions.jobs("local", pages)
        assert ([job.id for job in jobs], has_more) == (ids[:count], more)
    assert "data-older" in views.gallery(jobs, None, more=True)
    assert "data-older" not in views.gallery(jobs, None)


@pytest.fixture
def mount() -> Any:
    pytest.importorskip("gradio")
    from wanduet.doors.page.app import mount_page

    yield mount_page
    # Gradio leaves loops and their sockets to the collector, which would warn of them in some other test.
    for loop in [found for found in gc.get_objects() if issubclass(type(found), asyncio.BaseEventLoop)]:
        if not loop.is_running():
            loop.close()
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_a_poll_that_ends_after_a_click_undoes_nothing(actions: PageActions, mount: Any) -> None:
    import gradio

    from wanduet.doors.page.app import Page

    page = Page(actions)
    wired = {each.fn.__name__: each for each in page.build().fns.values() if each.fn is not None}
    state: dict[Any, Any] = {page._chosen: None, page._job: None, page._pages: 1, page._shown: {}}
    asked = gradio.Request(headers={}, username=None)

    def run(name: str) -> dict[Any, Any]:
        answer = wired[name].fn(*[state[each] for each in wired[name].inputs], request=asked)
        return {each: it for each, it in zip(wired[name].outputs, answer, strict=True) if it != gradio.skip()}

    first = actions.submit("local", {**actions.defaults(), "prompt": "a fox", "seed": "5"})
    state.update(run("look"))
    assert first.id in state[page._details]
    actions.cancel("local", first.id)
    late = run("look")
    state.update(run("retry"))
    state.update(late)
    state.update(run("look"))
    assert state[page._job] not in (first.id, None)
    assert state[page._job] in state[page._details]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_the_page_is_closed_without_a_key_and_open_with_its_cookie(make_api: Any, store: Any, mount: Any) -> None:
    keys = KeyRing(store.files.folder / "keys.json")
    key, other = keys.add("ann"), keys.add("bob")
    api = make_api(keys=keys)
    app = mount(api.app, EngineConfig(data_dir=store.files.folder))
    job = {"prompt": "x"}
    with TestClient(app, base_url="http://127.0.0.1:8000", follow_redirects=False) as http:
        assert (http.get("/").status_code, http.get("/").headers["location"]) == (303, "/login")
        assert http.get("/config").status_code == 401
        check_keys(app)
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
        signed_in = http.post("/login", data={"key": key})
        cookie = signed_in.headers["set-cookie"].lower()
        assert all(word in cookie for word in ("httponly", "samesite=strict"))
        assert "secure" not in cookie, "plain HTTP would not send it back"
        page = http.get("/")
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        video_id = http.post("/v1/videos", json=job).json()["id"]
        assert http.get(f"/v1/videos/{video_id}").status_code == 200
        strange = {"Authorization": f"Bearer {other}"}
        assert http.get(f"/v1/videos/{video_id}", headers=strange).status_code == 404, "a header counts before a cookie"
        for path in (
            "/gradio_api/proxy=https://x.hf.space/",
            "/gradio_api/file=/etc/passwd",
            "/monitoring",
            "/gradio_api/upload",
        ):
            assert http.get(path).status_code == 404
        for data in (["x", {"path": "http://x/a.mp4", "meta": {"_type": "gradio.FileData"}}], [[{"p\u0061th": "/x"}]]):
            asked = {"data": data, "fn_index": 0, "session_hash": "a"}
            assert http.post("/gradio_api/queue/join", json=asked).status_code == 400, "no file, no address"
        no_video = http.post("/page/settings", content=b"x" * 2**21)
        assert (no_video.status_code, list(no_video.json())) == (400, ["error"])
        assert str(store.files.folder) not in no_video.text
        assert http.get("/page/pulse").json() == http.get("/page/pulse").json() != {}
        keys.remove(keys.records()[0].id)
        assert http.get("/page/pulse").status_code == 401
        assert http.post("/page/settings", content=b"x").status_code == 401
        assert http.get("/").status_code == 303, "a revoked key closes the page"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_beside_the_page_the_api_speaks_for_itself(make_api: Any, mount: Any) -> None:
    api = make_api()
    app = mount(api.app, EngineConfig(data_dir=api.store.files.folder))
    with TestClient(app, base_url="http://127.0.0.1:8000") as http:
        for path in ("/v1", "/v1/nothing", "/v1/videos/", "/v1/videos/../../etc", "/nothing", "/docs"):
            answer = http.get(path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        for method, path in (("PUT", "/v1/videos"), ("PATCH", "/v1/videos/x"), ("GET", "/v1/videos/x/remix")):
            answer = http.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (405, "method_not_allowed")
            assert answer.headers["allow"]
        check_refusals(app)
        with ExitStack() as others:
            with suppress(ApiError):
                while True:
                    others.enter_context(api.context.page_streams.enter())
            for path in ("/gradio_api/heartbeat/x", "/gradio_api/queue/data?session_hash=x"):
                assert http.get(path).status_code == 503, "one open page too many"
        assert http.head("/health").status_code == http.head("/").status_code == 200
        near = {"Origin": "http://localhost:3000"}  # another server's page on this machine
        for path in ("/", "/config", "/v1/videos"):
            answer = http.get(path, headers=near)
            assert answer.status_code == 200
            assert not [name for name in answer.headers if name.startswith("access-control")]
        for path in ("/config", "/gradio_api/queue/join", "/v1/videos"):
            answer = http.options(path, headers={**near, "Access-Control-Request-Method": "POST"})
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_damaged_file_of_keys_opens_nothing_and_is_logged_at_a_limited_rate(make_api: Any, store: Any) -> None:
    api = make_api()
    (store.files.folder / "keys.json").write_text("damaged")
    with TestClient(PageGate(api.app, api.context), base_url="http://127.0.0.1:8000") as http, capture_logs() as lines:
        for path in ("/", "/config", "/page/pulse") * 10:
            assert http.get(path, follow_redirects=False).json()["error"]["code"] == "internal_error"
    assert [(line["event"], line["error"]) for line in lines] == [("request failed", "ConfigError")]


@pytest.mark.filterwarnings("ignore")  # Gradio's, of pandas' options
def test_what_the_page_does_not_send_is_refused_and_leaves_no_word_of_it(
    make_api: Any, mount: Any, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    api = make_api()
    join = "/gradio_api/queue/join"
    event = {"fn_index": 0, "data": ["a secret prompt"], "session_hash": "s"}
    with TestClient(mount(api.app, EngineConfig(data_dir=api.store.files.folder)), base_url="http://127.0.0.1") as http:
        assert http.post(join, json={**event, "fn_index": 10**30}).status_code == 400
        assert http.get("/static/img/" + "a" * 300).status_code == 404
        http.get("/gradio_api/startup-events")
        assert http.post(join, json=event).status_code == 200
        assert '"success":false' in http.get("/gradio_api/queue/data?session_hash=s").text
    assert [record.message for record in caplog.records if record.name == "gradio"] == ["an event of the page failed"]
    assert "secret" not in "".join(capfd.readouterr())


def test_an_open_page_does_not_keep_a_server_that_ends(make_api: Any) -> None:
    context = make_api().context
    sent = []

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        context.draining.set()
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append((message["type"], message.get("more_body", False)))

    async def receive() -> Any:
        await asyncio.Event().wait()

    scope = {"type": "http", "method": "GET", "path": "/gradio_api/heartbeat/x", "headers": []}
    asyncio.run(PageGate(endless, context)(scope, receive, send))
    body = "http.response.body"
    assert sent == [("http.response.start", False), (body, True), (body, False)], "the answer is whole"


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
