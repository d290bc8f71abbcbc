"""What `--output` means, and that it means the same until the end."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from wanduet.models.dit.model import WanTransformer

TINY = ("--model", "miniature", "--steps", "2", "--num-frames", "1", "--resolution", "16x16", "--seed", "1")
DRY = (*TINY, "--dry-run")


@pytest.mark.parametrize("name", ["videos/", "a/b/", "videos/.", "clip.mp4/"])
def test_a_slash_at_the_end_means_a_folder(wanduet, work: Path, name: str) -> None:
    folder = Path(name)
    assert wanduet("generate", "x", *DRY, "-o", name, "--json").json["output"] == str(folder / "x.mp4")
    assert not (work / folder).exists()  # nothing was made yet
    made = wanduet("generate", "x", *TINY, "-o", name, "--save-latents", "--json").json
    assert (made["output"], made["latents"]) == (str(folder / "x.mp4"), [str(folder / "x.mp4.latents.safetensors")])
    assert (work / folder / "x.mp4").is_file()
    shutil.move(work / made["latents"][0], work / "l.safetensors")
    shutil.rmtree(work / folder)
    assert wanduet("decode", "l.safetensors", "-o", name, "--json").json["output"] == str(folder / "x.mp4")
    shutil.rmtree(work / folder)
    encoded = wanduet("encode", "x", "--model", "miniature", "-o", name, "--json").json
    assert encoded["output"] == str(folder / "x.safetensors")
    (work / "prompts.txt").write_text("y\n")
    batch = wanduet("batch", "prompts.txt", *TINY, "-o", name, "--json").json
    assert batch["videos"][0]["output"] == str(folder / "y.mp4")


def test_a_batch_says_once_what_its_videos_lose(wanduet, work: Path) -> None:
    (work / "lines.jsonl").write_text(
        '{"prompt": "x"}\n{"prompt": "y", "guidance_gate": 0.5}\n{"prompt": "z", "guidance_gate": 0.5}\n'
    )
    ran = wanduet("batch", "lines.jsonl", *TINY, "--json")
    assert len(ran.json["videos"]) == 3
    assert ran.err.count("3 of 4 forwards a video") == 1
    assert ran.err.index(": y\n") < ran.err.index("3 of 4 forwards a video") < ran.err.index(": z\n")


def test_a_slash_behind_a_file_is_refused(wanduet, work: Path) -> None:
    (work / "notes").write_text("mine")
    ran = wanduet("generate", "x", *TINY, "-o", "notes/", "--json")
    assert ran.code == 1
    assert "notes is a file, not a folder" in ran.error
    assert (work / "notes").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps the current folder")
@pytest.mark.parametrize("command", ["generate", "batch"])
def test_a_current_folder_that_is_removed_meanwhile_costs_nothing(
    wanduet, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    whole = WanTransformer.forward_cfg
    removed = []

    def remove_and_go_on(self, *arguments, **keywords):
        if not removed:  # a batch's first video may be there before the second begins
            shutil.rmtree(work)
            removed.append(work)
        return whole(self, *arguments, **keywords)

    monkeypatch.setattr(WanTransformer, "forward_cfg", remove_and_go_on)
    if command == "batch":
        (work / "prompts.txt").write_text("x\ny\n")
    ran = wanduet(command, {"batch": "prompts.txt"}.get(command, "x"), *TINY, "--data-dir", "../data", "--json")
    assert ran.code == 0, ran.err
    names = ["x.mp4", "y.mp4"] if command == "batch" else ["x.mp4"]
    assert [video["output"] for video in ran.json["videos"]] == [str(work / name) for name in names]
    assert sorted(path.name for path in work.iterdir())[-len(names) :] == names
    assert not list((tmp_path / "data" / "checkpoints").glob("*.safetensors"))


def test_an_absolute_output_stays_absolute(wanduet, work: Path) -> None:
    ran = wanduet("generate", "x", *DRY, "-o", str(work / "x.mp4"), "--json")
    assert json.loads(ran.out)["output"] == str(work / "x.mp4")
