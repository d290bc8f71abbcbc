"""What leaves the server says nothing of where things lie on its machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from wanduet.doors.http.public import public_text, sendable
from wanduet.doors.page import words
from wanduet.errors import WeightsError
from wanduet.jobs.records import JobError, NewJob
from wanduet.weights.hub import local_model

MODEL = Path(__file__).parents[3] / "src" / "wanduet" / "miniature" / "model"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("/srv/models/wan/vae/a.safetensors is damaged.", "a.safetensors is damaged."),
        ("There is no folder /srv/models/my wan.", "There is no folder my wan."),
        ("Cannot read '/srv/my models/wan 2/a.safetensors': it ends.", "Cannot read 'a.safetensors': it ends."),
        ('[Errno 2] No such file: "/a/b"', '[Errno 2] No such file: "b"'),
        ("(/home/ann/.cache/hub/x.json)", "(x.json)"),
        ("see ~/models/x and ../secret/y, ./z/w", "see x and y, w"),
        (r"C:\Users\ann\wan\vae.safetensors is damaged", "vae.safetensors is damaged"),
        (r"cannot read '\\server\share\wan\x.bin'", "cannot read 'x.bin'"),
        ("D:/models/wan/x.bin", "x.bin"),
        ("file:///srv/models/x", "x"),
        ("path=/srv/models/wan, 3 of 4", "path=wan, 3 of 4"),
        ("path:/srv/models/wan", "path:wan"),
        ("cannot open sqlite:////data/jobs.sqlite3", "cannot open jobs.sqlite3"),
        ("//server/share/x", "x"),
        ("the folder /srv/models/", "the folder models"),
        (
            "Fetch it from https://huggingface.co/a/b or Wan-AI/Wan2.1.",
            "Fetch it from https://huggingface.co/a/b or Wan-AI/Wan2.1.",
        ),
        ("12/50 steps, and/or 3 GiB / 4 GiB, 1920x1088/81", "12/50 steps, and/or 3 GiB / 4 GiB, 1920x1088/81"),
        ("Step 3: NaN.", "Step 3: NaN."),
    ],
)
def test_paths_become_names(text: str, told: str) -> None:
    assert public_text(text) == told


def test_every_text_can_be_sent_and_is_short() -> None:
    assert sendable("a\ud800b") == r"a\ud800b"
    assert len(public_text("x" * 10_000)) < 700
    assert len(public_text("/x" * 10_000)) < 700


def test_a_failed_job_tells_a_name_on_the_wire_and_on_the_page(api: Any) -> None:
    error = WeightsError("/srv/models/wan/vae/x.safetensors is damaged.", hint="Fetch /srv/models/wan again.")
    video_id = api.create()["id"]
    api.store.fail(api.claim(), JobError(error.code, str(error)))
    answers = [
        api.http.get(f"/v1/videos/{video_id}").text,
        api.http.get("/v1/videos").text,
        api.http.get(f"/v1/videos/{video_id}/events").text,
        json.dumps(words.card(api.store.get(video_id))),
    ]
    for text in answers:
        assert "/srv" not in text
    assert all("x.safetensors is damaged" in text for text in (answers[0], answers[3]))
    assert "/srv/models" in str(api.store.get(video_id).error), "the operator sees it on the command line"


def test_a_model_in_a_folder_has_a_name_and_no_path(tmp_path: Path, make_api: Any) -> None:
    folder = tmp_path / "my-wan"
    folder.symlink_to(MODEL, target_is_directory=True)
    linked, found = local_model(str(folder)), local_model(f"{MODEL}/")
    assert linked is not None
    assert found is not None
    assert (linked.name, found.name, found.spec.name) == ("my-wan", "model", "model")
    api = make_api()
    api.context.spec = found.spec
    old = api.store.submit(NewJob("local", str(MODEL), {"prompt": "x"})).job.id
    texts = [api.http.get(path).text for path in ("/v1/models", f"/v1/videos/{old}", "/v1/models/other")]
    texts.append(api.http.post("/v1/videos", json={"prompt": "x", "model": "other"}).text)
    assert not any(str(MODEL.parent) in text for text in texts)
    assert json.loads(texts[0])["data"][0]["id"] == json.loads(texts[1])["model"] == "model"
