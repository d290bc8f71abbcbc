"""Every command on the bundled miniature, and what people do to their files."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from wanduet.errors import OutputError
from wanduet.media.provenance import summary
from wanduet.media.read import frame_hashes, probe, read_metadata
from wanduet.media.video import write_video

TINY = ("--model", "miniature", "--steps", "2", "--num-frames", "5", "--resolution", "32x32", "--seed", "1")
CIRCLE = "a red circle moving left on a black background"
LONG = "a red circle " * 300 + "the end"


def test_generate_tells_everything(wanduet, work: Path) -> None:
    ran = wanduet("generate", CIRCLE, *TINY, "--json")
    assert ran.code == 0
    done = ran.json
    assert done["output"] == "a-red-circle-moving-left-on-a-black-background.mp4"
    expected = {"seed": 1, "width": 32, "height": 32, "num_frames": 5, "fps": 16}
    assert {name: done[name] for name in expected} == expected
    assert {"verify_s", "load_s", "prepare_s", "encode_s", "denoise_s", "decode_s", "write_s", "total_s"} <= set(
        done["timings"]
    )
    assert done["peak_memory_bytes"]["cpu"] > 0
    assert done["predicted_peak_bytes"]["cpu"] > 0
    assert done["settings"]["num_inference_steps"] == 2
    assert done["plan"]["fits"] is True
    assert done["versions"]["torch"]
    video = probe(work / done["output"])
    assert (video["codec"], video["num_frames"], video["width"]) == ("h264", 5, 32)
    assert read_metadata(work / done["output"])["request"]["prompt"] == CIRCLE
    assert sorted(os.listdir(work)) == [done["output"]]  # no latents, no partial file
    assert "\r" not in ran.err  # no progress bar: this is no terminal
    assert "\x1b" not in ran.err


def test_for_people_the_path_comes_last_on_stdout(wanduet, work: Path) -> None:
    ran = wanduet("generate", CIRCLE, *TINY)
    assert ran.out.strip().splitlines()[-1] == "a-red-circle-moving-left-on-a-black-background.mp4 (seed 1)"
    assert CIRCLE in ran.err


def test_settings_that_change_nothing_are_noted(wanduet) -> None:
    unused = ("--revision", "main", "--vram-limit", "8GiB", "--devices", "cpu")
    made = wanduet("generate", "x", *TINY, *unused).out
    assert "Note: --revision is without effect: the model is not on the hub." in made
    assert "Note: --vram-limit is without effect: no GPU is used." in made
    choices = wanduet("plan", "--model", "miniature", *unused, "--json").json["choices"]
    assert {"revision", "vram_limit"} <= {choice["setting"] for choice in choices}


def test_a_second_run_takes_another_name_and_a_named_one_replaces(wanduet, work: Path) -> None:
    assert wanduet("generate", "x", *TINY, "--json").json["output"] == "x.mp4"
    assert wanduet("generate", "x", *TINY, "--json").json["output"] == "x-2.mp4"
    several = wanduet("generate", "x", *TINY, "--num-videos-per-prompt", "2", "--json").json
    assert [v["output"] for v in several["videos"]] == ["x-3-1.mp4", "x-3-2.mp4"]
    again = wanduet("generate", "x", *TINY, "--num-videos-per-prompt", "2", "--json").json
    assert not {v["output"] for v in again["videos"]} & {"x.mp4", "x-2.mp4", "x-3-1.mp4", "x-3-2.mp4"}
    before = (work / "x.mp4").stat().st_ino
    assert wanduet("generate", "x", *TINY, "-o", "x.mp4", "--json").json["output"] == "x.mp4"
    assert (work / "x.mp4").stat().st_ino != before


def test_several_videos_never_replace_what_is_there(wanduet, work: Path) -> None:
    (work / "x-2.mp4").write_text("mine")
    done = wanduet("generate", "x", *TINY, "--num-videos-per-prompt", "2", "--json").json
    assert (work / "x-2.mp4").read_text() == "mine"
    assert all((work / v["output"]).stat().st_size > 500 for v in done["videos"])


def test_output_folders(wanduet, work: Path) -> None:
    assert wanduet("generate", "x", *TINY, "-o", "new/deep/clip.mp4", "--json").code == 0
    assert (work / "new" / "deep" / "clip.mp4").exists()
    assert wanduet("generate", "x", *TINY, "-o", "new", "--json").json["output"] == str(Path("new/x.mp4"))
    (work / "folder.mp4").mkdir()
    assert wanduet("generate", "x", *TINY, "-o", "folder.mp4", "--json").json["output"] == str(Path("folder.mp4/x.mp4"))


@pytest.mark.parametrize(
    ("path", "words"),
    [("file/clip.mp4", "is a file, not a folder"), ("a" * 300 + ".mp4", "too long"), ("a\0.mp4", "not valid")],
)
def test_an_output_that_cannot_be(wanduet, work: Path, path: str, words: str) -> None:
    (work / "file").write_text("")
    ran = wanduet("generate", "x", *TINY, "-o", path, "--json")
    assert ran.code == 1
    assert words in ran.error
    assert ran.json["error"]["code"] == "output_error"
    assert os.listdir(work) == ["file"]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(wanduet, work: Path) -> None:
    (work / "closed").mkdir(mode=0o500)
    ran = wanduet("generate", "x", *TINY, "-o", "closed/x.mp4", "--json")
    assert ran.code == 1
    assert "permission denied" in ran.error


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_place_without_room(wanduet) -> None:
    ran = wanduet("generate", "x", *TINY, "-o", "/proc/x.mp4", "--json")
    assert ran.code == 1
    assert "Cannot write /proc/x.mp4" in ran.error


@pytest.mark.parametrize("codec", [("ffv1", ".mkv"), ("vp9", ".webm"), ("av1", ".mp4")])
def test_each_codec_has_its_extension(wanduet, work: Path, codec: tuple[str, str]) -> None:
    done = wanduet("generate", "x", *TINY, "--codec", codec[0], "--json").json
    assert done["output"] == f"x{codec[1]}"
    assert probe(work / done["output"])["codec"].startswith(codec[0])


@pytest.mark.parametrize(
    "prompt",
    ["😀🎬", "红色的圆圈", "دائرة حمراء", "[/b] [red]x :smile:", "-dash", "a\tb\nc", "\u202eRTL", "%s {0} $HOME", "../../etc",
     "CON", "</s> <pad>", "nul\0nul", "\x1b[31mred\x1b[0m"],
)  # fmt: skip
def test_any_prompt_gives_a_video_that_names_it(wanduet, work: Path, prompt: str) -> None:
    ran = wanduet("generate", f"--prompt={prompt}", *TINY)
    assert ran.code == 0
    assert "beyond its world" in ran.out
    (name,) = os.listdir(work)
    assert read_metadata(work / name)["request"]["prompt"] == prompt
    shown = wanduet("inspect", name)
    assert shown.code == 0
    assert "\x1b" not in shown.out
    assert any(word in shown.out for word in re.findall(r"[\w/.%-]+|[^\w\s]+", prompt) if word.isprintable())


def test_a_prompt_that_is_too_long_is_cut_and_told(wanduet) -> None:
    ran = wanduet("generate", LONG, *TINY, "--json")
    assert ran.code == 0
    (warning,) = [w for w in ran.json["warnings"] if "512 tokens" in w]
    assert warning.endswith("the end'")
    encoded = wanduet("encode", LONG, "--model", "miniature", "--json").json
    assert encoded["tokens"] == 512
    assert encoded["cut"].endswith("the end")
    assert LONG.startswith("a red circle")
    assert len(encoded["cut"]) < len(LONG)


def test_encode_inspect_and_the_cache(wanduet, work: Path, tmp_path: Path) -> None:
    missing = wanduet("inspect", CIRCLE, "--model", "miniature", "--json")
    assert missing.code == 1
    assert "no embeddings of such a prompt" in missing.error
    done = wanduet("encode", CIRCLE, "--model", "miniature", "--json").json
    assert wanduet("encode", CIRCLE, "--model", "miniature", "-o", "e.safetensors", "--json").json["text"] == CIRCLE
    for target in (done["output"], "e.safetensors", CIRCLE, f"  {CIRCLE} "):
        found = wanduet("inspect", target, "--model", "miniature", "--json").json
        assert (found["kind"], found["text"], found["shape"][0]) == ("embeddings", CIRCLE, done["tokens"])
    assert wanduet("inspect", "x " * 3000, "--model", "miniature", "--json").code == 1  # longer than any file's name


def test_embeddings_go_where_they_are_found_again(wanduet, work: Path) -> None:
    (work / "out").mkdir()
    assert wanduet("encode", "x", "--model", "miniature", "-o", "out", "--json").json["output"] == str(
        Path("out/x.safetensors")
    )
    assert "x.txt.safetensors" in wanduet("encode", "x", "--model", "miniature", "-o", "x.txt", "--json").error
    damaged = bytearray((work / "out" / "x.safetensors").read_bytes())
    damaged[-5] ^= 1
    (work / "out" / "x.safetensors").write_bytes(damaged)
    assert "damaged" in wanduet("inspect", "out/x.safetensors", "--json").error


def test_latents_kept_decode_to_the_same_video(wanduet, work: Path) -> None:
    made = wanduet("generate", CIRCLE, *TINY, "--save-latents", "--codec", "ffv1", "--json").json
    (latents,) = made["latents"]
    about = wanduet("inspect", latents, "--json").json
    assert (about["kind"], about["shape"]) == ("latents", [16, 2, 4, 4])
    again = wanduet("decode", latents, "--codec", "ffv1", "--json").json
    assert again["output"] != made["output"]
    assert frame_hashes(work / again["output"]) == frame_hashes(work / made["output"])
    assert (work / latents).exists()
    named = wanduet("decode", latents, "-o", "clip.mp4", "--json")
    assert named.json["output"] == "clip.mp4"
    assert wanduet("decode", latents, "-o", "clip.avi", "--json").code == 2


def test_latents_of_another_model_are_decoded_with_a_note(wanduet, work: Path, model: Path) -> None:
    (latents,) = wanduet("generate", CIRCLE, *TINY, "--save-latents", "--json").json["latents"]
    assert wanduet("decode", latents, "--json").json["warnings"] == []
    assert (
        wanduet("decode", latents, "--model", str(model), "--json").json["warnings"] == []
    )  # the same in another place
    (model / "manifest.json").unlink()
    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 0.9 for name, tensor in load_file(vae).items()}, vae)
    done = wanduet("decode", latents, "--model", str(model), "--transformer-dtype", "bfloat16", "--json").json
    assert "made by the model miniature. model, which decodes them, has other weights" in done["warnings"][0]
    engine = read_metadata(work / done["output"])["engine"]
    assert (engine["denoised_by"]["name"], engine["transformer_dtype"]) == ("miniature", "float32")
    assert "cannot be made again" in wanduet("verify", done["output"], "--json").error


def test_latents_of_another_program_are_decoded(wanduet, work: Path) -> None:
    """As diffusers' `output_type="latent"` gives them: normalised, with a batch of one, without a word of how."""
    made = wanduet("generate", CIRCLE, *TINY, "--save-latents", "--codec", "ffv1", "--json").json
    latents = load_file(work / made["latents"][0])["latents"]
    save_file({"latents": latents[None]}, work / "other.safetensors")
    assert wanduet("inspect", "other.safetensors", "--json").json["shape"] == [16, 2, 4, 4]
    done = wanduet("decode", "other.safetensors", "--model", "miniature", "--codec", "ffv1", "--json").json
    assert done["output"] == "other.mkv"
    assert frame_hashes(work / done["output"]) == frame_hashes(work / made["output"])
    assert "cannot be made again" in wanduet("verify", done["output"], "--json").error
    save_file({"latents": latents[:, :, :, :3].contiguous()}, work / "odd.safetensors")
    assert "width" in wanduet("decode", "odd.safetensors", "--model", "miniature", "--json").error
    save_file({"latents": latents[:4].contiguous()}, work / "few.safetensors")
    assert "do not fit" in wanduet("decode", "few.safetensors", "--model", "miniature", "--json").error
    save_file({"latents": latents * float("nan")}, work / "nan.safetensors")
    assert "NaN" in wanduet("decode", "nan.safetensors", "--model", "miniature", "--json").error


