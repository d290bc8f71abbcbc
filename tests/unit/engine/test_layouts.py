"""Videos of a model whose weights come from files of other layouts: the same frames."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.weight_files import ALL_IN_ONE, prefixed, tensors_of
from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.media.latents import load_latents
from wanduet.media.read import frame_hashes, read_metadata
from wanduet.request import GenerationRequest
from wanduet.weights.hub import open_model

SMALL = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "seed": 3, "num_inference_steps": 2}


def test_files_of_three_layouts_give_the_same_video(config: EngineConfig, tmp_path: Path) -> None:
    model = open_model("miniature")
    files = {name: tmp_path / f"{name}.{end}" for name, end in (("transformer", "safetensors"), ("vae", "pth"))}
    save_file(prefixed(ALL_IN_ONE["transformer"], tensors_of(model, "transformer")), files["transformer"])
    torch.save(tensors_of(model, "vae"), files["vae"])
    files["text_encoder"] = tmp_path / "text.safetensors"
    save_file(tensors_of(model, "text_encoder"), files["text_encoder"])
    made = {}
    for name, settings in (("own", config), ("files", replace(config, **files))):
        path = tmp_path / f"{name}.mkv"
        with Engine(settings) as engine:
            engine.submit(GenerationRequest(**SMALL), OutputOptions(path, "ffv1", save_latents=True)).result(120)
        made[name] = read_metadata(path), load_latents(Path(f"{path}.latents.safetensors"))[0], path
    (own, latents, path_of_own), (other, others, path_of_other) = made["own"], made["files"]
    torch.testing.assert_close(others, latents, rtol=0, atol=0)
    assert frame_hashes(path_of_own) == frame_hashes(path_of_other)
    assert (own["model"]["name"], other["model"]["name"]) == ("miniature", "transformer")
    assert own["model"]["hash"] != other["model"]["hash"]
