import dataclasses
import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wanduet.family.wan21 import WAN_1_3B
from wanduet.media import provenance
from wanduet.media.files import UnreadableFileError
from wanduet.media.latents import save_latents
from wanduet.media.provenance import (
    Making,
    from_json,
    make_provenance,
    summary,
    tags,
    title,
    to_json,
    versions,
    x264_version,
)
from wanduet.media.read import probe, read_metadata
from wanduet.media.video import VideoSpec, write_video
from wanduet.request import GenerationRequest, ResolvedRequest

NASTY = "She said \"hi\"\\n'quoted'\n\ttab\r\n = ; # \x00\x1b[31m <b>&amp;</b> 猫がいる 🐈‍⬛ ünï " + "长" * 1200
PROMPTS = ["a cat", NASTY, (NASTY * 4)[:4000], "=", "  spaces  "]


def resolved(prompt: str = "a cat") -> ResolvedRequest:
    return GenerationRequest.parse(prompt=prompt, seed=7, num_frames=5, height=64, width=96).resolve(WAN_1_3B)


MOMENT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def made(prompt: str = "a cat", created_at: datetime = MOMENT, **more) -> dict:
    values = {
        "seed": 8,
        "model": {"name": "Wan2.1-T2V-1.3B", "hash": "sha256:ab", "revision": None},
        "engine": {"strategy": "single", "transformer_dtype": torch.bfloat16},
    }
    versions = {"wanduet": "0.1.0", "torch": "2.13.0"}
    return make_provenance(resolved(prompt), Making(**(values | more)), versions, created_at)


def test_holds_all_that_is_needed_to_make_it_again() -> None:
    found = made(
        hardware=["NVIDIA H100"], attention="flash", timings={"denoise_s": 1.5}, notes=("strips",), warnings=["cut"]
    )
    assert ResolvedRequest(**found["request"]).as_request().resolve(WAN_1_3B) == resolved()
    assert found["schema"] == 1
    assert found["seed"] == 8
    assert found["created_at"] == "2026-01-02T03:04:05+00:00"
    assert found["engine"] == {"strategy": "single", "transformer_dtype": "torch.bfloat16"}
    assert (found["hardware"], found["attention"], found["rungs"], found["warnings"]) == (
        ["NVIDIA H100"], "flash", ["strips"], ["cut"],
    )  # fmt: skip
    assert json.loads(to_json(found)) == found


def test_is_a_pure_function_in_utc() -> None:
    east = datetime(2026, 1, 2, 5, 4, 5, tzinfo=timezone(timedelta(hours=2)))
    assert made() == made(created_at=east)


def test_odd_values_become_json() -> None:
    @dataclasses.dataclass
    class Choice:
        setting: str
        folder: Path

    found = made(engine={"choice": Choice("x", Path("a")), 3: {1}, "nan": float("nan"), "limit": None, "on": True})
    assert found["engine"] == {
        "choice": {"setting": "x", "folder": "a"}, "3": [1], "nan": None, "limit": None, "on": True,
    }  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.webm", "a.safetensors"])
def test_metadata_survives_each_container(tmp_path, prompt, name) -> None:
    expected = made(prompt)
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_latents(path, torch.zeros(16, 2, 8, 12), expected)
    else:
        codec = {".mkv": "ffv1", ".webm": "vp9"}.get(path.suffix, "h264")
        write_video(np.zeros((2, 64, 96, 3), np.uint8), path, VideoSpec(64, 96, codec=codec), expected)
        assert probe(path)["num_frames"] == 2
    got = read_metadata(path)
    assert (got.pop("latents_sha256", None) is not None) == (path.suffix == ".safetensors")
    assert got == expected
    assert got["request"]["prompt"] == prompt


@settings(max_examples=40, deadline=None)
@given(prompt=st.text(min_size=1).filter(str.strip))
def test_any_prompt_survives_json_and_fits_a_title(prompt) -> None:
    found = made(prompt)
    assert from_json(to_json(found)) == found
    assert to_json(found).isascii()
    short = title(prompt)
    assert len(short) <= 120
    assert "\n" not in short
    short.encode()


