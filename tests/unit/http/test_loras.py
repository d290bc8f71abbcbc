"""LoRA over HTTP: what the folder has, how requests name it, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from safetensors.numpy import save_file

from wanduet.config import EngineConfig
from wanduet.doors.cli.options import lora_folder
from wanduet.doors.http.context import ServerSettings
from wanduet.doors.http.schemas import RequestLimits
from wanduet.doors.page.actions import PageActions
from wanduet.doors.page.forms import SIZE
from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.jobs.attempt import AttemptSettings
from wanduet.jobs.runner import Runner, RunnerSettings
from wanduet.jobs.store import JobStore
from wanduet.planning.hardware import detect
from wanduet.runtime.models import Models
from wanduet.weights.manifest import file_sha256

STYLE = "style.safetensors"
WHOLE = {"name": STYLE, "strength": 1.0}


def write_lora(path: Path, *, dim: int = 1536, blocks: int = 2, rank: int = 2, value: float = 0.5) -> Path:
    tensors = {}
    for block in range(blocks):
        name = f"diffusion_model.blocks.{block}.self_attn.q"
        tensors[f"{name}.lora_A.weight"] = np.full((rank, dim), value, np.float32)
        tensors[f"{name}.lora_B.weight"] = np.full((dim, rank), value, np.float32)
        tensors[f"{name}.alpha"] = np.array(rank / 2, np.float32)
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "loras"
    write_lora(folder / STYLE)
    write_lora(folder / "Motion.safetensors", value=0.25)
    write_lora(folder / "large.safetensors", dim=5120)
    write_lora(folder / "my_causvid_rank32.safetensors")
    return folder


@pytest.fixture
def served(make_api: Callable[..., Any], folder: Path) -> Any:
    api = make_api(ServerSettings(lora_dir=folder, stream_poll_seconds=0.01))
    with api.http:
        yield api


def loras(api: Any, **fields: Any) -> list[dict[str, Any]]:
    return api.create(**fields)["loras"]


def test_the_list_says_what_each_file_is(served: Any, folder: Path) -> None:
    (folder / ".hidden.safetensors").write_bytes(b"")
    (folder / "notes.txt").write_text("not one")
    (folder / "broken.safetensors").write_bytes(b"\0" * 20)
    peft = write_lora(folder / "peft" / "adapter_model.safetensors")
    (peft.parent / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    (folder / "empty").mkdir()
    answer = served.http.get("/v1/loras").json()
    assert answer["object"] == "list"
    found = {one["name"]: one for one in answer["data"]}
    assert sorted(found) == [
        "Motion.safetensors", "broken.safetensors", "large.safetensors", "my_causvid_rank32.safetensors", "peft", STYLE
    ]  # fmt: skip
    style = found[STYLE]
    assert (style["bytes"], style["kinds"], style["rank"], style["alpha"]) == (
        (folder / STYLE).stat().st_size, ["lora"], [2, 2], [1.0, 1.0],
    )  # fmt: skip
    assert (style["targets"], style["blocks"], style["hidden_size"]) == ({"self_attn.q": 2}, 2, 1536)
    assert (style["fits"], style["problem"], style["few_step"], style["sha256"]) == (True, None, None, None)
    assert (found["peft"]["fits"], found["peft"]["bytes"] > 0) == (True, True)
    few = found["my_causvid_rank32.safetensors"]["few_step"]
    assert (few["sampler"], few["num_inference_steps"], few["guidance_scale"]) == ("euler", 8, 1.0)
    assert found["large.safetensors"]["fits"] is False
    assert "5120" in found["large.safetensors"]["problem"]
    assert "1536" in found["large.safetensors"]["problem"]
    assert found["broken.safetensors"]["fits"] is False
    assert str(folder) not in json.dumps(answer)


def test_the_list_follows_the_folder(served: Any, folder: Path) -> None:
    def shown() -> dict[str, Any]:
        return {one["name"]: one for one in served.http.get("/v1/loras").json()["data"]}

    assert shown()[STYLE]["rank"] == [2, 2]
    served.create(loras=[STYLE])
    assert shown()[STYLE]["sha256"] == file_sha256(folder / STYLE)
    write_lora(folder / STYLE, rank=3)
    assert (shown()[STYLE]["rank"], shown()[STYLE]["sha256"]) == ([3, 3], None)
    (folder / STYLE).unlink()
    assert STYLE not in shown()


BODIES: dict[str, dict[str, Any]] = {
    "objects": {"json": {"loras": [{"name": STYLE, "strength": 0.8}]}},
    "texts": {"json": {"loras": [f"{STYLE}:0.8"]}},
    "one text": {"json": {"loras": f"{STYLE}:0.8"}},
    "vLLM-Omni": {"json": {"lora": {"name": STYLE, "scale": 0.8, "int_id": 3, "path": None}}},
    "vLLM-Omni's aliases": {"json": {"lora": {"lora_name": STYLE, "lora_scale": 0.8}}},
    "LightX2V": {"json": {"lora_name": STYLE, "lora_strength": 0.8}},
    "a form with JSON": {"data": {"loras": json.dumps([{"name": STYLE, "strength": 0.8}])}},
    "a form with a text": {"data": {"loras": f"{STYLE}:0.8"}},
    "a form of LightX2V": {"data": {"lora_name": STYLE, "lora_strength": "0.8"}},
    "a multipart form": {"files": {"loras": (None, f"{STYLE}:0.8")}},
    "OpenAI's client, a list": {"files": {"loras[][name]": (None, STYLE), "loras[][strength]": (None, "0.8")}},
    "OpenAI's client, texts": {"files": {"loras[]": (None, f"{STYLE}:0.8")}},
    "OpenAI's client, an object": {"files": {"lora[name]": (None, STYLE), "lora[scale]": (None, "0.8")}},
}


def test_every_spelling_is_the_same_request(served: Any, folder: Path) -> None:
    """The idempotency key would refuse a request that differs."""
    once, prompt = {"Idempotency-Key": "one"}, {"prompt": "a red circle"}
    answers = {}
    for name, body in BODIES.items():
        kind, fields = next(iter(body.items()))
        fields = ({"prompt": (None, prompt["prompt"])} if kind == "files" else prompt) | fields
        answers[name] = served.http.post("/v1/videos", headers=once, **{kind: fields}).json()
    assert {name: answer.get("id") for name, answer in answers.items()} == dict.fromkeys(BODIES, answers["texts"]["id"])
    expected = {"name": STYLE, "strength": 0.8, "sha256": file_sha256(folder / STYLE)}
    assert answers["texts"]["loras"] == [expected]


def test_several_with_shares_of_the_steps(served: Any, folder: Path) -> None:
    part = {"name": "Motion.safetensors", "strength": -0.5, "start": 0.25, "end": 0.75}
    motion = {**part, "sha256": file_sha256(folder / "Motion.safetensors")}
    style = {**WHOLE, "sha256": file_sha256(folder / STYLE)}
    assert loras(served, loras=[part, STYLE]) == [motion, style]
    for form in (
        {"loras": ["Motion.safetensors:-0.5@0.25-0.75", STYLE]},
        {"loras[][name]": ["Motion.safetensors", STYLE], "loras[][strength]": ["-0.5", "1"],
         "loras[][start]": ["0.25", "0"], "loras[][end]": ["0.75", "1"]},
    ):  # fmt: skip
        answer = served.http.post("/v1/videos", data={"prompt": "x", **form})
        assert answer.json()["loras"] == [motion, style]
    assert "loras" not in served.create()
    assert "loras" not in served.create(loras=[])


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"loras": ["styl.safetensors"]}, "loras", ["Nearest allowed: style.safetensors"]),
        ({"loras": ["MOTION.safetensors"]}, "loras", ["Nearest allowed: Motion.safetensors"]),
        ({"loras": ["zzz"]}, "loras", ["no LoRA of that name", "GET /v1/loras"]),
        ({"loras": ["large.safetensors"]}, "loras", ["5120", "1536", "14B"]),
        ({"loras": ["../style.safetensors"]}, "loras", ["paths and addresses are not taken"]),
        ({"loras": ["/etc/passwd"]}, "loras", ["paths and addresses are not taken"]),
        ({"loras": ["sub\\style.safetensors"]}, "loras", ["paths and addresses are not taken"]),
        ({"loras": ["C:style.safetensors"]}, "loras", ["paths and addresses are not taken"]),
        ({"loras": [{"name": "https://example.org/a.safetensors"}]}, "loras", ["paths and addresses are not taken"]),
        ({"loras": [".."]}, "loras", ["paths and addresses are not taken"]),
        ({"loras": ["style.safetensors\0"]}, "loras", ["paths and addresses are not taken"]),
        ({"loras": ["\ud800"]}, "loras", ["name: ", "unicode"]),
        ({"lora": {"name": STYLE, "path": "/x"}}, "lora", ["paths and addresses are not taken"]),
        ({"lora_path": "/x"}, "lora_path", ["paths and addresses are not taken"]),
        ({"loras": [{**WHOLE, "strength": 11}]}, "loras", ["strength: at most 10"]),
        ({"loras": [{**WHOLE, "strength": True}]}, "loras", ["strength: a number"]),
        ({"loras": [{**WHOLE, "start": 0.5, "end": 0.5}]}, "loras", ["begin before they end"]),
        ({"loras": [{**WHOLE, "sha256": "0" * 64}]}, "loras", ["has changed"]),
        ({"loras": [{**WHOLE, "strenght": 1}]}, "loras", ["strenght", "strength"]),
        ({"loras": [{"strength": 1}]}, "loras", ["name: it must be given"]),
        ({"loras": [""]}, "loras", ["name: a text that is not empty"]),
        ({"loras": [[STYLE]]}, "loras", ["a list of objects"]),
        ({"loras": 3}, "loras", ["a list of objects"]),
        ({"loras": '[{"name": '}, "loras", ["JSON"]),
        ({"loras": "[" * 100_000}, "loras", ["nested too deeply"]),
        ({"loras": '[{"name": "a", "name": "b"}]'}, "loras", ["twice"]),
        ({"loras": [STYLE] * 10_000}, "loras", ["at most 32"]),
        ({"loras": [STYLE] * 9}, "loras", ["this server takes at most 8"]),
        ({"loras": ["x" * 500_000]}, "loras", ["no LoRA of that name"]),
        ({"loras": [STYLE], "lora_name": STYLE}, "lora_name", ["not both"]),
        ({"lora_strength": 1}, "lora_strength", ["together with lora_name"]),
    ],
)  # fmt: skip
def test_refused(served: Any, fields: dict[str, Any], param: str, words: list[str]) -> None:
    body = json.dumps({"prompt": "a red circle", **fields})
    answer = served.http.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert [word for word in words if word not in error["message"]] == []
    assert served.store.list().jobs == ()


def test_objects_of_a_form_that_cannot_be_told_apart(served: Any) -> None:
    form = {"prompt": "x", "loras[][name]": ["a", "b"], "loras[][strength]": ["0.5"]}
    assert "one JSON text" in served.http.post("/v1/videos", data=form).json()["error"]["message"]


def test_a_server_without_a_folder_takes_no_names_and_no_paths(api: Any, folder: Path) -> None:
    for name in (STYLE, str(folder / STYLE)):
        assert api.refusal(loras=[{"name": name}])["param"] == "loras"
    assert api.http.get("/v1/loras").json()["data"] == []


def test_the_files_of_one_request_have_a_limit(make_api: Any, folder: Path) -> None:
    size = (folder / STYLE).stat().st_size
    api = make_api(ServerSettings(lora_dir=folder, limits=RequestLimits(lora_bytes=2 * size - 1)))
    assert loras(api, loras=[STYLE])
    answer = api.http.post("/v1/videos", json={"prompt": "x", "loras": [STYLE, "Motion.safetensors"]})
    assert answer.status_code == 400
    assert "at most" in answer.json()["error"]["message"]


def test_two_names_of_one_file_both_count(served: Any, folder: Path) -> None:
    """A link in the operator's folder is followed, also out of it: only the operator can make one."""
    try:
        (folder / "same.safetensors").symlink_to(folder / STYLE)
    except OSError:
        pytest.skip("no links here")
    found = loras(served, loras=[f"{STYLE}:0.5", "same.safetensors:0.25"])
    assert [lora["strength"] for lora in found] == [0.5, 0.25]
    assert found[0]["sha256"] == found[1]["sha256"]


