"""What commands print for people: a sentence first, then what is to do or to know."""

from pathlib import Path

import pytest

from wanduet.doors.cli.show import show

TINY = ("--model", "miniature", "--resolution", "64x64", "--num-frames", "9", "--steps", "2")


def first_line(ran: object) -> str:
    return str(ran.out).splitlines()[0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--hardware 3090", "96x96, 33 frames (2.1 s), 20 steps: fits on one RTX 3090, and takes about"),
        ("--hardware 2x3090", "fits on 2 RTX 3090, which make it together, and takes about"),
        ("--hardware 2x3090 --strategy placed", "on 2 RTX 3090, where one denoises and one decodes"),
        ("--ram-limit 1MiB --resolution 16x16 --num-frames 1", "of host memory, of which 1 MiB may be used."),
    ],
)
def test_a_plan_begins_with_what_it_comes_to(wanduet, flags: str, sentence: str) -> None:
    ran = wanduet("plan", "--model", "miniature", *flags.split())
    assert sentence in first_line(ran)
    assert "without effect" not in ran.out
    assert ran.code == ("does not fit" in first_line(ran))


def test_a_plan_that_does_not_fit_names_flags_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    device = {
        "name": "cuda:0",
        "role": "vae",
        "phases": {"encode": 0, "denoise": 3 << 30, "decode": 1},
        "limit_bytes": 1 << 30,
    }
    nearest = [{"height": 32, "num_frames": 5, "predicted_peak_bytes": {}, "predicted_seconds": 90.0}]
    show({
        "fits": False, "strategy": "single", "devices": [device], "hardware": {"cuda:0": "RTX 1"}, "choices": [],
        "host_bytes": 1, "host_limit_bytes": 1, "nearest_that_fits": nearest,
    })  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "does not fit on one RTX 1. Denoising needs 3.00 GiB on RTX 1, of which 1.00 GiB may be used."
    assert lines[1] == "  What fits: --height 32 --num-frames 5 (about 90 s)"


def test_a_plan_for_programs_has_no_more_than_before(wanduet) -> None:
    assert "settings" not in wanduet("plan", "--model", "miniature", "--json").json


def test_doctor_is_a_checklist_with_what_to_do(wanduet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanduet.engine import tools

    monkeypatch.setattr(tools, "_advice", lambda *_: [])
    ran = wanduet("doctor", "--model", "miniature")
    assert first_line(ran) == "All is well."
    assert "!!" not in ran.out
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("WANDUET_DATA_DIR", str(tmp_path / "file"))
    monkeypatch.setattr(tools, "_advice", lambda *_: [tools.Advice("GPU", "Look at the GPU."), "Look at the moon."])
    ran = wanduet("doctor", "--model", "no-such-model")
    assert first_line(ran) == "4 items need a look."
    lines = [" ".join(line.split()) for line in ran.out.splitlines()]
    marks = {line.split()[1]: line.split()[0] for line in lines if line[:2] in ("ok", "!!")}
    assert marks == {"GPU": "!!", "memory": "ok", "data": "!!", "model": "!!", "other": "!!"}
    gpu = next(index for index, line in enumerate(lines) if line.startswith("!! GPU"))
    assert any(line == "-> Look at the GPU." for line in lines[gpu + 1 : gpu + 4])
    assert "-> Look at the moon." in lines
    assert "WANDUET_DATA_DIR" in ran.out


def test_inspect_begins_with_what_a_file_is(wanduet, work: Path) -> None:
    assert wanduet("generate", "a red circle", *TINY, "--save-latents", "-o", "a.mp4").code == 0
    ran = wanduet("inspect", "a.mp4")
    assert first_line(ran).startswith("a.mp4 is a video of 64x64, 9 frames at 16 a second (0.562 s), h264, ")
    assert "Prompt: a red circle\nMade by miniature, seed " in ran.out
    ran = wanduet("inspect", "a.mp4.latents.safetensors")
    assert first_line(ran).endswith("wanduet decode a.mp4.latents.safetensors")
    assert "16 x 3 x 8 x 8" in ran.out
    assert wanduet("encode", "a red circle", "--model", "miniature", "-o", "e.safetensors").code == 0
    ran = wanduet("inspect", "e.safetensors")
    assert first_line(ran) == "e.safetensors has the embeddings of a prompt, 4 tokens."
    assert "Prompt: a red circle" in ran.out


def test_inspect_says_whether_weights_run(wanduet, model: Path) -> None:
    ran = wanduet("inspect", str(model / "vae" / "diffusion_pytorch_model.safetensors"))
    assert "VAE" in first_line(ran)
    assert ran.out.splitlines()[1].startswith("wanduet runs it.")
