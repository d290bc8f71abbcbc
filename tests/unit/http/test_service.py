"""Around the protocol: keys, hosts, origins, bodies, overload, health, metrics."""

import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from wanduet.cluster.store import ClusterStore
from wanduet.doors.http.context import ServerSettings
from wanduet.doors.http.keys import KeyRing
from wanduet.doors.http.security import check_bind
from wanduet.errors import ConfigError, WanduetError
from wanduet.jobs.records import JobError, Limits, NewJob, StoreGoneError
from wanduet.jobs.store import JobStore
from wanduet.jobs.telemetry import Telemetry
from wanduet.meta.prices import Prices, Subject, store_prices
from wanduet.request import GenerationRequest


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys.json")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_are_kept_as_hashes_only(keys: KeyRing, tmp_path: Path) -> None:
    key = keys.add("laptop")
    assert key not in (tmp_path / "keys.json").read_text()
    assert key.removeprefix("wanduet-") not in (tmp_path / "keys.json").read_text()
    assert stat.S_IMODE(os.stat(tmp_path / "keys.json").st_mode) == 0o600
    (record,) = keys.records()
    assert keys.owner(key) == record.id
    assert keys.owner(key + "x") is None
    assert keys.owner("") is None


def test_keys_are_compared_in_constant_time(keys: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    made = [keys.add(f"{i}") for i in range(4)]
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(1) or real(a, b))
    for key in (*made, "wrong"):
        compared.clear()
        keys.owner(key)
        assert len(compared) == 4


def test_revoked_keys_stop_at_once(keys: KeyRing, make_api: Any) -> None:
    first, second = keys.add("a"), keys.add("b")
    api = make_api(keys=KeyRing(keys._path))
    assert api.http.get("/v1/videos", headers=bearer(first)).status_code == 200
    assert keys.remove(keys.records()[0].id)
    assert not keys.remove("nothing")
    assert api.http.get("/v1/videos", headers=bearer(first)).status_code == 401
    assert api.http.get("/v1/videos", headers=bearer(second)).status_code == 200


def test_removing_the_last_key_closes_the_server(keys: KeyRing, make_api: Any, tmp_path: Path) -> None:
    key = keys.add("a")
    api = make_api(keys=keys)
    keys.remove(keys.records()[0].id)
    assert api.http.get("/v1/videos", headers=bearer(key)).status_code == 401
    (tmp_path / "keys.json").unlink()
    assert api.http.get("/v1/videos").status_code == 401
    assert make_api(ServerSettings(host="0.0.0.0")).http.get("/v1/videos").status_code == 401


def test_too_many_streams_are_refused_and_ended_ones_make_room(make_api: Any) -> None:
    api = make_api(ServerSettings(max_streams=1, stream_poll_seconds=0.01))
    video_id = api.create()["id"]
    api.store.cancel(video_id)
    for _ in range(3):
        assert api.http.get(f"/v1/videos/{video_id}/events").status_code == 200
    with api.context.streams.enter():
        answer = api.http.get(f"/v1/videos/{video_id}/events")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_one_key_has_a_share_of_the_streams(keys: KeyRing, make_api: Any) -> None:
    ann, bob = keys.add("ann"), keys.add("bob")
    api = make_api(ServerSettings(max_streams=3, max_streams_per_key=2, stream_poll_seconds=0.01), keys=keys)
    videos = {}
    for key in (ann, bob):
        videos[key] = api.http.post("/v1/videos", json={"prompt": "x"}, headers=bearer(key)).json()["id"]
        api.store.cancel(videos[key])

    def look(key: str) -> Any:
        return api.http.get(f"/v1/videos/{videos[key]}/events", headers=bearer(key))

    owner = str(keys.owner(ann))
    with api.context.streams.enter(owner), api.context.streams.enter(owner):
        for _ in range(3):
            refused = look(ann)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "too_many_at_once"
        assert look(bob).status_code == 200
        with api.context.streams.enter("carl"):
            assert look(bob).status_code == 503
    assert look(ann).status_code == 200
    with api.context.streams.enter(), api.context.streams.enter(), api.context.streams.enter():
        assert look(ann).status_code == 503, "where no key is asked for there are no shares"


def test_jobs_of_other_doors_are_shown(api: Any) -> None:
    api.store.submit(NewJob("local", "m", {"prompt": "x", "num_frames": None, "fps": None}))
    (video,) = api.http.get("/v1/videos").json()["data"]
    assert (video["seconds"], video["size"], video["prompt"]) == ("", "", "x")