def test_tags_for_players() -> None:
    found = tags(made("a cat\non a mat"))
    assert found["title"] == "a cat on a mat"
    assert found["software"].startswith("wanduet ")
    assert found["comment"] == ("Wan2.1-T2V-1.3B, seed 8, 96x64, 5 frames, 50 steps, guidance 6, shift 8, unipc")
    assert title("x" * 500) == "x" * 119 + "…"
    assert summary({}) == ""
    assert set(tags({"note": 1})) == {"software", "wanduet"}


def test_a_summary_names_the_strength_and_skips_what_is_of_another_type() -> None:
    request = {"strength": 0.5, "width": 32, "height": 16, "guidance_scale": "high", "flow_shift": None}
    assert summary({"request": request, "model": {"name": "m"}}) == "m, 32x16, strength 0.5 over an input video"


def test_file_without_metadata_is_said_to_have_none(tmp_path) -> None:
    path = write_video(np.zeros((2, 64, 96, 3), np.uint8), tmp_path / "a.mp4").path
    with pytest.raises(UnreadableFileError, match="says nothing about how it was made"):
        read_metadata(path)


def test_spoilt_metadata_is_said_to_be_damaged(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(provenance, "to_json", lambda _value: '{"half":')
    path = write_video(np.zeros((2, 64, 96, 3), np.uint8), tmp_path / "a.mp4", metadata={}).path
    with pytest.raises(UnreadableFileError, match="damaged"):
        read_metadata(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.mp4", b""),
        ("a.mp4", b"not a video at all" * 100),
        ("a.mkv", bytes(1000)),
        ("a.safetensors", b""),
        ("a.safetensors", b"\xff" * 64),
        ("a.safetensors", (2).to_bytes(8, "little") + b"[]"),
        ("a.safetensors", (9).to_bytes(8, "little") + b'{"a": 1'),
    ],
)
def test_foreign_files_are_refused(tmp_path, name, content) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableFileError, match=name):
        read_metadata(tmp_path / name)


def test_a_list_of_other_files_is_not_followed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(np.zeros((2, 64, 96, 3), np.uint8), tmp_path / "secret.mp4", metadata=made())
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(UnreadableFileError, match="a text file, not a video"):
        probe(tmp_path / "a.mp4")


def test_missing_file_and_folder_are_refused(tmp_path) -> None:
    with pytest.raises(UnreadableFileError, match="No such file"):
        read_metadata(tmp_path / "a.mp4")
    with pytest.raises(UnreadableFileError, match="Cannot read"):
        read_metadata(tmp_path)


def test_truncated_video_is_refused(tmp_path) -> None:
    path = write_video(np.zeros((9, 64, 96, 3), np.uint8), tmp_path / "a.mp4", metadata=made()).path
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UnreadableFileError, match=r"a\.mp4"):
        probe(path)


def test_versions_name_what_makes_pixels() -> None:
    found = versions()
    assert {"wanduet", "torch", "python", "diffusers", "av", "numpy", "ffmpeg", "x264"} <= set(found)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(isinstance(value, str) for value in found.values())
    assert (x264_version() or "").split()[0].isdigit()


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\nGCC version: gcc 12.2.0\n",
    ],
)
def test_driver_version(tmp_path, monkeypatch, text) -> None:
    monkeypatch.setattr(provenance, "_DRIVER_FILE", tmp_path / "version")
    assert "driver" not in versions()
    (tmp_path / "version").write_text(text)
    assert versions()["driver"] == "550.54.15"


def test_importing_it_loads_nothing_heavy() -> None:
    code = (
        "import sys, wanduet.media.provenance as p, wanduet.media.files; p.versions();"
        "print([m for m in ('torch', 'av', 'PIL', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
