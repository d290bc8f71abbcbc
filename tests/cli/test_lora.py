"""`--lora` on the command line: what is made, planned, verified and refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanduet.weights.hub import open_model
from wanduet.weights.manifest import file_sha256

CIRCLE = "a red circle moving left on a black background"
SMALL = ("--model", "miniature", "--height", "32", "--width", "32", "--num-frames", "5", "--steps", "2", "--seed", "1")


@pytest.fixture
def style(work: Path) -> Path:
    spec = open_model("miniature").spec.transformer
    torch.manual_seed(0)
    tensors = {}
    for block in range(spec.num_layers):
        tensors[f"diffusion_model.blocks.{block}.self_attn.q.lora_A.weight"] = torch.randn(4, spec.dim)
        tensors[f"diffusion_model.blocks.{block}.self_attn.q.lora_B.weight"] = torch.randn(spec.dim, 4) * 0.05
    folder = work / "loras"
    folder.mkdir()
    save_file(tensors, folder / "style.safetensors")
    (folder / "notes.txt").write_text("not a LoRA")
    return folder / "style.safetensors"


def test_a_video_is_made_with_a_lora_and_verified(wanduet, work: Path, style: Path) -> None:
    ran = wanduet("generate", CIRCLE, *SMALL, "--lora", f"{style}:0.8", "-o", "a.mp4", "--json")
    made = ran.json
    assert re.search(r"LoRA: 6 weights are merged .* of host memory", ran.err)
    record = {"name": "style.safetensors", "strength": 0.8, "sha256": file_sha256(style)}
    assert made["settings"]["loras"] == [record]
    assert made["plan"]["loras"]["merges"] == 1
    assert "LoRA style.safetensors" in wanduet("inspect", "a.mp4").out
    assert "--lora" in wanduet("verify", "a.mp4", "--json").err
    style.rename(style.with_name("renamed.safetensors"))
    assert wanduet("verify", "a.mp4", "--lora", "loras", "--json").json["equal"] is True
    wanduet("generate", CIRCLE, *SMALL, "-o", "b.mp4", "--json")
    assert "no use" in wanduet("verify", "b.mp4", "--lora", "loras", "--json").error


def test_a_batch_may_name_loras_for_each_line(wanduet, work: Path, style: Path) -> None:
    lines = [
        {"prompt": "a blue square", "loras": [{"name": "loras/style.safetensors", "strength": 0.5}]},
        {"prompt": "a red circle", "loras": []},
        {"prompt": "a green circle"},
    ]
    (work / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = wanduet("batch", "prompts.jsonl", *SMALL, "--lora", f"{style}:0.3", "-o", "made/", "--json").json
    strengths = [[lora["strength"] for lora in one["settings"].get("loras", [])] for one in done["videos"]]
    assert strengths == [[0.5], [], [0.3]]


def test_plan_counts_and_refuses(wanduet, work: Path, style: Path) -> None:
    plain = wanduet("plan", "--model", "miniature", "--json").json
    halves = ("--lora", f"{style}:1@0-0.5", "--lora", f"{style}:0.5@0.5-1")
    found = wanduet("plan", "--model", "miniature", *halves, "--json").json
    assert found["loras"]["merges"] == 2
    assert found["host_bytes"] == plain["host_bytes"] + found["loras"]["host_bytes"]
    assert "2 times a video" in " ".join(wanduet("plan", "--model", "miniature", *halves).out.split())
    refused = wanduet("plan", "--model", "random:1.3b", "--lora", str(style), "--json")
    assert refused.code
    assert "1536" in refused.error


@pytest.mark.parametrize("wrong", ["nowhere.safetensors", "loras/style.safetensors:strong", "loras/notes.txt"])
def test_refused(wanduet, work: Path, style: Path, wrong: str) -> None:
    ran = wanduet("generate", CIRCLE, *SMALL, "--lora", wrong, "-o", "a.mp4", "--json")
    assert ran.code
    assert Path(wrong).name.partition(":")[0] in ran.error
    assert not list(work.glob("a.mp4*"))
