"""The miniature with 8-bit weights: the same bits whoever makes a video, close to the full weights' video, and recorded."""

from dataclasses import replace
from pathlib import Path
from shutil import copytree, ignore_patterns

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanduet.config import EngineConfig
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.media.latents import load_latents
from wanduet.media.read import frame_hashes, read_frames, read_metadata
from wanduet.request import GenerationRequest
from wanduet.weights.hub import open_model

REQUEST = {"prompt": "a red circle", "height": 48, "width": 32, "num_frames": 9, "num_inference_steps": 4, "seed": 5}


def run(config: EngineConfig, path: Path, steps: int = 4, **options) -> tuple[Job, list[int]]:
    done: list[int] = []
    with Engine(config) as engine:
        output = OutputOptions(path, "ffv1", save_latents=True, **options)
        request = GenerationRequest(**REQUEST | {"num_inference_steps": steps})
        job = engine.submit(request, output, watch=lambda info: done.append(info.step))
        job.result(120)
        return job, done


def latents(path: Path):
    return load_latents(Path(f"{path}.latents.safetensors"))[0]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EngineConfig:
    return EngineConfig(model="miniature", devices="cpu", weights="q8", data_dir=tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(config, tmp_path_factory) -> Path:
    """One video with 8-bit weights and one with full ones."""
    folder = tmp_path_factory.mktemp("made")
    run(config, folder / "q8.mkv")
    run(replace(config, weights="auto"), folder / "full.mkv")
    return folder


def test_the_video_is_close_to_that_of_the_full_weights(made) -> None:
    full, small = (np.stack(list(read_frames(made / f"{name}.mkv"))).astype(float) for name in ("full", "q8"))
    error = ((full - small) ** 2).mean()
    assert error > 0
    assert 10 * np.log10(255**2 / error) > 30
    exact, got = (latents(made / f"{name}.mkv") for name in ("full", "q8"))
    assert 0 < (got - exact).norm() / exact.norm() < 0.1


def test_placed_gives_the_same_bits(config, made, tmp_path) -> None:
    run(replace(config, devices="vae=cpu,transformer=cpu"), tmp_path / "a.mkv")
    assert frame_hashes(tmp_path / "a.mkv").digest == frame_hashes(made / "q8.mkv").digest


def test_two_ranks_give_the_same_latents(config, made, tmp_path) -> None:
    job, _ = run(replace(config, devices="cpu,cpu", strategy="parallel"), tmp_path / "a.mkv")
    assert job.plan.group.layout.cfg == 2
    expected = latents(made / "q8.mkv")
    assert (latents(tmp_path / "a.mkv") - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_format_is_recorded_if_it_is_not_the_default(made) -> None:
    small, full = (read_metadata(made / f"{name}.mkv")["engine"] for name in ("q8", "full"))
    assert small["weights"] == "q8"
    assert "weights" not in full
    assert {"setting": "weights", "value": "q8"} in small["choices"]


def test_a_video_of_the_other_format_is_made_again(config, made, tmp_path) -> None:
    """Neither the finished video nor its latents belong to an engine with other weights."""
    path = tmp_path / "a.mkv"
    run(config, path)
    assert run(config, path, resume=True)[1] == []
    _, steps = run(replace(config, weights="auto"), path, resume=True)
    assert steps == [0, 1, 2, 3]
    assert frame_hashes(path).digest == frame_hashes(made / "full.mkv").digest
    _, steps = run(config, path, resume=True)
    assert steps == [0, 1, 2, 3]
    assert read_metadata(path)["engine"]["weights"] == "q8"


def test_weights_that_are_stored_in_fp8_give_the_video_of_their_dequantised_ones(tmp_path) -> None:
    """Also when they stay in fp8 on the device, to rounding."""
    names = ("stored", "dense")
    for name in names:
        copytree(open_model("miniature").path, tmp_path / name, ignore=ignore_patterns("manifest.json"))
        [path] = (tmp_path / name / "transformer").glob("*.safetensors")
        tensors: dict[str, torch.Tensor] = {}
        for key, tensor in load_file(path).items():
            if tensor.ndim == 2 and key.startswith("blocks."):
                scale = tensor.abs().max().float() / 448
                small = (tensor / scale).to(torch.float8_e4m3fn)
                new = (
                    {key: small, f"{key[:-6]}scale_weight": scale} if name == "stored" else {key: small.float() * scale}
                )
                tensors |= new
            else:
                tensors[key] = tensor
        save_file(tensors, path)
    config = EngineConfig(model="miniature", devices="cpu", data_dir=tmp_path / "data")
    for name, weights in (*((name, "auto") for name in names), ("stored", "fp8")):
        run(replace(config, model=str(tmp_path / name), weights=weights), tmp_path / f"{name} {weights}.mkv", steps=1)
    digests = [frame_hashes(tmp_path / f"{name} auto.mkv").digest for name in names]
    assert digests[0] == digests[1]
    expected, kept = (latents(tmp_path / f"stored {weights}.mkv") for weights in ("auto", "fp8"))
    assert (kept - expected).norm() < 1e-4 * expected.norm()