def test_a_damaged_key_file_closes_the_server(keys: KeyRing, make_api: Any, tmp_path: Path) -> None:
    key = keys.add("a")
    api = make_api(keys=keys)
    (tmp_path / "keys.json").write_text("{")
    assert api.http.get("/v1/videos").status_code == 401
    assert api.http.get("/v1/videos", headers=bearer(key)).status_code == 500
    with pytest.raises(ConfigError, match="keys"):
        make_api(keys=keys)


@pytest.mark.parametrize(
    "header", [{}, bearer("wrong"), bearer(""), {"Authorization": "Basic x"}, {"Authorization": "é".encode()}]
)
def test_without_a_key_nothing_is_told(keys: KeyRing, make_api: Any, header: dict[str, str]) -> None:
    keys.add("a")
    api = make_api(keys=keys)
    for method, path in (("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/v1/models"), ("GET", "/metrics")):
        answer = api.http.request(method, path, headers=header)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert api.http.get("/health").status_code == 200


def test_other_keys_videos_are_404(keys: KeyRing, make_api: Any) -> None:
    ann, bob = bearer(keys.add("ann")), bearer(keys.add("bob"))
    api = make_api(keys=keys)
    video_id = api.http.post("/v1/videos", json={"prompt": "x"}, headers=ann).json()["id"]
    for method, end in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/events"), ("POST", "/cancel")):
        assert api.http.request(method, f"/v1/videos/{video_id}{end}", headers=bob).status_code == 404
    assert api.http.post(f"/v1/videos/{video_id}/remix", json={"prompt": "y"}, headers=bob).status_code == 404
    assert api.http.get("/v1/videos", headers=bob).json()["data"] == []
    assert api.http.get(f"/v1/videos/{video_id}", headers=ann).json()["status"] == "queued"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_other_machines_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="API key"):
        check_bind(host, has_keys=False)
    check_bind(host, has_keys=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_this_machine_needs_none(host: str) -> None:
    check_bind(host, has_keys=False)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("192.168.1.5", 200),
        ("videos.example.org", 200),
        ("evil.example.com", 400),
        ("localhost.evil.com", 400),
        ("127.0.0.1.evil.com", 400),
        ("user@localhost", 400),
        ("localhost/x", 400),
        ("localhost:x", 400),
        ("", 400),
    ],
)
def test_hosts(make_api: Any, host: str, status: int) -> None:
    api = make_api(ServerSettings(allowed_hosts=("videos.example.org",)))
    assert api.http.get("/v1/videos", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://127.0.0.1:8000", 200),
        ("https://page.example.org", 200),
        ("http://127.0.0.1:9000", 403),
        ("http://evil.example.com", 403),
        ("null", 403),
        ("file://127.0.0.1:8000", 403),
    ],
)
def test_origins_of_writes(make_api: Any, origin: str | None, status: int) -> None:
    api = make_api(ServerSettings(allowed_origins=("https://page.example.org",)))
    headers = {} if origin is None else {"Origin": origin}
    answer = api.http.post("/v1/videos", json={"prompt": "x"}, headers=headers)
    assert answer.status_code == status
    assert len(api.store.list().jobs) == (status == 200)
    assert "access-control-allow-origin" not in answer.headers
    assert api.http.get("/v1/videos", headers=headers).status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b"])
def test_long_bodies_are_cut_off(make_api: Any, streamed: bool, kind: str) -> None:
    api = make_api(ServerSettings(max_body_bytes=1000))
    sent = []

    def body() -> Iterator[bytes]:
        yield b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\n'
        for _ in range(100):
            sent.append(1)
            yield b"x" * 100

    content = body() if streamed else b"".join(body())
    answer = api.http.post("/v1/videos", content=content, headers={"content-type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert api.store.list().jobs == ()


@pytest.mark.parametrize("length", ["-1", "x", "9" * 30])
def test_lengths_that_are_none(api: Any, length: str) -> None:
    answer = api.http.post("/v1/videos", content=b"{}", headers={"content-length": length})
    assert answer.status_code in (400, 413)


@pytest.mark.parametrize(("limits", "status"), [(Limits(queue=3), 503), (Limits(per_owner=3), 429)])
def test_a_full_queue_refuses_before_it_stores(make_api: Any, limits: Limits, status: int) -> None:
    api = make_api(ServerSettings(queue=limits))
    answers = [api.http.post("/v1/videos", json={"prompt": "x"}) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 3 + [status] * 2
    assert int(answers[-1].headers["retry-after"]) > 0
    assert answers[-1].json()["error"]["code"] == "queue_full"
    assert len(api.store.list().jobs) == 3


def test_successes_equal_rows_under_overload(make_api: Any) -> None:
    api = make_api(ServerSettings(max_submissions=8, queue=Limits(queue=60)))
    with api.http, ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda i: api.http.post("/v1/videos", json={"prompt": f"job {i}"}), range(200)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 503}
    assert 8 <= statuses.count(200) == len(api.store.list(limit=100).jobs) <= 60
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)


def test_one_key_many_times_at_once_is_one_job(api: Any) -> None:
    headers = {"Idempotency-Key": "k"}
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(lambda _: api.http.post("/v1/videos", json={"prompt": "x"}, headers=headers), range(50))
        )
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["id"] for answer in answers}) == len(api.store.list().jobs) == 1


