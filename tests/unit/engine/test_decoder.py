"""Latents that are left to another worker become the video that they would have become where they were made."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wanduet.config import GIB, EngineConfig
from wanduet.engine.decoder import Decoder
from wanduet.engine.job import JobResult, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import LatentsGoneError
from wanduet.media.read import FrameHashes, frame_hashes
from wanduet.media.video import VideoSpec, write_video
from wanduet.planning.hardware import parse_hardware
from wanduet.planning.planner import make_decode_plan, make_plan
from wanduet.request import GenerationRequest
from wanduet.runtime.models import Models

SMALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4, "seed": 3}


def run(engine: Engine, path: Path, leave_decode: Callable[[], bool] | None = None, **changes: object) -> JobResult:
    request = GenerationRequest(**({"prompt": "a red circle on a black background"} | SMALL | changes))
    output = OutputOptions(path, codec="ffv1", save_latents=True, resume=True)
    return engine.submit(request, output, leave_decode=leave_decode).result(120)


def pixels(result: JobResult) -> list[FrameHashes]:
    return [frame_hashes(video.path) for video in result.videos]


def test_what_is_left_is_decoded_elsewhere_to_the_same_video_without_a_transformer(
    engine: Engine, config: EngineConfig, tmp_path: Path
) -> None:
    whole = run(engine, tmp_path / "whole.mkv")
    left = run(engine, tmp_path / "left.mkv", lambda: True)
    assert left.videos == ()
    assert [path.name for path in tmp_path.glob("left*")] == ["left.mkv.latents.safetensors"]
    with Decoder(config) as decoder:
        made = run(decoder, tmp_path / "left.mkv")
        assert decoder.models.transformer.loaded is None
        assert decoder.models.prompts._current is None
    assert pixels(made) == pixels(whole)
    about, before = made.videos[0].provenance, whole.videos[0].provenance
    assert about["attention"] == before["attention"]
    assert about["engine"]["transformer_dtype"] == before["engine"]["transformer_dtype"]
    assert made.timings["denoise_s"] == pytest.approx(left.timings["denoise_s"], abs=0.001)


def test_a_decoder_needs_no_input_video(engine: Engine, config: EngineConfig, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mkv"
    write_video([np.zeros((9, 32, 48, 3), np.uint8)], clip, VideoSpec(32, 48, codec="ffv1"), {})
    run(engine, tmp_path / "left.mkv", lambda: True, input_video=str(clip))
    digest = f"sha256:{hashlib.sha256(clip.read_bytes()).hexdigest()}"
    clip.unlink()
    with Decoder(config) as decoder:
        (made,) = run(decoder, tmp_path / "left.mkv", input_video=digest, strength=0.8).videos
    assert made.provenance["request"]["input_video"] == digest


def test_what_was_said_of_the_prompt_is_not_forgotten(engine: Engine, config: EngineConfig, tmp_path: Path) -> None:
    long = "a red circle " * 300
    left = run(engine, tmp_path / "v.mkv", lambda: True, prompt=long)
    with Decoder(config) as decoder:
        made = run(decoder, tmp_path / "v.mkv", prompt=long)
    assert left.warnings
    assert made.warnings == left.warnings


def test_an_engine_that_finds_all_latents_only_decodes(config: EngineConfig, tmp_path: Path) -> None:
    with Engine(config) as first:
        run(first, tmp_path / "v.mkv", lambda: True, num_videos_per_prompt=2)
    with Engine(config) as second:
        made = run(second, tmp_path / "v.mkv", num_videos_per_prompt=2)
        assert second.models.transformer.loaded is None
    assert len(made.videos) == 2


def test_if_the_decoder_is_gone_before_the_last_video_all_are_decoded_here(engine: Engine, tmp_path: Path) -> None:
    answers = iter([True, False])
    made = run(engine, tmp_path / "v.mkv", lambda: next(answers), num_videos_per_prompt=3)
    assert [video.seed for video in made.videos] == [3, 4, 5]
    assert list(answers) == []


def test_a_decoder_without_latents_says_so(config: EngineConfig, tmp_path: Path) -> None:
    with Decoder(config) as decoder, pytest.raises(LatentsGoneError):
        run(decoder, tmp_path / "nothing.mkv")


def test_a_card_that_cannot_hold_the_transformer_decodes_in_the_fastest_mode_that_fits() -> None:
    config = EngineConfig(model="random:14b")
    models = Models(config)
    request = GenerationRequest(prompt="x", height=480, width=832, num_frames=81, seed=0).resolve(models.spec)
    small, large = (parse_hardware(f"{gpus},ram=16GiB") for gpus in ("1x4GiB", "1x24GiB"))
    assert not make_plan(request, models.memory, config, small, nearest=False).prediction.fits
    plans = [make_decode_plan(request, models.memory, config, hardware) for hardware in (small, large)]
    for plan in plans:
        assert plan.prediction.fits
        assert 0 < plan.prediction.devices[0].peak <= plan.prediction.devices[0].limit_bytes
        assert plan.prediction.seconds.denoise == 0 < plan.prediction.seconds.decode
        assert plan.prediction.host_bytes < 3 * GIB  # what a strip hands on waits there
    assert plans[0].vae.tiling.num_tiles > plans[1].vae.tiling.num_tiles == 1
    assert not make_decode_plan(request, models.memory, config, parse_hardware("1x1GiB,ram=16GiB")).prediction.fits
