"""Jobs that end with their latents, and engines that find them."""

from pathlib import Path

from wanduet.config import EngineConfig
from wanduet.engine.job import JobResult, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.media.read import FrameHashes, frame_hashes
from wanduet.request import GenerationRequest

SMALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4, "seed": 3}


def run(engine: Engine, path: Path, decode: bool = True, **changes: object) -> JobResult:
    request = GenerationRequest(**({"prompt": "a red circle on a black background"} | SMALL | changes))
    output = OutputOptions(path, codec="ffv1", save_latents=True, resume=True)
    return engine.submit(request, output, decode=decode).result(120)


def pixels(result: JobResult) -> list[FrameHashes]:
    return [frame_hashes(video.path) for video in result.videos]


def test_latents_become_the_video_that_they_would_have_become_at_once(engine: Engine, tmp_path: Path) -> None:
    whole = run(engine, tmp_path / "whole.mkv")
    left = run(engine, tmp_path / "left.mkv", decode=False)
    assert left.videos == ()
    assert [path.name for path in tmp_path.glob("left*")] == ["left.mkv.latents.safetensors"]
    made = run(engine, tmp_path / "left.mkv")
    assert pixels(made) == pixels(whole)
    about, before = made.videos[0].provenance, whole.videos[0].provenance
    assert about["attention"] == before["attention"]
    assert about["engine"]["kernels"] == before["engine"]["kernels"]
    assert about["engine"]["transformer_dtype"] == before["engine"]["transformer_dtype"]


def test_what_was_said_of_the_prompt_is_not_forgotten(engine: Engine, tmp_path: Path) -> None:
    long = "a red circle " * 300
    left = run(engine, tmp_path / "v.mkv", decode=False, prompt=long)
    made = run(engine, tmp_path / "v.mkv", prompt=long)
    assert left.warnings
    assert made.warnings == left.warnings


def test_an_engine_that_finds_all_latents_only_decodes(config: EngineConfig, tmp_path: Path) -> None:
    with Engine(config) as first:
        run(first, tmp_path / "v.mkv", decode=False, num_videos_per_prompt=2)
    with Engine(config) as second:
        made = run(second, tmp_path / "v.mkv", num_videos_per_prompt=2)
        assert second.models.transformer.loaded is None
        assert second.models.prompts._current is None
    assert len(made.videos) == 2


def test_videos_that_are_there_are_kept_by_a_job_that_ends_with_latents(engine: Engine, tmp_path: Path) -> None:
    made = run(engine, tmp_path / "v.mkv", num_videos_per_prompt=2)
    made.videos[1].path.unlink()
    (tmp_path / "v-2.mkv.latents.safetensors").unlink(missing_ok=True)
    left = run(engine, tmp_path / "v.mkv", decode=False, num_videos_per_prompt=2)
    assert [video.path for video in left.videos] == [made.videos[0].path]
    assert (tmp_path / "v-2.mkv.latents.safetensors").exists()
