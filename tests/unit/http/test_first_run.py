"""A server whose model is not on this machine yet."""

import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from wanduet.config import EngineConfig
from wanduet.doors.http.context import ServerSettings
from wanduet.doors.http.keys import KEYS_FILE, KeyRing
from wanduet.doors.page import fetching
from wanduet.doors.page.fetching import Fetch
from wanduet.doors.page.first_run import first_run_app, is_missing
from wanduet.jobs.store import JobStore

MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
# Adds 1000 bytes to a file that is not whole, as the hub's client does, and ends once it may.
DOWNLOAD = """
import pathlib, sys, time
blob, end = map(pathlib.Path, sys.argv[1:])
blob.parent.mkdir(parents=True, exist_ok=True)
with open(blob, "ab") as file:
    file.write(bytes(1000))
while not end.exists():
    time.sleep(0.01)
"""
REFUSED = {"error": {"message": "The hub has no model x.\n  Is there a network?", "code": "model_not_found"}}


class FirstRun:
    """A client of the server; `done` is set once the model is there, and `chosen` is the one that was taken instead."""

    def __init__(self, store: JobStore, *command: str) -> None:
        self.done, self.chosen = threading.Event(), list[str]()
        config = EngineConfig(model=MODEL, data_dir=store.files.folder)
        self.fetch = Fetch(config, self.done.set, [sys.executable, "-c", *command])
        app = first_run_app(store, ServerSettings(), self.fetch, self.chosen.append)
        self.http = TestClient(app, base_url="http://127.0.0.1:8000", follow_redirects=False)

    def act(self, what: str, **query: str) -> dict[str, Any]:
        return self.http.post(f"/page/model/{what}", params=query).json()

    def wait(self, **wanted: Any) -> dict[str, Any]:
        """The state once it has these values; a test that never gets there fails by its time limit."""
        while True:
            state = self.http.get("/page/model").json()
            if wanted.items() <= state.items():
                return state


@pytest.fixture
def blob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is not whole, in an empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}" / "blobs" / "x.incomplete"


@pytest.fixture
def first(store: JobStore, blob: Path, tmp_path: Path) -> Iterator[FirstRun]:
    first = FirstRun(store, DOWNLOAD, str(blob), str(tmp_path / "end"))
    yield first
    first.fetch.stop()


def test_until_there_is_a_model_the_api_says_that_there_is_none(first: FirstRun) -> None:
    refused = first.http.post("/v1/videos", json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "no_model")
    assert f"{MODEL} is not on this machine yet." in refused.json()["error"]["message"]
    assert first.http.get("/v1/models").status_code == 503
    ready = first.http.get("/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, f"{MODEL} is not on this machine yet.")
    assert [first.http.get(path).status_code for path in ("/health", "/metrics")] == [200, 200]
    assert "first.js" in first.http.get("/").text
    assert first.http.get("/page/first.js").status_code == 200


def test_a_download_is_stopped_goes_on_where_it_was_and_ends(first: FirstRun, tmp_path: Path) -> None:
    state = first.http.get("/page/model").json()
    assert (state["bytes"], state["running"]) == (0, False)
    first.act("fetch", form="full")
    begun = first.wait(bytes=1000)
    assert (begun["total"], begun["running"]) == (28928887859, True)
    assert "being fetched" in first.http.get("/ready").json()["reason"]
    assert first.act("fetch")["running"]
    assert not first.act("stop")["running"]
    assert first.http.get("/page/model").json() == {**begun, "running": False}
    first.act("fetch")
    first.wait(bytes=2000)
    (tmp_path / "end").touch()
    first.wait(done=True, running=False, error=None)
    assert first.done.wait(60)
    assert not first.act("fetch")["running"], "there is nothing left to fetch"


def test_the_smallest_form_is_offered_first_and_the_one_that_was_chosen_is_fetched(
    store: JobStore, blob: Path, tmp_path: Path
) -> None:
    asked = tmp_path / "asked"
    first = FirstRun(
        store, f"import pathlib, sys; pathlib.Path({str(asked)!r}).write_text(str(sys.argv[1:])); sys.exit(1)"
    )
    state = first.http.get("/page/model").json()
    sizes = {form["name"]: form["total"] for form in state["forms"]}
    assert sizes == {"full": 28928887859, "bf16": 17_600_000_000, "comfy": 9_800_000_000}
    assert (state["form"], state["total"]) == ("comfy", 9_800_000_000)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(bytes(7))
    state = first.http.get("/page/model").json()
    assert (state["form"], state["bytes"]) == ("full", 7), "it has begun"
    for form, flags in {"bf16": ["--form", "bf16"], "full": []}.items():
        assert first.act("fetch", form=form)["form"] == form
        first.wait(running=False, form=form)
        assert asked.read_text() == str(flags)
    assert first.act("fetch", form="int4")["error"]["param"] == "form"


def test_a_form_that_shares_its_repository_counts_its_own_files_and_a_revision_has_one_form(
    store: JobStore, blob: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "hub" / "models--Comfy-Org--Wan_2.1_ComfyUI_repackaged" / "snapshots" / "x" / "split_files"
    for name in ("vae/wan_2.1_vae.safetensors", "diffusion_models/wan2.1_i2v_480p_14B_fp16.safetensors"):
        (snapshot / name).parent.mkdir(parents=True)
        (snapshot / name).write_bytes(bytes(5))
    state = FirstRun(store, "").http.get("/page/model").json()
    assert [form["bytes"] for form in state["forms"] if form["name"] == "comfy"] == [5]
    fixed = Fetch(EngineConfig(model=MODEL, revision="a1"), lambda: None)
    assert [form["name"] for form in fixed.state()["forms"]] == ["full"]


def test_why_a_download_failed_is_shown_and_it_may_be_tried_again(store: JobStore, blob: Path) -> None:
    first = FirstRun(store, f"print({json.dumps(json.dumps(REFUSED))}); raise SystemExit(1)")
    for _ in range(2):
        first.act("fetch")
        assert first.wait(running=False)["error"] == "The hub has no model x."
        assert first.http.get("/ready").json()["reason"].endswith("yet. The hub has no model x.")
    assert not first.done.is_set()


def test_a_server_without_a_person_tries_again_by_itself(
    store: JobStore, blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "RETRY_SECONDS", 0.01)
    tried = tmp_path / "tried"
    script = f"import os; os.path.exists({str(tried)!r}) or (open({str(tried)!r}, 'x'), os._exit(1))"
    first = FirstRun(store, script)
    first.fetch.start(retry=True)
    assert first.done.wait(60)
    assert first.fetch.state()["error"] is None


def test_the_miniature_instead_is_for_the_person_at_the_machine(first: FirstRun, store: JobStore) -> None:
    first.act("fetch")
    first.wait(bytes=1000)
    assert not first.act("miniature")["running"]
    assert first.chosen == ["miniature"]

    key = KeyRing(store.files.folder / KEYS_FILE).add("ann")
    shared = FirstRun(store, "")
    assert shared.http.get("/page/model").status_code == 401
    assert shared.http.get("/").headers["location"] == "/login"
    shared.http.headers["Authorization"] = f"Bearer {key}"
    assert not shared.http.get("/page/model").json()["miniature"]
    assert shared.http.post("/page/model/miniature").status_code == 403
    assert shared.chosen == []


def test_which_models_are_missing(blob: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_missing(EngineConfig(model=MODEL, data_dir=tmp_path))
    assert not is_missing(EngineConfig(model="miniature", data_dir=tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not is_missing(EngineConfig(model=MODEL, data_dir=tmp_path)), "nothing may be fetched: the command says so"