def test_a_few_step_lora_brings_its_sampling_where_none_is_given(served: Any) -> None:
    few = "my_causvid_rank32.safetensors"
    settings = served.create(loras=[few])["settings"]
    assert (settings["sampler"], settings["guidance_scale"], len(settings["timesteps"])) == ("euler", 1.0, 8)
    settings = served.create(loras=[few], sampler="unipc", num_inference_steps=12)["settings"]
    assert (settings["sampler"], settings["num_inference_steps"]) == ("unipc", 12)
    plain, off = served.create(seed=1), served.create(seed=1, loras=[f"{few}:0"])
    assert off["settings"].pop("loras")
    assert off["settings"] == plain["settings"]


def test_a_remix_has_the_same_files(served: Any, folder: Path) -> None:
    made = served.create(loras=[f"{STYLE}:0.8"])
    remix = f"/v1/videos/{made['id']}/remix"
    again = served.http.post(remix, json={"prompt": "y"}).json()
    assert (again["loras"], again["settings"]) == (made["loras"], made["settings"])
    write_lora(folder / STYLE, value=0.125)
    error = served.http.post(remix, json={"prompt": "z"}).json()["error"]
    assert "has changed" in error["message"]
    (folder / STYLE).unlink()
    assert "no LoRA of that name" in served.http.post(remix, json={"prompt": "z"}).json()["error"]["message"]
    assert served.http.get(f"/v1/videos/{made['id']}").json()["loras"] == made["loras"]


