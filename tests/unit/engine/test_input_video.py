"""Video to video through the engine: where it starts, that it resumes, that every strategy makes the same, what is refused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wanduet.config import EngineConfig
from wanduet.doors.cli import resume
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError, InvalidRequestError, OutputError
from wanduet.media import input_video
from wanduet.media.input_video import read_frames
from wanduet.media.latents import load_latents
from wanduet.media.read import read_metadata
from wanduet.media.video import VideoSpec, write_video
from wanduet.request import GenerationRequest
from wanduet.sampling.checkpoint import find_checkpoints
from wanduet.sampling.denoise import StepInfo

SMALL = {"prompt": "a red circle", "height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 5, "seed": 3}
Run = Callable[..., Job]


@pytest.fixture(scope="module")
def engine(config: EngineConfig) -> Iterator[Engine]:
    with Engine(replace(config, devices="cpu", checkpoint_seconds=0.0)) as one:
        yield one


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine frames of 32x48 at 16 a second, without loss: a bright block that moves over a gradient."""
    path = tmp_path_factory.mktemp("clips") / "clip.mkv"
    rows, columns = np.mgrid[0:32, 0:48]
    frames = np.repeat(np.stack((rows * 4, columns * 4, rows + columns), -1)[None].astype(np.uint8), 9, 0)
    for index in range(9):
        frames[index, 8:20, 4 + 3 * index : 16 + 3 * index] = (230, 40, 30)
    write_video([frames], path, VideoSpec(32, 48, codec="ffv1"), {})
    return path


@pytest.fixture
def run(engine: Engine, tmp_path: Path) -> Run:
    def whole(name: str = "a", watch: Any = None, **changes: Any) -> Job:
        output = {key: changes.pop(key) for key in ("resume",) if key in changes}
        request = GenerationRequest(**(SMALL | changes))
        options = OutputOptions(tmp_path / f"{name}.mkv", "ffv1", save_latents=True, **output)
        job = changed.setdefault("engine", engine).submit(request, options, watch=watch)
        changed["job"] = job
        job.result(120)
        return job

    changed: dict[str, Any] = {}
    whole.changed = changed  # type: ignore[attr-defined]
    return whole


def latents(job: Job) -> torch.Tensor:
    return load_latents(job.result().videos[0].latents_path)[0]


def test_strength_1_is_text_to_video_bit_for_bit(run: Run, clip: Path) -> None:
    plain, over = run("plain"), run("over", input_video=str(clip), strength=1.0)
    assert torch.equal(latents(plain), latents(over))


def test_strength_0_gives_the_input_encoded_and_decoded(run: Run, clip: Path) -> None:
    job = run(input_video=str(clip), strength=0.0)
    models = run.changed["engine"].models  # type: ignore[attr-defined]
    frames = np.concatenate(list(read_frames(clip, (32, 48), 9, 16)))
    pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with models.encoder(job.plan, "cpu", job.context) as loaded:
        expected = loaded.encode(pixels)[0]
    assert torch.allclose(latents(job), expected, atol=1e-5)
    (note,) = job.result().warnings
    assert note.startswith("strength 0 of 5 steps leaves no step to make")


def test_what_comes_out_is_nearer_the_lower_the_strength(run: Run, clip: Path) -> None:
    start = latents(run("0", input_video=str(clip), strength=0.0))
    far = [
        float((latents(run(f"{s}", input_video=str(clip), strength=s)) - start).square().mean()) for s in (0.2, 0.6, 1)
    ]
    assert 0 < far[0] < far[1] < far[2]


def test_only_the_schedules_last_steps_are_made(run: Run, clip: Path) -> None:
    seen: list[StepInfo] = []
    job = run(watch=seen.append, input_video=str(clip), strength=0.5)
    assert [info.step for info in seen] == [3, 4]  # floor(5 * 0.5), as in diffusers
    shown = [(event.done, event.total) for event in job.events() if event.phase == "denoise"]
    assert shown[0] == (0, 2)
    assert shown[-1] == (2, 2)
    result = job.result()
    assert result.warnings == ()
    assert list(result.timings)[-5:] == ["encode_video_s", "denoise_s", "decode_s", "write_s", "total_s"]


def test_an_interrupted_job_resumes_bit_for_bit(run: Run, clip: Path, engine: Engine, tmp_path: Path) -> None:
    settings = {"input_video": str(clip), "strength": 0.8}
    whole = run("whole", **settings)

    def stop(info: StepInfo) -> None:
        if info.step == 2:
            run.changed["job"].cancel()  # type: ignore[attr-defined]

    with pytest.raises(CancelledError):
        run("cut", stop, **settings)
    kept = find_checkpoints(engine.config.data_folder / "checkpoints")
    assert any(one.about["request"]["input_video"].startswith("sha256:") for one in kept)
    moved = tmp_path / "moved.mkv"  # the same file in another place is the same video
    moved.write_bytes(clip.read_bytes())
    seen: list[int] = []
    again = run("cut", lambda info: seen.append(info.step), resume=True, **settings | {"input_video": str(moved)})
    assert seen == [3, 4]
    assert torch.equal(latents(again), latents(whole))