def test_verify_makes_the_same_video_again(wanduet, work: Path) -> None:
    made = wanduet("generate", CIRCLE, *TINY, "--vae-dtype", "bfloat16", "--codec", "ffv1", "--json").json
    ran = wanduet("verify", made["output"], "--json")
    assert ran.code == 0
    assert ran.json["equal"] is True
    assert ran.json["model_equal"] is True
    assert ran.json["num_frames"] == 5
    assert "32x32, 5 frames (0.3 s), 2 steps of unipc, seed 1" in ran.err  # said before it begins
    assert "Making it again takes about" in ran.err
    other = wanduet("verify", made["output"], "--vae-dtype", "float32", "--json")
    assert other.code == 1
    assert other.json["equal"] is False
    assert other.json["different_frames"]


@pytest.mark.parametrize(
    "change",
    [
        {"output": {"quality": "high"}}, {"output": {"quality": 1000}}, {"seed": None}, {"seed": "1"}, {"request": {}},
        {"request": {"prompt": "x", "num_frames": 6}}, {"request": {"prompt": ["x"]}}, {"request": {"prompt": ""}},
    ],
)  # fmt: skip
def test_metadata_that_anybody_wrote_is_not_trusted(wanduet, work: Path, change: dict) -> None:
    about = {"request": {"prompt": "x", "num_frames": 1}, "seed": 1, "model": {"name": "miniature"}} | change
    write_video(np.zeros((1, 16, 16, 3), np.uint8), work / "x.mp4", metadata=about)
    ran = wanduet("verify", "x.mp4", "--json")
    assert ran.code == 1
    assert ran.json["error"]["code"] == "unreadable_file"
    assert "x.mp4" in ran.error
    assert wanduet("inspect", "x.mp4").code == 0


