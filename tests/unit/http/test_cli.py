"""`wanduet serve`, `jobs` and `keys` as they are typed."""

import json
import socket
import sqlite3
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from wanduet.doors.cli.main import app
from wanduet.doors.cli.run import run
from wanduet.jobs.records import NewJob
from wanduet.jobs.store import JobStore


@pytest.fixture
def wanduet(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("WANDUET_DATA_DIR", str(tmp_path))
    monkeypatch.delenv("WANDUET_TEST_POSTGRES", raising=False)

    def call(*arguments: str, code: int = 0) -> str:
        assert run(app, arguments) == code
        return capsys.readouterr().out

    return call


@pytest.fixture
def job_id(store: JobStore) -> str:
    return store.submit(NewJob("local", "m", {"prompt": "a [red] fox", "seed": 1})).job.id


def test_list_show_cancel_and_remove(wanduet: Any, store: JobStore, job_id: str) -> None:
    assert "a [red] fox" in wanduet("jobs", "list")
    (listed,) = json.loads(wanduet("jobs", "list", "--json"))["jobs"]
    assert (listed["id"], listed["status"], listed["request"]["seed"]) == (job_id, "queued", 1)
    assert json.loads(wanduet("jobs", "list", "--status", "failed", "--json"))["jobs"] == []
    assert json.loads(wanduet("jobs", "show", job_id, "--json"))["files"] == []
    assert json.loads(wanduet("jobs", "cancel", job_id, "--json"))["error"]["code"] == "cancelled"
    assert "cancelled" in wanduet("jobs", "list")
    assert json.loads(wanduet("jobs", "rm", job_id, "--json")) == {"deleted": [job_id]}
    assert store.list().jobs == ()
    assert "No jobs" in wanduet("jobs", "list")


def test_the_video_that_a_job_starts_from_is_shown(wanduet: Any, store: JobStore, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"video")
    request = {"prompt": "x", "input_video": "sha256:0", "strength": 0.5}
    job = store.submit(NewJob("local", "m", request), None, clip).job
    shown = json.loads(wanduet("jobs", "show", job.id, "--json"))
    assert shown["request"] == request
    assert [Path(path).read_bytes() for path in shown["files"]] == [b"video"]


def test_a_list_can_be_read_and_copied_from(wanduet: Any, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    jobs = [store.submit(NewJob("local", "m", {"prompt": f"{n} \x1b[2J {'x' * 99}"})).job for n in range(3)]
    store.cancel(jobs[1].id)
    lines = wanduet("jobs", "list", "--limit", "2").splitlines()
    assert [line.split()[0] for line in lines] == ["id", jobs[2].id, jobs[1].id]
    assert all(line[lines[0].index("made") :].startswith("20") for line in lines[1:]), "columns"
    assert "\x1b" not in "".join(lines), "a prompt does not steer the terminal"
    for limit in ("0", "101", "-1"):
        wanduet("jobs", "list", "--limit", limit, code=2)
    shown = wanduet("jobs", "show", jobs[0].id)
    assert datetime.fromtimestamp(jobs[0].created_at).strftime("%Y-%m-%d %H:%M:%S") in shown
    assert "e+09" not in shown
    wanduet("jobs", "rm", jobs[0].id, "video_0", code=1)
    assert len(store.list().jobs) == 3, "none is deleted where one is not known"
    assert json.loads(wanduet("jobs", "rm", jobs[0].id, jobs[0].id, "--json")) == {"deleted": [jobs[0].id]}


def test_unknown_jobs_are_told(wanduet: Any) -> None:
    for command in ("show", "cancel", "rm"):
        out = wanduet("jobs", command, "video_0", "--json", code=1)
        assert json.loads(out)["error"]["code"] == "not_found"
    wanduet("jobs", "rm", code=2)


def test_keys(wanduet: Any, tmp_path: Path) -> None:
    made = json.loads(wanduet("keys", "add", "ann", "--json"))
    assert wanduet("keys", "add", "bob").startswith("wanduet-")
    assert [key["name"] for key in json.loads(wanduet("keys", "list", "--json"))["keys"]] == ["ann", "bob"]
    assert made["key"] not in (tmp_path / "keys.json").read_text()
    wanduet("keys", "rm", made["id"])
    assert "ann" not in wanduet("keys", "list")
    wanduet("keys", "rm", made["id"], code=2)


@pytest.mark.parametrize(
    "flags",
    [("--host", "0.0.0.0"), ("--port", "70000"), ("--parallel", "0"), ("--max-crashes", "0"), ("--disk-limit", "much")],
    ids=lambda flags: flags[0],
)
def test_serve_refuses_before_anything_is_started(wanduet: Any, flags: tuple[str, ...]) -> None:
    wanduet("serve", "--model", "miniature", *flags, code=2)


def test_serve_refuses_a_strange_database_before_a_model_is_fetched(
    wanduet: Any, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("wanduet.weights.hub.open_model", lambda *_: pytest.fail("this takes long"))
    assert run(app, ["serve", "--database-url", f"sqlite:///{tmp_path / 'other.sqlite3'}"]) == 2
    assert "does not exist, but" in capsys.readouterr().err


def test_serve_refuses_a_port_that_is_taken_before_a_worker_takes_jobs(
    wanduet: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("configure_logs", "configure_library_logs"):  # those of this process stay as they are
        monkeypatch.setattr(f"wanduet.doors.http.server.{name}", lambda: None)
    monkeypatch.setattr("wanduet.jobs.supervisor.WorkerProcess.start", lambda _: pytest.fail("it takes jobs"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert run(app, ["serve", "--model", "miniature", "--no-page", "--port", port]) == 2
    assert "Cannot listen" in capsys.readouterr().err


def test_a_data_folder_is_refused_to_a_strange_database_and_given_to_it_on_purpose(
    wanduet: Any, store: JobStore, job_id: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.claim("w", 30.0)
    work = store.files.work_path(job_id)
    work.parent.mkdir()
    work.write_bytes(b"half a video")
    other = f"sqlite:///{tmp_path / 'other.sqlite3'}"
    refused = json.loads(wanduet("jobs", "list", "--database-url", other, "--json", code=2))["error"]
    assert refused["code"] == "foreign_database"
    assert "wanduet jobs adopt" in refused["message"]
    assert work.exists()
    moved = json.loads(wanduet("jobs", "adopt", "--database-url", other, "--json"))
    assert moved == {"data_folder": str(tmp_path), "moved_to_trash": 1, "trash": str(tmp_path / "trash")}
    assert next((tmp_path / "trash").rglob("video.mp4")).read_bytes() == b"half a video"
    assert "No jobs" in wanduet("jobs", "list", "--database-url", other)
    wanduet("jobs", "list", code=2)


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\0" + b"\xff" * 9000])
def test_a_damaged_database_is_one_clear_line(
    wanduet: Any, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs.sqlite3").write_bytes(content)
    assert run(app, ("jobs", "list")) == 1
    said = capsys.readouterr().err
    assert "is damaged, or is no job database" in said
    assert "Traceback" not in said
    assert "report" not in said


def test_a_locked_database_is_read_and_named_when_it_must_be_written(
    wanduet: Any, store: JobStore, job_id: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if store.database.dialect.name != "sqlite":
        pytest.skip("SQLite's lock")
    monkeypatch.setattr("wanduet.jobs.store.LOCK_SECONDS", 0.1)
    with closing(sqlite3.connect(store.files.folder / "jobs.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert job_id in wanduet("jobs", "list")
        assert run(app, ("jobs", "cancel", job_id)) == 1
        said = capsys.readouterr().err
        assert "cannot be used just now: database is locked" in said
        assert "Traceback" not in said