def test_another_input_does_not_resume_from_it(run: Run, clip: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.mkv"
    frames = np.full((9, 32, 48, 3), 90, np.uint8)
    write_video([frames], other, VideoSpec(32, 48, codec="ffv1"), {})
    first = latents(run("same", input_video=str(clip), strength=0.6))
    seen: list[int] = []
    second = run("same", lambda info: seen.append(info.step), resume=True, input_video=str(other), strength=0.6)
    assert seen == [2, 3, 4]
    assert not torch.equal(first, latents(second))


def test_the_record_names_the_input_by_its_hash_and_no_path(run: Run, clip: Path) -> None:
    job = run(input_video=str(clip), strength=0.6)
    about = read_metadata(job.result().videos[0].path)
    assert about["request"]["input_video"] == f"sha256:{job.request.input_sha256}"
    assert about["request"]["strength"] == 0.6
    assert clip.parent.name not in str(about)
    plain = read_metadata(run("plain").result().videos[0].path)
    assert not {"input_video", "strength"} & plain["request"].keys()


def test_two_videos_of_one_input_differ_by_their_seeds(run: Run, clip: Path) -> None:
    job = run(input_video=str(clip), strength=0.6, num_videos_per_prompt=2)
    first, second = (load_latents(video.latents_path)[0] for video in job.result().videos)
    alone = latents(run("alone", input_video=str(clip), strength=0.6, seed=SMALL["seed"] + 1))
    assert not torch.equal(first, second)
    assert torch.equal(second, alone)


def test_a_hash_is_no_file_to_start_from(run: Run, clip: Path) -> None:
    with pytest.raises(InvalidRequestError, match="input_video"):
        run(input_video="sha256:" + "0" * 64, strength=0.5)


def test_a_file_that_changes_after_the_submission_is_refused(
    run: Run, clip: Path, engine: Engine, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.mkv"
    mine.write_bytes(clip.read_bytes())
    with engine.models.locks.take("vae"):  # the encode waits
        request = GenerationRequest(**SMALL | {"input_video": str(mine), "strength": 0.5})
        job = engine.submit(request, OutputOptions(tmp_path / "a.mkv", "ffv1"))
        mine.write_bytes(clip.read_bytes() + b"\0")
    with pytest.raises(InvalidRequestError, match="changed"):
        job.result(60)


def test_a_relative_path_stays_the_same_file_in_another_folder(
    run: Run, clip: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clip.parent)
    with engine.models.locks.take("vae"):  # the encode waits
        request = GenerationRequest(**SMALL | {"input_video": clip.name, "strength": 0.2})
        job = engine.submit(request, OutputOptions(tmp_path / "a.mkv", "ffv1"))
        monkeypatch.chdir(tmp_path)
    assert job.result(60).videos[0].path.exists()


def test_an_output_that_would_replace_the_input_is_refused(run: Run, clip: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine-2.mkv"
    mine.write_bytes(clip.read_bytes())
    with pytest.raises(OutputError, match="would be lost"):
        run("mine", input_video=str(mine), num_videos_per_prompt=2)
    assert mine.read_bytes() == clip.read_bytes()


def test_a_resume_reads_its_input_once_however_many_checkpoints_there_are(
    clip: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, hashed = [], input_video._hash
    monkeypatch.setattr(input_video, "_hash", lambda file: read.append(file.name) or hashed(file))
    others = [SimpleNamespace(about={"request": {}, "model": engine.models.about})] * 20
    monkeypatch.setattr(resume, "find_checkpoints", lambda folder: others)
    request = GenerationRequest(**SMALL | {"input_video": str(clip)})
    assert resume.seed_of_interrupted(request, OutputOptions(tmp_path / "a.mkv"), engine) is None
    assert len(read) == 1


def test_placed_makes_the_same_bits(run: Run, clip: Path, config: EngineConfig) -> None:
    """Ranks: test_strategies.py."""
    settings = {"input_video": str(clip), "strength": 0.6}
    single = run("single", **settings)
    with Engine(replace(config, devices="vae=cpu,transformer=cpu")) as other:
        run.changed["engine"] = other  # type: ignore[attr-defined]
        assert torch.equal(latents(run("placed", **settings)), latents(single))


def test_the_next_text_to_video_is_as_before(run: Run, clip: Path) -> None:
    before = latents(run("before"))
    run("between", input_video=str(clip), strength=0.4)
    assert torch.equal(latents(run("after")), before)