def test_a_full_disk_is_503_and_stores_nothing(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))

    with monkeypatch.context() as patch:
        patch.setattr(JobStore, "submit", full)
        answer = api.http.post("/v1/videos", json={"prompt": "a secret"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")
    assert "retry-after" in answer.headers
    assert "secret" not in answer.text
    assert api.create()["status"] == "queued"


def test_bugs_tell_nothing(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise RuntimeError("/home/someone/secret")

    monkeypatch.setattr(JobStore, "list", bug)
    answer = api.http.get("/v1/videos")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text


def test_health_and_ready(make_api: Any) -> None:
    worker = Worker()
    worker.trouble = None
    api = make_api(worker=worker)
    assert (api.http.get("/health").json()["status"], api.http.get("/ready").status_code) == ("ok", 200)
    worker.trouble = Worker.trouble
    assert (api.http.get("/ready").status_code, api.http.get("/ready").json()["status"]) == (503, "no worker")
    worker.trouble = None
    api.context.draining.set()
    assert api.http.get("/ready").json()["status"] == "draining"
    assert api.http.get("/health").status_code == 200
    answer = api.http.post("/v1/videos", json={"prompt": "x"})
    assert (answer.status_code, "retry-after" in answer.headers, api.store.list().jobs) == (503, True, ())


def test_head_is_get_without_the_body(api: Any) -> None:
    video_id = api.create()["id"]
    for path in (
        "/health",
        "/ready",
        "/metrics",
        "/v1/models",
        "/v1/videos",
        f"/v1/videos/{video_id}",
        "/openapi.json",
    ):
        head, get = api.http.head(path), api.http.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"") == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    assert api.http.head("/v1/videos/nothing").status_code == 404
    assert api.http.head(f"/v1/videos/{video_id}/events").status_code == 405, "it would never end"
    assert 'method="HEAD",route="/v1/videos/{video_id}",status="200"' in api.http.get("/metrics").text


def test_models(api: Any) -> None:
    assert [model["id"] for model in api.http.get("/v1/models").json()["data"]] == ["Wan2.1-T2V-1.3B"]
    assert api.http.get("/v1/models/Wan2.1-T2V-1.3B").json()["object"] == "model"
    assert api.http.get("/v1/models/other/one").status_code == 404


def test_a_model_has_the_prices_that_were_measured_of_it(api: Any) -> None:
    spec = api.context.spec
    resolved = GenerationRequest(prompt="x", seed=1).resolve(spec)
    for name in (spec.name, "another"):
        subject = Subject.of(resolved, {"name": name, "hash": None}, "a card", {})
        about = {"name": name, "card": "a card", "request": {"height": 480}, "versions": dict(subject.versions)}
        rows = {'{"guidance_gate": 0.5}': {"0": {"forwards": 75, "seconds": 2.5, "psnr": 30.0}}}
        store_prices(api.store.files.folder / "measurements", subject, Prices(about, rows))
    ((one,),) = [model["prices"] for model in api.http.get("/v1/models").json()["data"]]
    assert (one["card"], one["settings"]) == ("a card", {"height": 480})
    (cost,) = one["costs"]
    assert (cost["settings"], cost["forwards"]) == ({"guidance_gate": 0.5}, 75)
    assert cost["psnr"] == {"median": 30.0, "worst": 30.0}
    assert api.http.get(f"/v1/models/{spec.name}").json()["prices"] == [one]


def test_metrics(api: Any) -> None:
    api.create()
    api.finish()
    api.create()
    api.store.fail(api.claim(), JobError("out_of_memory", "x"))
    api.create()
    api.http.get("/v1/videos/video_" + "0" * 32)
    text = api.http.get("/metrics").text
    for line in (
        'wanduet_jobs{status="queued"} 1.0',
        'wanduet_jobs{status="completed"} 1.0',
        'wanduet_failed_jobs{code="out_of_memory"} 1.0',
        'wanduet_submissions_total{outcome="stored"} 3.0',
        'wanduet_stage_jobs_total{stage="queue"} 1.0',
        "wanduet_denoise_steps_total 0.0",
        "wanduet_denoise_steps_seconds_total 0.0",
        'status="404"',
    ):
        assert line in text
    assert "video_000" not in text, "ids make no series"
    assert 'stage="steps"' not in text


def test_a_keys_metrics_are_its_own(keys: KeyRing, make_api: Any, store: JobStore) -> None:
    ann, bob = bearer(keys.add("ann")), bearer(keys.add("bob"))
    api = make_api(keys=keys)
    Telemetry(store.files.workers, "elsewhere.1.a", lambda: {"cuda:0": {"allocated": 1}}).publish()
    for prompt in ("x", "y"):
        api.http.post("/v1/videos", json={"prompt": prompt}, headers=ann)
    api.store.fail(api.claim(), JobError("out_of_memory", "x"))
    api.http.head("/v1/videos", headers=ann)
    assert api.http.get("/v1/videos").status_code == 401
    mine, others = (api.http.get("/metrics", headers=headers).text for headers in (ann, bob))
    for line in (
        'wanduet_jobs{status="queued"} 1.0',
        'wanduet_failed_jobs{code="out_of_memory"} 1.0',
        'wanduet_submissions_total{outcome="stored"} 2.0',
        'wanduet_http_requests_total{method="POST",route="/v1/videos",status="200"} 2.0',
        'wanduet_http_requests_total{method="HEAD",route="/v1/videos",status="200"} 1.0',
    ):
        assert line in mine
        assert line not in others
    assert 'wanduet_jobs{status="queued"} 0.0' in others
    for text in (mine, others):
        for secret in ("elsewhere", "wanduet_stage", 'status="401"'):
            assert secret not in text
    operator = bearer(keys.add("prometheus", operator=True))
    everybodys = api.http.get("/metrics", headers=operator).text
    assert api.http.get("/v1/videos", headers=operator).json()["data"] == []
    assert 'wanduet_jobs{status="queued"} 1.0' in everybodys
    assert "elsewhere" in everybodys


def test_metrics_show_the_memory_of_the_workers_devices(api: Any) -> None:
    assert "wanduet_device_memory_bytes{" not in api.http.get("/metrics").text
    told = {"cuda:0": {"allocated": 3 * 2**30, "reserved": 4 * 2**30}}
    Telemetry(api.store.files.workers, "elsewhere.1.a", lambda: told).publish()
    text = api.http.get("/metrics").text
    assert 'wanduet_device_memory_bytes{device="cuda:0",host="elsewhere",kind="allocated"} 3.221225472e+09' in text


def test_unknown_paths_and_methods(api: Any) -> None:
    for method, path, status in (("GET", "/nothing", 404), ("PUT", "/v1/videos", 405), ("GET", "/redoc", 404)):
        answer = api.http.request(method, path)
        assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})