def test_a_repetition_is_answered_after_the_file_went(served: Any, folder: Path) -> None:
    once, body = {"Idempotency-Key": "one"}, {"prompt": "x", "loras": [STYLE]}
    made = served.http.post("/v1/videos", json=body, headers=once).json()
    (folder / STYLE).unlink()
    assert served.http.post("/v1/videos", json=body, headers=once).json()["id"] == made["id"]
    other = {**body, "loras": ["Motion.safetensors"]}
    assert served.http.post("/v1/videos", json=other, headers=once).status_code == 422


def test_keys_share_the_folder_and_not_their_jobs(make_api: Any, folder: Path) -> None:
    api = make_api(ServerSettings(lora_dir=folder))
    ann, bob = ({"Authorization": f"Bearer {api.context.keys.add(name)}"} for name in ("ann", "bob"))
    assert api.http.get("/v1/loras").status_code == 401
    lists = [api.http.get("/v1/loras", headers=who).json()["data"] for who in (ann, bob)]
    assert lists[0] == lists[1] != []
    made = api.http.post("/v1/videos", json={"prompt": "x", "loras": [STYLE]}, headers=ann).json()
    assert api.http.get(f"/v1/videos/{made['id']}", headers=bob).status_code == 404


def test_a_job_whose_file_has_changed_says_so(served: Any, store: JobStore) -> None:
    class Engine(FakeEngine):
        def submit(self, request: Any, *args: Any, **options: Any) -> Any:
            runner.drain()
            raise InvalidRequestError("loras", request.loras[0].name, "the file with another SHA-256")

    made = served.create(loras=[STYLE])
    engine = Engine(EngineConfig(data_dir=store.files.folder))
    settings = RunnerSettings(attempt=AttemptSettings(poll_seconds=0.01))
    runner = Runner(store, engine, settings, hooks=engine.hooks)
    runner.run()
    error = served.http.get(f"/v1/videos/{made['id']}").json()["error"]
    assert error["code"] == "lora_lost"
    assert STYLE in error["message"]


