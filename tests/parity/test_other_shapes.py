"""Checkpoints that have no preset's shapes: every number comes from their configs, every file from their index."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline as Oracle

import wanduet
from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.engine.tools import decode_latents
from wanduet.media.read import frame_hashes
from wanduet.request import GenerationRequest

CALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3, "negative_prompt": ""}
FEW_CHANNELS = {
    "transformer": {"in_channels": 4, "out_channels": 4, "num_attention_heads": 3, "attention_head_dim": 14},
    "vae": {"z_dim": 4, "latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 2.0, 1.0], "base_dim": 6},
}
OTHERS: list[dict[str, Any]] = [
    FEW_CHANNELS,
    {"transformer": {"patch_size": (1, 1, 1), "num_layers": 1, "eps": 1e-5}, "vae": {"num_res_blocks": 2}},
    {
        "transformer": {"text_dim": 40},
        "encoder": {"d_model": 40, "d_kv": 6, "num_heads": 3, "num_layers": 1, "relative_attention_num_buckets": 16,
                    "relative_attention_max_distance": 64, "layer_norm_epsilon": 1e-5},
    },
    {"max_shard_size": "40KB"},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHERS, ids=["channels", "patch", "encoder", "shards"])
def test_the_same_frames_as_diffusers(write_model, tmp_path: Path, other: dict[str, Any]) -> None:
    model = write_model(tmp_path / "model", **other)
    if "max_shard_size" in other:
        index = json.loads((model / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 2
    oracle = Oracle.from_pretrained(model)
    oracle.set_progress_bar_config(disable=True)
    pipe = wanduet.WanPipeline.from_pretrained(model, data_dir=tmp_path / "data")
    frames = [
        which("a red circle", generator=torch.Generator().manual_seed(3), **CALL).frames for which in (oracle, pipe)
    ]
    assert frames[0].shape == frames[1].shape
    assert np.abs(frames[0] - frames[1]).max() <= 1 / 255


def test_a_whole_job_with_other_channels(write_model, tmp_path: Path) -> None:
    config = EngineConfig(model=str(write_model(tmp_path / "model", **FEW_CHANNELS)), data_dir=tmp_path / "data")
    request = GenerationRequest(prompt="a red circle", seed=1, **CALL)
    with Engine(config) as engine:
        done = engine.submit(request, OutputOptions(tmp_path / "clip.mkv", "ffv1", save_latents=True)).result()
    (video,) = done.videos
    assert video.latents_path is not None
    again = decode_latents(config, video.latents_path, OutputOptions(tmp_path / "again.mkv", "ffv1"))
    assert frame_hashes(again.videos[0].path) == frame_hashes(video.path)