def test_a_refused_method_is_answered_with_all_that_the_path_takes(api: Any) -> None:
    video = "/v1/videos/video_" + "0" * 32
    for path, methods in (
        ("/v1/videos", "GET, HEAD, POST"),
        (video, "GET, HEAD, DELETE"),
        (f"{video}/content", "GET, HEAD"),
        (f"{video}/events", "GET"),
        (f"{video}/cancel", "POST"),
        (f"{video}/remix", "POST"),
        ("/v1/models/a/b", "GET, HEAD"),
        ("/health", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
    ):
        for method in ("PUT", "OPTIONS", "TRACE"):
            answer = api.http.request(method, path)
            assert (answer.status_code, answer.headers["allow"]) == (405, methods)
            assert answer.json()["error"]["code"] == "method_not_allowed"
    assert api.http.head(f"{video}/events").headers["allow"] == "GET"
    assert api.http.head(f"{video}/cancel").headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("code", "status"),
    [("store_damaged", 500), ("store_read_only", 503), ("store_gone", 503), ("store_broken", 503)],
)
def test_faults_of_the_store_are_named(api: Any, monkeypatch: pytest.MonkeyPatch, code: str, status: int) -> None:
    class BrokenStoreError(WanduetError, SQLAlchemyError):
        pass

    BrokenStoreError.code = code

    def broken(*_: Any, **__: Any) -> None:
        raise BrokenStoreError("The database /srv/data/jobs.sqlite3 is damaged.", hint="Restore a copy of it.")

    monkeypatch.setattr(JobStore, "get", broken)
    monkeypatch.setattr(JobStore, "list", broken)
    for path in ("/v1/videos", "/v1/videos/video_" + "0" * 32, "/ready"):
        answer = api.http.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.json()["error"]["message"] == "The database jobs.sqlite3 is damaged. Restore a copy of it."
        assert "retry-after" not in answer.headers, "waiting does not mend it"