def test_a_disk_that_is_full_at_the_end_says_what_is_kept(wanduet, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanduet.engine import generate

    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_video", Mock(side_effect=OutputError("the disk is full")))
        assert "--resume" in wanduet("generate", "x", *TINY, "--json").error
    assert os.listdir(work) == ["x.mp4.latents.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr(generate, "denoise_video", Mock(side_effect=OutputError("it was denoised again")))
        assert wanduet("generate", "x", *TINY, "--resume", "--json").code == 0
    assert os.listdir(work) == ["x.mp4"]


def test_latents_that_cannot_be_kept_leave_the_last_step(wanduet, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanduet.engine import generate

    call = ("generate", "x", *TINY, "--checkpoint-seconds", "0", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(generate, "save_latents", Mock(side_effect=OutputError("the folder has gone")))
        assert "Step 1 is kept: the same command with --resume" in wanduet(*call).error
    assert wanduet(*call, "--resume").code == 0


@pytest.mark.parametrize("prompt", ["&nbsp;", "&amp;#32; \u3000"])
def test_a_prompt_that_is_empty_once_cleaned_is_told(wanduet, prompt: str) -> None:
    assert any("Nothing is left" in note for note in wanduet("generate", prompt, *TINY, "--json").json["warnings"])


def test_a_prompt_does_not_steer_the_terminal(wanduet, work: Path) -> None:
    (work / "prompts.txt").write_text("a \x1b[2J circle\n" + "long " * 1000)
    ran = wanduet("batch", "prompts.txt", *TINY, "--json")
    assert ran.code == 0
    assert "\x1b" not in ran.err
    assert "(4999 characters)" in ran.err


def test_files_that_are_none_of_ours(wanduet, work: Path) -> None:
    (work / "text.mp4").write_text("no video")
    (work / "text.safetensors").write_text("no tensors")
    (work / "empty.mp4").write_bytes(b"")
    for command, name in [
        (command, name)
        for command in ("inspect", "verify", "decode")
        for name in ("text.mp4", "empty.mp4", "text.safetensors", ".")
    ]:
        ran = wanduet(command, name, "--json")
        assert ran.code == 1, (command, name)
        assert ran.json["error"]["code"] == "unreadable_file", (command, name)
    for command in ("verify", "decode"):
        ran = wanduet(command, "nowhere.mp4", "--json")
        assert ran.code == 1
        assert "nowhere.mp4" in ran.error


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.json", b'{"prompt": "x"}', "a JSON file"),
        ("a.txt", "a text, als \N{LATIN SMALL LETTER U WITH DIAERESIS}bung".encode(), "a text file"),
        ("a.weights", b"GGUF\3\0\0\0" + bytes(64), "a GGUF file of weights"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(64), "a PNG picture"),
        ("a.mp4", b"\xff\xd8\xff\xe0" + bytes(64), "a JPEG picture"),
        ("a.webp", b"RIFF\x10\0\0\0WEBPVP8 " + bytes(64), "a WebP picture"),
        ("weights", save({"w": torch.zeros(1)}), "a safetensors file"),
        ("a.bin", bytes(range(256)), None),
    ],
)
def test_inspect_says_what_a_file_is_that_it_does_not_know(
    wanduet, work: Path, name: str, content: bytes, kind: str | None
) -> None:
    (work / name).write_bytes(content)
    error = wanduet("inspect", name, "--json").error
    assert (f"{name} is {kind}, not a video." in error) == (kind is not None)
    assert "videos, and latents and prompt embeddings that wanduet wrote" in error


def test_weights_are_not_taken_for_latents(wanduet, work: Path) -> None:
    save_file({"w": torch.zeros(1), "b": torch.zeros(1)}, work / "a.safetensors", metadata={"format": "pt", "of": "x"})
    assert "a.safetensors holds b, w, not latents" in wanduet("inspect", "a.safetensors", "--json").error


@pytest.mark.parametrize("name", ["clip.mp4", "no/clip.mp4.latents.safetensors"])
def test_a_file_that_is_not_there_is_named_whatever_the_model(wanduet, work: Path, name: str) -> None:
    ran = wanduet("inspect", name, "--json")  # the default model is not here either, and is not what is missing
    assert (ran.code, ran.json["error"]["code"]) == (1, "unreadable_file")
    assert f"no file '{name}'" in ran.error


def test_every_truncation_of_latents_is_refused(wanduet, work: Path) -> None:
    (latents,) = wanduet("generate", "x", *TINY, "--save-latents", "--json").json["latents"]
    whole = (work / latents).read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (work / latents).write_bytes(whole[:length])
        assert wanduet("decode", latents, "--json").json["error"]["code"] == "unreadable_file"
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    (work / latents).write_bytes(flipped)
    assert "damaged" in wanduet("decode", latents, "--json").error


def test_batch(wanduet, work: Path) -> None:
    lines = [CIRCLE, "# a comment", "", '{"prompt": "a blue square", "seed": 5, "num_frames": 1}', CIRCLE]
    (work / "prompts.txt").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    ran = wanduet("batch", "prompts.txt", *TINY, "-o", "out", "--json")
    assert ran.code == 0
    videos = ran.json["videos"]
    assert [(v["seed"], v["num_frames"]) for v in videos] == [(1, 5), (5, 1), (1, 5)]
    assert len({v["output"] for v in videos}) == 3
    assert all((work / v["output"]).exists() for v in videos)
    assert ran.json["failed"] == 0
    for number in (1, 2, 3):
        assert re.search(rf"^Video {number} of 3, .+ left for all: ", ran.err, re.MULTILINE)


def test_videos_at_given_timesteps_and_their_verification(wanduet, work: Path) -> None:
    few = {"prompt": CIRCLE, "timesteps": [1000, 757, 522]}
    lines = [few | {"sampler": "renoise"}, few | {"sampler": "euler", "timesteps": "900,300"}]
    (work / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    size = [*TINY[:2], *TINY[4:], "--flow-shift", "5", "--guidance-scale", "1"]  # the lines replace the shift
    ran = wanduet("batch", "prompts.jsonl", *size, "--json")
    assert ran.code == 0
    first, second = (work / video["output"] for video in ran.json["videos"])
    requests = [read_metadata(path)["request"] for path in (first, second)]
    assert [(one["timesteps"], one["num_inference_steps"]) for one in requests] == [
        ([1000, 757, 522], 3),
        ([900, 300], 2),
    ]
    assert all("flow_shift" not in one for one in requests)
    assert "3 steps, guidance 1, timesteps 1000,757,522, renoise" in summary(read_metadata(first))
    again = wanduet("verify", str(first), "--json")
    assert again.json["equal"] is True
    assert "3 steps of renoise at 1000,757,522" in again.err


def test_a_batch_goes_on_with_what_is_missing(wanduet, work: Path) -> None:
    (work / "prompts.txt").write_text('x\nx\n{"prompt": "y", "num_videos_per_prompt": 2}\nz\n')
    unseeded = [flag for flag in TINY if flag not in ("--seed", "1")]
    batch = ("batch", "prompts.txt", *unseeded, "-o", "out", "--codec", "ffv1", "--json")
    assert wanduet("generate", "z", *unseeded, "-o", "out/z.mkv", "--codec", "ffv1", "--fps", "8", "--json").code == 0
    first = wanduet(*batch).json["videos"]
    outputs = ["x.mkv", "x-2.mkv", "y-1.mkv", "z-2.mkv"]
    assert [Path(video["output"]).name for video in first] == outputs
    kept = {name: (work / "out" / name).stat().st_ino for name in os.listdir(work / "out")}
    (work / "out" / "x-2.mkv").unlink()
    (work / "out" / "y-2.mkv").unlink()
    again = wanduet(*batch, "--resume").json["videos"]
    assert [Path(video["output"]).name for video in again] == ["x.mkv", "x-2.mkv", "y-1.mkv", "z-2.mkv"]
    assert [video.get("made_before", False) for video in again] == [True, False, False, True]
    assert [video["seed"] for video in again][2:] == [video["seed"] for video in first][2:]
    assert again[0]["seed"] == first[0]["seed"]
    assert (work / "out" / "y-2.mkv").exists()
    for name in ("x.mkv", "y-1.mkv", "z.mkv", "z-2.mkv"):
        assert (work / "out" / name).stat().st_ino == kept[name]
    seeded = wanduet(*batch, "--resume", "--seed", "5").json["videos"]  # another request: none of these is its video
    assert not any(video.get("made_before") for video in seeded)


def test_a_group_of_videos_goes_on_with_what_is_missing(wanduet, work: Path) -> None:
    unseeded = [flag for flag in TINY if flag not in ("--seed", "1")]
    command = ("generate", "x", *unseeded, "--num-videos-per-prompt", "3", "--codec", "ffv1", "--json")
    first = wanduet(*command).json
    frames = frame_hashes(work / "x-3.mkv")
    kept = {name: (work / name).stat().st_ino for name in ("x-1.mkv", "x-2.mkv")}
    (work / "x-3.mkv").unlink()
    again = wanduet(*command, "--resume").json
    assert again["videos"] == first["videos"]
    assert frame_hashes(work / "x-3.mkv") == frames
    assert kept == {name: (work / name).stat().st_ino for name in kept}
    named = wanduet(*command, "--resume", "-o", "x.mkv", "--seed", str(first["seed"])).json
    assert named["videos"] == first["videos"]
    assert named["timings"]["denoise_s"] == 0  # all were there
    other = wanduet(*command, "--resume", "--fps", "8").json  # another request: under another name
    assert other["output"] == "x-4-1.mkv"


def test_bench_measures_and_keeps_nothing(wanduet, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = wanduet("bench", *TINY, "--runs", "2", "--json")
    assert ran.code == 0
    found = ran.json
    assert len(found["runs"]) == 2
    assert found["timings"]["encode_s"] > 0  # not from the cache
    assert {"verify_s", "load_s", "prepare_s", "encode_s", "denoise_s", "decode_s", "write_s", "total_s"} == set(
        found["timings"]
    )
    assert found["seconds_per_step"] > 0
    assert found["peak_memory_bytes"]["cpu"] > 0
    assert os.listdir(work) == []
    assert not (tmp_path / "data" / "embeddings").exists()
    assert (found["attention"], found["kernels"], found["vae_kernels"]) == ("sdpa", "torch", "torch")
    assert wanduet("bench", *TINY, "--runs", "0", "--json").code == 2

    from wanduet.kernels.dit.plain import TORCH_KERNELS
    from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS
    from wanduet.runtime import dit_host, vae_host

    monkeypatch.setattr(dit_host, "kernels_for", lambda *_: replace(TORCH_KERNELS, name="mine"))
    monkeypatch.setattr(vae_host, "vae_kernels_for", lambda *_: replace(VAE_TORCH_KERNELS, name="mine without attend"))
    ran = wanduet("bench", *TINY, "--runs", "1")
    assert ran.code == 0
    assert re.match(r"A video takes \S+ s on .+: \S+ s a step, ", ran.out)
    assert re.search(r"\bkernels\W+mine\s", ran.out)
    assert re.search(r"vae_kernels\W+mine without attend", ran.out)


def test_a_batch_goes_into_a_folder(wanduet, work: Path) -> None:
    (work / "prompts.txt").write_text(CIRCLE)
    ran = wanduet("batch", "prompts.txt", *TINY, "-o", "clip.mp4", "--json")
    assert ran.code == 2
    assert "a folder" in ran.error
    assert os.listdir(work) == ["prompts.txt"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which no file can be made")
@pytest.mark.parametrize("named", [[], ["-o", "x.safetensors"]])
def test_a_folder_in_which_no_file_can_be_made_ends_at_once(wanduet, monkeypatch, named: list[str]) -> None:
    monkeypatch.chdir("/proc")
    ran = wanduet("encode", "x", "--model", "miniature", "--json", *named)
    assert ran.code == 1
    assert "Cannot write /proc/x.safetensors" in ran.error
    assert "another run" not in ran.error


@pytest.mark.skipif(sys.platform == "win32", reason="a folder in use cannot be removed there")
def test_a_current_folder_that_was_removed(wanduet, work: Path) -> None:
    work.rmdir()
    ran = wanduet("plan", "--model", "miniature", "--json")
    assert ran.code == 2
    assert "current folder" in ran.error


def test_a_dry_run_shows_people_the_plan(wanduet) -> None:
    ran = wanduet("generate", "a red circle", "--dry-run", *TINY)
    assert "fits on the CPU, and takes about" in ran.out.splitlines()[0]
    assert "may use" in ran.out
    assert ran.out.splitlines()[-1] == "Would be written: a-red-circle.mp4"


def test_a_table_with_one_column_twice_is_refused(wanduet, work: Path) -> None:
    (work / "prompts.csv").write_text("prompt,seed, prompt\na circle,1,a square\n")
    ran = wanduet("batch", "prompts.csv", *TINY, "--json")
    assert ran.code == 2
    assert "two columns are named 'prompt'" in ran.error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a circle\n{broken", "line 2"),
        ('{"prompt": "x", "num_frames": 6}', "num_frames=6"),
        ('{"prompt": "x", "nonsense": 6}', "no such field; Fields are"),
        ('{"prompt": "x", "steps": 6}', "did you mean num_inference_steps?"),
        ('{"seed": 6}', "prompt"),
        ('{"prompt": 6}', "line 1"),
        ("\n# only a comment\n", "at least one prompt"),
        ("a circle\n" + '{"a":' * 20000, "line 2"),
    ],
)
def test_a_batch_file_that_is_wrong_makes_nothing(wanduet, work: Path, text: str, words: str) -> None:
    (work / "prompts.txt").write_text(text)
    ran = wanduet("batch", "prompts.txt", *TINY, "--json")
    assert ran.code == 2
    assert words in ran.error
    assert os.listdir(work) == ["prompts.txt"]


def test_one_that_fails_in_a_batch_does_not_stop_the_others(
    wanduet, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanduet.engine import generate

    whole = generate.decode_video

    def decode(models, job, *rest):
        if job.request.seed == 5:
            raise RuntimeError("no luck")
        return whole(models, job, *rest)

    monkeypatch.setattr(generate, "decode_video", decode)
    (work / "prompts.txt").write_text('x\n{"prompt": "y", "seed": 5}\nz')
    ran = wanduet("batch", "prompts.txt", *TINY, "--json")
    assert ran.code == 1
    assert ran.json["failed"] == 1
    assert [("error" in v) for v in ran.json["videos"]] == [False, True, False]
    assert "no luck" in ran.err


def test_download_of_what_is_here_checks_it(wanduet, model: Path) -> None:
    for name in ("miniature", str(model)):
        done = wanduet("download", "--model", name, "--json").json
        assert done["files_verified"] >= 12
        assert "nothing to fetch" in done["note"]
    data = bytearray((model / "vae" / "config.json").read_bytes())
    data[-5] ^= 1
    (model / "vae" / "config.json").write_bytes(data)
    ran = wanduet("download", "--model", str(model), "--json")
    assert ran.code == 1
    assert "config.json is damaged" in ran.error


def test_convert_writes_a_model_that_runs(wanduet, work: Path) -> None:
    done = wanduet("convert", "miniature", "wan", "--json").json
    assert done["path"] == str(work / "wan")
    assert done["bytes"] == sum(done["component_bytes"].values())
    assert wanduet("download", "--model", "wan", "--json").json["files_verified"] >= 10
    again = wanduet("convert", "miniature", "wan", "--json")
    assert (again.code, again.json["error"]["code"]) == (1, "output_error")
    assert "random weights" in wanduet("convert", "random:1.3b", "wan2", "--json").error


def test_doctor(wanduet, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = wanduet("doctor", "--model", "miniature", "--json").json
    assert (found["model"]["whole"], found["model"]["verified"]) == (True, True)
    assert found["cpu"]["count"] > 0
    assert found["data_folder"]["free_bytes"] > 0
    assert wanduet("doctor", "--model", "miniature").code == 0
    (model / "manifest.json").unlink(missing_ok=True)
    found = wanduet("doctor", "--model", str(model), "--json").json
    assert (found["model"]["whole"], found["model"]["verified"]) == (True, False)  # nobody knows what they should be
    (model / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    found = wanduet("doctor", "--model", str(model), "--json").json
    assert found["model"]["whole"] is False
    assert "vae" in found["model"]["problem"]
    assert wanduet("doctor", "--model", "no-such-model", "--json").json["model"]["found"] is False
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDUET_DATA_DIR", str(tmp_path / "file"))
    assert any(
        "WANDUET_DATA_DIR" in line for line in wanduet("doctor", "--json", "--model", "miniature").json["advice"]
    )


def test_doctor_shows_what_attention_took(wanduet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a CPU that is taken for a GPU with three back ends, of which one is wrong."""
    from wanduet.engine import tools
    from wanduet.kernels.attention import choose
    from wanduet.kernels.attention.backends import SDPA, Backend
    from wanduet.kernels.triton_probe import Probe
    from wanduet.planning.hardware import DeviceInfo

    wrong = Backend("wrong", lambda q, k, v, call: q * 0, None)
    backends = {"sdpa": SDPA, "other": Backend("other", SDPA.attend, None), "wrong": wrong}
    for module in (tools, choose):
        monkeypatch.setattr(module, "available_backends", lambda device: backends)
    card = DeviceInfo("cpu", "a card", 2**30, 2**30, (9, 0))
    hardware = SimpleNamespace(**asdict(tools.detect()) | {"gpus": (card,)})
    monkeypatch.setattr(tools, "detect", lambda: hardware)
    monkeypatch.setattr(tools, "probe_triton", lambda: Probe(tried=True))
    assert wanduet("doctor", "--json").json["gpus"][0]["attention_measured"] == []
    shape = choose.Shape(64, 64, 2, 16)
    choose.choose_attention(torch.device("cpu"), shape, torch.float32, cache_folder=tmp_path / "data" / "measurements")
    doctor = wanduet("doctor", "--json").json
    assert any("wrong is not used on cpu: wrong result" in line for line in doctor["advice"])
    (seen,) = doctor["gpus"][0]["attention_measured"]
    assert seen["queries x keys x heads x channels"] == "64 x 64 x 2 x 16"
    assert sorted(seen["milliseconds"]) == sorted(seen["error"]) == ["other", "sdpa"]
    assert "wrong result" in seen["dropped"]["wrong"]
    assert "milliseconds" in wanduet("doctor").out


def test_doctor_lets_triton_build_what_it_needs_where_there_is_a_gpu(wanduet, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanduet.engine import tools
    from wanduet.kernels.triton_probe import Probe
    from wanduet.planning.hardware import DeviceInfo

    def doctor(problem: Probe) -> dict[str, object]:
        monkeypatch.setattr(tools, "probe_triton", lambda: problem)
        return wanduet("doctor", "--json").json

    broken = Probe(True, "Triton finds no C compiler", "Install one.")
    found = doctor(broken)
    assert (found["triton_problem"], found["triton_probe"]) == (None, "Not tried: no GPU is seen.")
    card = DeviceInfo("cpu", "a card", 2**30, 2**30, (9, 0))
    hardware = SimpleNamespace(**asdict(tools.detect()) | {"gpus": (card,)})
    monkeypatch.setattr(tools, "detect", lambda: hardware)
    assert "works" in doctor(Probe(tried=True))["triton_probe"]
    found = doctor(broken)
    assert (found["triton_problem"], found["triton_probe"]) == (broken.problem, f"{broken.problem}.")
    advice = "Triton finds no C compiler: plain kernels run instead, about a fifth slower. Install one."
    assert advice in found["advice"]
    missing = doctor(Probe(False, "Triton is not installed"))
    assert missing["triton_probe"] == "Not tried: Triton is not installed."
    assert any("pip install" in line for line in missing["advice"])


def test_a_data_folder_that_cannot_be_costs_nothing_but_the_cache(
    wanduet, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDUET_DATA_DIR", str(tmp_path / "file"))
    for _ in range(2):
        assert wanduet("generate", "x", *TINY, "--json", "-o", "x.mp4").code == 0
    assert (work / "x.mp4").exists()


def test_the_second_run_reads_the_embeddings_from_the_cache(
    wanduet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanduet.models.text.umt5 import TextEncoder

    assert wanduet("generate", CIRCLE, *TINY, "--json").code == 0
    kept = list((tmp_path / "data" / "embeddings").iterdir())
    assert len(kept) == 2  # the prompt's and the empty negative one's

    def encode(*_: object, **__: object) -> None:
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(TextEncoder, "encode", encode)
    assert wanduet("generate", CIRCLE, *TINY, "--json").code == 0
    assert wanduet("generate", CIRCLE, *TINY, "--no-cache-embeddings", "--json").code == 1
    monkeypatch.undo()


def test_run_wan_takes_its_settings_unless_flags_say_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from wanduet.doors.cli.simple import arguments

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDUET_MODEL", raising=False)
    size = ["--height", "480", "--width", "832"]

    def of(*flags: str) -> list[str]:
        return arguments(flags, "-a cat", 81, (480, 832))

    assert of() == ["generate", "--num-frames", "81", *size, "--prompt=-a cat"]
    assert of("a dog") == ["generate", "--num-frames", "81", *size, "a dog"]
    assert of("--model", "miniature", "a dog") == ["generate", "--model", "miniature", "a dog"]
    assert of("--model", "miniature-fast", "a dog") == ["generate", "--model", "miniature-fast", "a dog"]
    assert of("--model=miniature") == ["generate", "--prompt=-a cat", "--model=miniature"]
    assert of("--seconds", "2", "--resolution=720p", "--prompt", "x") == [
        "generate", "--seconds", "2", "--resolution=720p", "--prompt", "x",
    ]  # fmt: skip
    monkeypatch.setenv("WANDUET_MODEL", "miniature")
    assert of() == ["generate", "--prompt=-a cat"]


def test_messages_hold_no_machine_secrets(wanduet, tmp_path: Path) -> None:
    """What is kept beside the videos says what was made and with what, never where on the disk."""
    done = wanduet("generate", "x", *TINY, "--json").json
    text = json.dumps(read_metadata(tmp_path / "work" / done["output"]))
    assert str(tmp_path) not in text
    assert str(Path(shutil.__file__).parent) not in text


def test_a_name_whose_latents_would_have_none_is_refused_before_any_work(wanduet, work: Path) -> None:
    ran = wanduet("generate", "x", *TINY, "-o", "x" * 245 + ".mp4", "--json")
    assert ran.code == 1
    assert "too long" in ran.error
    assert os.listdir(work) == []


def test_latents_of_an_interrupted_run_are_not_written_over(
    wanduet, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanduet.engine import generate

    with monkeypatch.context() as patch:
        patch.setattr(generate, "write_video", Mock(side_effect=OutputError("the disk is full")))
        assert "x.mp4.latents.safetensors" in wanduet("generate", "x", *TINY, "--json").error
    kept = (work / "x.mp4.latents.safetensors").read_bytes()
    assert wanduet("generate", "x", *TINY, "--json").json["output"] == "x-2.mp4"
    assert (work / "x.mp4.latents.safetensors").read_bytes() == kept
    assert wanduet("decode", "x.mp4.latents.safetensors", "--json").json["output"] == "x.mp4"


@pytest.mark.parametrize("ends", ["done", "failed"])
def test_a_batch_stops_though_the_job_ended_while_it_was_to_be_stopped(
    wanduet, work: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    from wanduet.doors.cli import batch
    from wanduet.engine import generate

    (work / "prompts.txt").write_text("x\ny\n")
    whole = batch.follow
    monkeypatch.setattr(batch, "follow", lambda *job: whole(*job) or True)
    if ends == "failed":
        monkeypatch.setattr(generate, "write_video", Mock(side_effect=OutputError("the disk is full")))
    ran = wanduet("batch", "prompts.txt", *TINY, "--json")
    assert ran.code == 130
    assert f"{int(ends == 'done')} of 2 videos" in ran.error


@pytest.mark.skipif(sys.platform == "win32", reason="a POSIX shell")
def test_a_closed_stdout_stands_in_no_file(tmp_path: Path) -> None:
    script = f'exec "{sys.executable}" -m wanduet encode x --model miniature --json -o e.safetensors >&-'
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Traceback" not in done.stderr
    assert (tmp_path / "e.safetensors").stat().st_size > 100