def test_the_page_restores_what_is_here_with_the_same_hash(
    served: Any, folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    actions = PageActions(served.context, EngineConfig())
    style = {"name": STYLE, "strength": 0.8, "sha256": file_sha256(folder / STYLE)}
    others = [{**style, "name": "Motion.safetensors"}, {**style, "name": "gone.safetensors"}, {**style, "sha256": None}]
    about = {"request": {"prompt": "x", "loras": [style, *others]}, "seed": 1}
    monkeypatch.setattr(actions, "_uploads", type("Reader", (), {"read": staticmethod(lambda path: about)}))
    (tmp_path / "video.mp4").write_bytes(b"no video")
    found = actions.read(tmp_path / "video.mp4")
    assert found["form"]["loras"] == [style]
    assert found["note"].count("It was made with") == 3
    assert "gone.safetensors" in found["note"]
    assert actions.fields(found["form"])["loras"] == [style]
    assert actions.form_of(served.store.get(served.create(loras=[style])["id"]))["loras"] == [style]
    assert "loras" not in actions.fields(actions.defaults() | {"prompt": "x"})


def test_the_pages_plan_is_the_jobs(served: Any, folder: Path) -> None:
    config = EngineConfig(model="random:1.3b", devices="cpu", lora_dir=folder)
    actions = PageActions(served.context, config)
    loras = [{**WHOLE, "end": 0.5}, {**WHOLE, "strength": 0.5, "start": 0.5}, {"name": "my_causvid_rank32.safetensors"}]
    form = actions.defaults() | {
        "prompt": "x",
        SIZE: "64x64",
        "num_frames": 5,
        "loras": loras,
        "num_inference_steps": None,
    }
    found = actions.plan(form)
    models = Models(config)
    plan = models.plan(models.resolve(served.context.to_request(actions.fields(form))), config, detect()).as_dict()
    assert (found["loras"], found["host_bytes"]) == (plan["loras"], plan["host_bytes"])
    assert (found["predicted_seconds"], found["choices"]) == (plan["predicted_seconds"], plan["choices"])
    assert found["loras"]["merges"] == 2
    tensors = {"diffusion_model.blocks.0.self_attn.q.diff": np.zeros((1536, 1535), np.float32)}
    save_file(tensors, folder / "narrow.safetensors")
    with pytest.raises(InvalidRequestError, match="narrow"):
        actions.plan(form | {"loras": [{"name": "narrow.safetensors"}]})


def test_the_folder_is_in_the_data_folder_or_must_exist(tmp_path: Path, folder: Path) -> None:
    config = EngineConfig(data_dir=tmp_path)
    assert lora_folder(None, config) == tmp_path / "loras"
    assert lora_folder(folder, config) == folder
    with pytest.raises(ConfigError, match="no such folder"):
        lora_folder(tmp_path / "nowhere", config)