def test_the_schema_names_every_field(api: Any) -> None:
    schema = api.http.get("/openapi.json").json()
    body = schema["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    assert set(body) == {"multipart/form-data", "application/json"}
    assert {"prompt", "seconds", "size", "seed", "flow_shift"} <= set(body["application/json"]["schema"]["properties"])
    json.dumps(schema)


def test_readiness_names_a_lost_store_and_not_the_worker_that_ended_with_it(
    make_api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_api(worker=Worker())

    def gone(*_: Any, **__: Any) -> None:
        raise StoreGoneError("data is gone.", hint="Put it back.")

    monkeypatch.setattr(JobStore, "list", gone)
    answer = api.http.get("/ready")
    assert (answer.status_code, answer.json().get("error", {}).get("code")) == (503, "store_gone")


class Worker:
    """What a server sees of the process beside it."""

    restarts, hangs = 3, 1
    trouble: str | None = "the worker hung and was ended; another is starting"


def test_readiness_and_metrics_say_how_the_worker_is(make_api: Any) -> None:
    worker = Worker()
    api = make_api(worker=worker)
    answer = api.http.get("/ready")
    assert (answer.status_code, answer.json()["status"], answer.json()["reason"]) == (503, "no worker", worker.trouble)
    metrics = api.http.get("/metrics").text
    assert "wanduet_worker_hangs_total 1.0" in metrics
    assert "wanduet_worker_restarts_total 3.0" in metrics
    assert "wanduet_worker_ready 0.0" in metrics
    worker.trouble = None
    assert (api.http.get("/ready").status_code, "reason" in api.http.get("/ready").json()) == (200, False)
    assert "wanduet_worker_ready 1.0" in api.http.get("/metrics").text


def test_jobs_are_accepted_for_the_served_weights(make_api: Any) -> None:
    api = make_api(ServerSettings(model_hash="1" * 64))
    made = api.create()
    assert api.store.get(made["id"]).model_hash == "1" * 64
    source = api.finish().id
    remix = api.http.post(f"/v1/videos/{source}/remix", json={"prompt": "a blue square"}).json()
    assert api.store.get(remix["id"]).model_hash == "1" * 64


def test_a_remix_of_another_models_video_is_refused(make_api: Any) -> None:
    api = make_api(ServerSettings(model_hash="1" * 64))
    request = api.store.get(api.create()["id"]).request
    theirs = api.store.submit(NewJob("local", "theirs", request, model_hash="2" * 64)).job.id
    renamed = api.store.submit(NewJob("local", "./ours", request, model_hash="1" * 64)).job.id
    answer = api.http.post(f"/v1/videos/{theirs}/remix", json={"prompt": "a blue square"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "model_changed")
    assert api.http.post(f"/v1/videos/{renamed}/remix", json={"prompt": "a blue square"}).status_code == 200


def test_a_queued_video_says_what_it_waits_for(make_api: Any) -> None:
    api = make_api()
    video = api.create()
    assert "waits_for" not in video
    with closing(ClusterStore(api.store.files)) as cluster:
        (group,) = cluster.waiting()
        cluster.explain(group.demand, "Replicas want GPUs.")
        assert api.http.get(f"/v1/videos/{video['id']}").json()["waits_for"] == "Replicas want GPUs."
        cluster.explain_none()
    assert "waits_for" not in api.http.get(f"/v1/videos/{video['id']}").json()


def test_a_queued_video_says_why_no_worker_takes_it(make_api: Any) -> None:
    worker = Worker()
    api = make_api(worker=worker)
    with api.http:
        video = api.create()
        one = api.http.get(f"/v1/videos/{video['id']}").json()
        (listed,) = api.http.get("/v1/videos").json()["data"]
        assert video["waits_for"] == one["waits_for"] == listed["waits_for"] == worker.trouble
        worker.trouble = None
        assert "waits_for" not in api.http.get(f"/v1/videos/{video['id']}").json()
        worker.trouble = "the worker is starting"
        api.claim()
        assert "waits_for" not in api.http.get(f"/v1/videos/{video['id']}").json()
