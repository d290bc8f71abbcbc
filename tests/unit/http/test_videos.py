"""The protocol: what a client sends and gets, call by call."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from wanduet.doors.http.context import ServerSettings
from wanduet.doors.http.schemas import RequestLimits
from wanduet.family.wan21 import WAN_1_3B
from wanduet.jobs.records import JobError
from wanduet.jobs.store import JobStore
from wanduet.jobs.webhooks import WebhookSender, WebhookSettings
from wanduet.meta.prices import Prices, Subject, settings_key, store_prices
from wanduet.request import GenerationRequest

FIELDS = {
    "id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "seconds", "size",
    "prompt", "remixed_from_video_id", "error", "settings",
}  # fmt: skip
CONTENT = bytes(range(256)) * 8


def test_create_from_a_form_as_the_sdk_sends_it(api: Any) -> None:
    form = {
        "prompt": "a red circle", "model": "Wan2.1-T2V-1.3B", "seconds": "4", "size": "832x480", "seed": "5",
        "num_inference_steps": "20", "guidance_scale": "4.5", "flow_shift": "3", "negative_prompt": "", "fps": "16",
    }  # fmt: skip
    answer = api.http.post("/v1/videos", files={name: (None, value) for name, value in form.items()})
    assert answer.status_code == 200
    video = answer.json()
    assert set(video) == FIELDS
    assert (video["object"], video["status"], video["progress"]) == ("video", "queued", 0)
    assert (video["seconds"], video["size"], video["model"]) == ("4", "832x480", "Wan2.1-T2V-1.3B")
    settings = video["settings"]
    assert (settings["num_frames"], settings["seed"], settings["guidance_scale"]) == (65, 5, 4.5)
    assert (settings["negative_prompt"], settings["num_inference_steps"], settings["flow_shift"]) == ("", 20, 3.0)
    assert api.store.get(video["id"]).request["prompt"] == "a red circle"


def test_create_from_json_and_from_a_plain_form(api: Any) -> None:
    video = api.create(seconds=5, size="720p")
    assert (video["seconds"], video["size"], video["settings"]["num_frames"]) == ("5", "1280x720", 81)
    answer = api.http.post("/v1/videos", data={"prompt": "x", "num_frames": "17"})
    assert answer.json()["settings"]["num_frames"] == 17


def test_timesteps_are_a_text_in_a_form_and_a_list_in_json(api: Any) -> None:
    few = {"sampler": "renoise", "guidance_scale": 1}
    once = {"Idempotency-Key": "the same"}
    body = {"prompt": "x", "timesteps": [1000, 757, 522], "seed": 1, **few}
    made = api.http.post("/v1/videos", json=body, headers=once).json()
    form = {name: str(value) for name, value in body.items()} | {"timesteps": "1000,757,522"}
    assert api.http.post("/v1/videos", data=form, headers=once).json()["id"] == made["id"]
    for video in (made, api.http.post("/v1/videos", data=form).json()):
        settings = video["settings"]
        assert (settings["timesteps"], settings["num_inference_steps"]) == ([1000, 757, 522], 3)
        assert "flow_shift" not in settings
    assert "timesteps" not in api.create()["settings"]
    again = api.http.post(f"/v1/videos/{made['id']}/remix", json={"prompt": "y"}).json()
    assert again["settings"] == made["settings"]
    for body, param in (
        ({"timesteps": [1000, 757]}, "timesteps"),
        ({"timesteps": [1000, 757], "sampler": "euler", "flow_shift": 3}, "flow_shift"),
        ({"timesteps": list(range(1000, 799, -1)), "sampler": "euler"}, "num_inference_steps"),  # a server's limit
    ):
        answer = api.http.post("/v1/videos", json={"prompt": "x", **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("given", "frames"), [("5", 81), (5, 81), (5.0, 81), ("1", 17), ("0.1", 1), ("0", 1), ("2.1", 33)]
)
def test_seconds_become_frames(api: Any, given: Any, frames: int) -> None:
    assert api.create(seconds=given)["settings"]["num_frames"] == frames


def test_1080p_keeps_its_size(api: Any) -> None:
    assert api.create(size="1080p")["size"] == "1920x1080"


def test_a_seed_is_drawn_once_so_that_an_attempt_can_be_repeated(api: Any) -> None:
    seeds = {api.create()["settings"]["seed"] for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 8001}, "prompt"),
        ({"prompt": "a\udc80"}, "prompt"),
        ({"prompt": "a\0b"}, "prompt"),
        ({"negative_prompt": "x" * 8001}, "negative_prompt"),
        ({"seconds": "long"}, "seconds"),
        ({"seconds": "nan"}, "seconds"),
        ({"seconds": True}, "seconds"),
        ({"seconds": [1]}, "seconds"),
        ({"seconds": -1}, "seconds"),
        ({"seconds": 10**400}, "seconds"),
        ({"seconds": "60"}, "num_frames"),
        ({"seconds": "4", "num_frames": 81}, "seconds"),
        ({"size": "big"}, "size"),
        ({"size": "²x³"}, "size"),
        ({"size": 480}, "size"),
        ({"size": "99984x16"}, "width"),
        ({"size": "4096x4096"}, "size"),
        ({"size": "833x480"}, "width"),
        ({"size": "480p", "height": 480}, "size"),
        ({"num_frames": 80}, "num_frames"),
        ({"step_cache": "easycash"}, "step_cache"),
        ({"speed": "warp"}, "speed"),
        ({"speed": "near", "num_inference_steps": 4}, "speed"),
        ({"speed": "near", "loss_budget": 30}, "speed"),
        ({"speed": "exact", "step_cache": "easycache"}, "speed"),
        ({"loss_budget": -1}, "loss_budget"),
        ({"step_cache": "magcache", "num_inference_steps": 4}, "step_cache"),
        ({"guidance_gate": 1.5}, "guidance_gate"),
        ({"guidance_gate": 0.5, "guidance_scale": 1}, "guidance_gate"),
        ({"num_frames": 405}, "num_frames"),
        ({"num_inference_steps": 201}, "num_inference_steps"),
        ({"num_videos_per_prompt": 5}, "num_videos_per_prompt"),
        ({"seed": "x"}, "seed"),
        ({"seed": -1}, "seed"),
        ({"fps": 0}, "fps"),
        ({"guidance_scale": "nan"}, "guidance_scale"),
        ({"input_reference": "http://example.com/a.png"}, "input_reference"),
        ({"output": "/etc/passwd"}, "output"),
        ({"path": "../x"}, "path"),
    ],
)
def test_bad_fields_are_named_and_nothing_is_stored(api: Any, fields: dict[str, Any], param: str) -> None:
    error = _post_raw(api, fields)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert len(error["message"]) < 700


@pytest.mark.parametrize("chooses", [True, False])
def test_a_budget_chooses_attention_in_8_bits_where_the_worker_is_the_machine_that_was_measured(
    store: JobStore, make_api: Any, chooses: bool
) -> None:
    request = GenerationRequest(prompt="x", seed=0).resolve(WAN_1_3B)
    subject = Subject.of(request, {"name": "mine", "hash": "abc"}, "a card", {})
    rows = {
        settings_key(fields): {"0": {"forwards": 100, "seconds": seconds, "psnr": psnr}}
        for fields, seconds, psnr in (({}, 10.0, 100.0), ({"quantize_attention": "int8"}, 6.0, 44.0))
    }
    about = {"model": "abc", "versions": dict(subject.versions)}
    store_prices(store.files.folder / "measurements", subject, Prices(about, rows))
    api = make_api(ServerSettings(model_hash="abc", chooses_attention=chooses))
    with api.http:
        video = api.create(loss_budget=43)
        assert video["settings"]["quantize_attention"] == ("int8" if chooses else "off")
        assert api.create()["settings"]["quantize_attention"] == "off"


def test_a_speed_is_a_field_and_part_of_the_video(api: Any) -> None:
    body = {"prompt": "x", "speed": "draft", "seed": "1", "num_inference_steps": "20"}
    form = api.http.post("/v1/videos", files={name: (None, value) for name, value in body.items()}).json()
    plain = api.http.post("/v1/videos", json={**body, "seed": 1, "num_inference_steps": 20}).json()
    for video in (form, plain, api.http.get(f"/v1/videos/{plain['id']}").json()):
        assert video["speed"] == video["settings"]["speed"] == "draft"
        assert (video["settings"]["step_cache"], video["settings"]["guidance_gate"]) == ("easycache:0.2", 0.3)
    budget = api.http.post("/v1/videos", json={"prompt": "x", "loss_budget": 99}).json()
    assert (budget["speed"], budget["settings"]["step_cache"]) == ("exact", "off")
    remix = api.http.post(f"/v1/videos/{plain['id']}/remix", json={"prompt": "y"}).json()
    assert (remix["speed"], remix["settings"]) == ("draft", plain["settings"])
    assert "speed" not in api.http.post("/v1/videos", json={"prompt": "x"}).json()


def _post_raw(api: Any, fields: dict[str, Any]) -> dict[str, Any]:
    body = json.dumps({"prompt": "x", **fields}).encode()
    answer = api.http.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert api.store.list().jobs == ()
    return answer.json()["error"]


def test_the_nearest_allowed_value_is_told(api: Any) -> None:
    assert "81 or 77" in api.refusal(num_frames=80)["message"]


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"num_frames": 10**12}, 401),
        ({"num_frames": 402}, 401),  # not 405, which is of the model's form
        ({"num_inference_steps": 10**6}, 200),
        ({"num_videos_per_prompt": 65}, 4),
        ({"height": 10**9, "width": 10**9}, 1920 * 1088),
        ({"size": "99984x16"}, 16384),  # few pixels, but a side that the model cannot have
    ],
)
def test_the_smaller_of_the_servers_and_the_models_limits_is_told(api: Any, fields: dict[str, Any], limit: int) -> None:
    message = _post_raw(api, fields)["message"]
    assert f"at most {limit}" in message
    assert f"Nearest allowed: {limit}." in message


def test_a_servers_limit_above_the_models_does_not_hide_it(make_api: Any) -> None:
    api = make_api(ServerSettings(limits=RequestLimits(frames=10**4, steps=10**4)))
    assert "at most 4093 frames" in api.refusal(num_frames=10**12)["message"]
    assert "at most 1000." in api.refusal(num_inference_steps=10**12)["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"", "application/json", 400),
        (b"x", "multipart/form-data", 400),
        (b"x", "multipart/form-data; boundary=b", 400),
        (
            b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nx\r\n--b\r\n',
            "multipart/form-data; boundary=b",
            400,
        ),
        (b"prompt=x", "text/plain", 415),
        (b"prompt=x&prompt=y", "application/x-www-form-urlencoded", 400),
    ],
)
def test_bodies_that_are_no_request(api: Any, content: bytes, kind: str, status: int) -> None:
    answer = api.http.post("/v1/videos", content=content, headers={"content-type": kind})
    assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})


def test_files_are_not_taken(api: Any) -> None:
    answer = api.http.post("/v1/videos", data={"prompt": "x"}, files={"input_reference": ("a.png", b"x")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference")


def test_another_model_is_not_found(api: Any) -> None:
    answer = api.http.post("/v1/videos", json={"prompt": "x", "model": "sora-2"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_video_through_its_life(api: Any) -> None:
    video_id = api.create()["id"]
    lease = api.claim()
    api.store.progress(lease, 41.7, "denoise", 9.0)
    running = api.http.get(f"/v1/videos/{video_id}").json()
    assert (running["status"], running["progress"], running["completed_at"]) == ("in_progress", 41, None)
    api.store.fail(lease, JobError("out_of_memory", "Memory ran out.", "server_error"))
    answer = api.http.get(f"/v1/videos/{video_id}")
    assert answer.status_code == 200
    assert answer.json()["status"] == "failed"
    assert answer.json()["error"] == {
        "code": "out_of_memory",
        "message": "Memory ran out.",
        "type": "server_error",
        "param": None,
    }


def test_content_in_all_variants(api: Any) -> None:
    video_id = api.create()["id"]
    job = api.finish()
    for variant, kind, content in (
        ("video", "video/mp4", CONTENT),
        ("thumbnail", "image/webp", b"thumbnail"),
        ("spritesheet", "image/jpeg", b"spritesheet"),
    ):
        answer = api.http.get(f"/v1/videos/{video_id}/content", params={"variant": variant})
        assert (answer.status_code, answer.headers["content-type"], answer.content) == (200, kind, content)
        assert answer.headers["x-content-type-options"] == "nosniff"
    head = api.http.head(f"/v1/videos/{video_id}/content")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(CONTENT)), b"")
    assert api.http.get(f"/v1/videos/{video_id}/content?variant=other").status_code == 400
    assert api.http.get(f"/v1/videos/{video_id}/content?index=1").status_code == 404
    assert job.id == video_id


def test_content_that_is_not_there_is_404_and_never_409(api: Any) -> None:
    video_id = api.create()["id"]
    for code in ("video_queued", "video_in_progress", "video_failed"):
        answer = api.http.get(f"/v1/videos/{video_id}/content")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, code)
        if code == "video_queued":
            api.claim()
        else:
            api.store.cancel(video_id)


def test_list_pages(api: Any) -> None:
    ids = [api.create()["id"] for _ in range(5)]
    first = api.http.get("/v1/videos", params={"limit": 2}).json()
    assert [video["id"] for video in first["data"]] == ids[:2:-1]
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, ids[4], ids[3])
    rest = api.http.get("/v1/videos", params={"limit": 10, "after": first["last_id"]}).json()
    assert ([v["id"] for v in rest["data"]], rest["has_more"]) == (ids[2::-1], False)
    oldest = api.http.get("/v1/videos", params={"order": "asc", "limit": 1}).json()
    assert oldest["data"][0]["id"] == ids[0]
    empty = api.http.get("/v1/videos", params={"order": "asc", "after": ids[4]}).json()
    assert empty == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}
    for bad in ({"limit": 0}, {"limit": 101}, {"limit": "x"}, {"order": "up"}, {"after": "x"}):
        answer = api.http.get("/v1/videos", params=bad)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, next(iter(bad)))


def test_delete(api: Any) -> None:
    video_id = api.create()["id"]
    api.finish()
    answer = api.http.delete(f"/v1/videos/{video_id}")
    assert answer.json() == {"id": video_id, "deleted": True, "object": "video.deleted"}
    assert api.http.get(f"/v1/videos/{video_id}").status_code == 404
    assert api.http.delete(f"/v1/videos/{video_id}").status_code == 404
    assert list(api.store.files.videos.iterdir()) == []


def test_remix_changes_the_prompt_only(api: Any) -> None:
    source = api.create(seed=9, size="720p", num_inference_steps=7)
    answer = api.http.post(f"/v1/videos/{source['id']}/remix", json={"prompt": "a blue circle"})
    assert answer.status_code == 200
    remix = answer.json()
    assert (remix["prompt"], remix["remixed_from_video_id"]) == ("a blue circle", source["id"])
    assert remix["settings"] == source["settings"]
    for bad in ({}, {"prompt": ""}, {"prompt": 5}):
        answer = api.http.post(f"/v1/videos/{source['id']}/remix", json=bad)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
    ignored = api.http.post(f"/v1/videos/{source['id']}/remix", json={"prompt": "x", "seed": 1})
    assert (ignored.status_code, ignored.json()["error"]["param"]) == (400, "seed")
    assert api.http.post(f"/v1/videos/video_{'0' * 32}/remix", json={"prompt": "x"}).status_code == 404


def test_cancel(api: Any) -> None:
    video_id = api.create()["id"]
    answer = api.http.post(f"/v1/videos/{video_id}/cancel")
    assert (answer.status_code, answer.json()["status"], answer.json()["error"]["code"]) == (200, "failed", "cancelled")
    again = api.http.post(f"/v1/videos/{video_id}/cancel")
    assert again.json() == answer.json()


def test_idempotency_key(api: Any) -> None:
    def send(**fields: Any) -> Any:
        return api.http.post("/v1/videos", json={"prompt": "x", **fields}, headers={"Idempotency-Key": "k"})

    first, again = send(), send()
    assert first.json() == again.json(), "the seed was drawn once"
    other = send(prompt="y")
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert len(api.store.list().jobs) == 1


def test_idempotency_keys_of_every_script(api: Any) -> None:
    def send(key: bytes, prompt: str = "x") -> Any:
        return api.http.post("/v1/videos", json={"prompt": prompt}, headers=[(b"Idempotency-Key", key)])

    good = ("ключ", "鍵" * 60, "é", "👪‍x", "a b", "a b", "k" * 255, '"k"')
    for text in good:
        first, again = send(text.encode()), send(text.encode())
        assert first.status_code == 200, first.text
        assert first.json()["id"] == again.json()["id"]
        assert send(text.encode(), "another").status_code == 422
    assert send(b"latin-1 \xe9").json()["id"] == send(b"latin-1 \xe9").json()["id"]
    stored = len(api.store.list().jobs)
    assert stored == len(good) + 1
    for bad in (b"k" * 256, "é".encode() * 256, b"", b"a\x01b", b"a\x7fb", b"\x85", "a\u0085b".encode(), b"a\tb"):
        answer = send(bad)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")
    twice = [(b"Idempotency-Key", b"a"), (b"Idempotency-Key", b"b")]
    assert api.http.post("/v1/videos", json={"prompt": "x"}, headers=twice).status_code == 400
    assert len(api.store.list().jobs) == stored


def events(text: str) -> list[tuple[str, dict[str, Any]]]:
    blocks = [block for block in text.replace("\r\n", "\n").split("\n\n") if block.startswith("event")]
    return [(b.split("\n")[0].removeprefix("event: "), json.loads(b.split("data: ", 1)[1])) for b in blocks]


def between_looks(api: Any, monkeypatch: pytest.MonkeyPatch, *changes: Callable[[], Any]) -> None:
    """Make one change before each look of a stream at its video, from the second look on."""
    real, left = api.store.get, [lambda: None, *changes]

    def get(*values: Any) -> Any:
        if left:
            left.pop(0)()
        return real(*values)

    monkeypatch.setattr(api.store, "get", get)


def test_events_follow_a_video_to_its_end(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    video_id = api.create()["id"]
    lease = api.claim()
    between_looks(
        api,
        monkeypatch,
        lambda: api.store.progress(lease, 20.0, "denoise", 3.0),
        lambda: None,
        lambda: api.store.progress(lease, 60.0, "denoise", 1.0),
        lambda: api.store.complete(lease, []),
    )
    answer = api.http.get(f"/v1/videos/{video_id}/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    seen = events(answer.text)
    assert [name for name, _ in seen] == ["video", "video", "video", "done"]
    assert [data["progress"] for _, data in seen] == [0, 20, 60, 100]
    assert (seen[1][1]["phase"], seen[1][1]["seconds_left"]) == ("denoise", 3.0)


def test_events_of_a_deleted_video_end(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    video_id = api.create()["id"]
    between_looks(api, monkeypatch, lambda: api.store.delete(video_id))
    seen = events(api.http.get(f"/v1/videos/{video_id}/events").text)
    assert [name for name, _ in seen] == ["video", "deleted"]


def test_streams_end_when_the_server_drains(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    video_id = api.create()["id"]
    between_looks(api, monkeypatch, lambda: None, api.context.draining.set)
    assert len(events(api.http.get(f"/v1/videos/{video_id}/events").text)) == 1


@pytest.mark.parametrize("bad", ["x", "video_" + "0" * 32, "video_" + "g" * 32, "%2e%2e", "%00", "%ff", "x" * 65])
@pytest.mark.parametrize(
    ("method", "end"), [("GET", ""), ("GET", "/content"), ("GET", "/events"), ("DELETE", ""), ("POST", "/cancel")]
)
def test_ids_that_are_none(api: Any, bad: str, method: str, end: str) -> None:
    answer = api.http.request(method, f"/v1/videos/{bad}{end}")
    assert answer.status_code in (400, 404, 405)
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("quality", ["auto", "standard", "high", "hd"])
def test_names_that_change_nothing_are_taken(api: Any, quality: str) -> None:
    habits = {"n": 1, "user": "anna", "quality": quality, "extra_params": {}}
    plain, made = api.create(seed=1), api.create(seed=1, **habits)
    assert made["settings"] == plain["settings"]
    form = {"prompt": "a red circle", "seed": "1", "n": "1", "user": "anna", "quality": quality, "extra_params": "{}"}
    assert api.http.post("/v1/videos", data=form).json()["settings"] == plain["settings"]


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("n", 2, "num_videos_per_prompt"),
        ("n", True, "num_videos_per_prompt"),
        ("user", 7, "text"),
        ("quality", "low", "speed"),
        ("extra_params", {"seed": 7}, "fields of the body"),
    ],
)
def test_those_that_would_change_something_are_refused_with_what_to_use(
    api: Any, name: str, value: Any, hint: str
) -> None:
    error = api.refusal(**{name: value})
    assert error["param"] == name
    assert hint in error["message"]


def test_a_client_may_choose_a_webhook_on_an_allowed_host_only(make_api: Any) -> None:
    assert "hosts: none" in make_api().refusal(webhook_url="https://hooks.example.org/a")["message"]
    hooks = WebhookSettings(bytes(32), None, ("hooks.example.org",))
    api = make_api(ServerSettings(webhooks=hooks))
    assert api.refusal(webhook_url="https://10.0.0.1/a")["param"] == "webhook_url"
    api.create(webhook_url="https://hooks.example.org/a")
    api.finish()
    called: list[str] = []
    WebhookSender(api.store, hooks, lambda url, *_: called.append(url) or 200).send_due()
    assert called == ["https://hooks.example.org/a"]
