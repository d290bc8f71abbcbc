"""LoRA together with what changes weights, steps or guidance otherwise, and with faults in between."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.engine.test_lora import write_lora
from tests.weight_files import prefixed, tensors_of
from wanduet.config import EngineConfig
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError
from wanduet.media.latents import load_latents
from wanduet.models.dit.model import WanTransformer
from wanduet.request import GenerationRequest
from wanduet.runtime.loaded import LoadedTransformer
from wanduet.weights.hub import open_model

FIELDS = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 6, "seed": 3}
ALL = {"num_inference_steps": 12, "guidance_interval": "0.2-0.7", "guidance_mode": "apg", "step_cache": "easycache:0.4"}
LOW = {"height": 96, "width": 96, "flow_shift": 20.0, "low_res_first": True, "guidance_mode": "apg"}


@pytest.fixture(scope="module")
def loras(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("loras")
    return str(write_lora(folder / "a.safetensors", 1, size=0.1)), str(
        write_lora(folder / "b.safetensors", 2, size=0.1)
    )


@pytest.fixture(scope="module")
def by_steps(loras: tuple[str, str]) -> list[str]:
    return [f"{loras[0]}:1@0-0.5", f"{loras[1]}:1@0.25-1"]


@pytest.fixture(scope="module")
def single(config: EngineConfig) -> Iterator[Engine]:
    with Engine(replace(config, checkpoint_seconds=0.0)) as engine:
        yield engine


@pytest.fixture(scope="module")
def ranks(config: EngineConfig) -> Iterator[Engine]:
    with Engine(replace(config, devices="cpu,cpu", strategy="parallel", checkpoint_seconds=0.0)) as engine:
        yield engine


def run(engine: Engine, path: Path, after: int | None = None, resume: bool = False, **fields: Any) -> Job:
    jobs: list[Job] = []

    def watch(info: Any) -> None:
        if info.step + 1 == after:
            jobs[0].cancel()

    output = OutputOptions(path, "ffv1", save_latents=True, resume=resume)
    jobs.append(engine.submit(GenerationRequest.parse(**(FIELDS | fields)), output, watch=watch))
    jobs[0].result(120)
    return jobs[0]


def latents(job: Job) -> torch.Tensor:
    return load_latents(job.result().videos[0].latents_path)[0]


@pytest.mark.parametrize(("by", "fields"), [("single", LOW), ("ranks", ALL)])
def test_an_interrupted_job_goes_on_bit_for_bit(
    by: str, fields: dict[str, Any], by_steps: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Cut where both LoRAs are merged, so that a resume begins with another set than the job did."""
    engine = request.getfixturevalue(by)
    whole = run(engine, tmp_path / "whole.mkv", loras=by_steps, **fields)
    with pytest.raises(CancelledError):
        run(engine, tmp_path / "cut.mkv", after=3, loras=by_steps, **fields)
    again = run(engine, tmp_path / "cut.mkv", resume=True, loras=by_steps, **fields)
    assert torch.equal(latents(again), latents(whole))
    if by == "ranks":
        assert whole.result().videos[0].provenance["skipped_steps"]
        alone = run(request.getfixturevalue("single"), tmp_path / "alone.mkv", loras=by_steps, **fields)
        assert torch.allclose(latents(alone), latents(whole), atol=2e-5)


def test_nan_and_memory_that_is_short_between_two_sets(
    single: Engine, by_steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps are made again with the set of each; the job after has the base."""
    whole, base = run(single, tmp_path / "whole.mkv", loras=by_steps), run(single, tmp_path / "base.mkv")
    forward, calls = WanTransformer.forward_cfg, iter(range(1000))

    def forward_cfg(self: WanTransformer, *given: Any, **more: Any) -> Any:
        call = next(calls)
        if call == 2:
            raise torch.OutOfMemoryError("too little. For this test")
        return [velocity * (torch.nan if call == 5 else 1) for velocity in forward(self, *given, **more)]

    monkeypatch.setattr(WanTransformer, "forward_cfg", forward_cfg)
    monkeypatch.setattr(LoadedTransformer, "use_plain_kernels", lambda self: True)
    job = run(single, tmp_path / "again.mkv", loras=by_steps)
    assert job.notes == ["denoise: emptied cache", "denoise: plain kernels after NaN at step 5"]
    assert torch.equal(latents(job), latents(whole))
    assert torch.equal(latents(run(single, tmp_path / "after.mkv")), latents(base))


@pytest.mark.parametrize("weights", ["auto", "q8"])
def test_weights_of_another_layout_in_8_bits_with_scales(
    config: EngineConfig, loras: tuple[str, str], weights: str, tmp_path: Path
) -> None:
    """The base comes back bit for bit, and a resume takes latents of the same files only."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors_of(open_model("miniature"), "transformer").items():
        state[name] = tensor
        if tensor.ndim == 2 and name.startswith("blocks."):
            scale = tensor.float().abs().max() / 448
            state[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            state[name.removesuffix("weight") + "scale_weight"] = scale
    save_file(prefixed("model.diffusion_model.", state), tmp_path / "t.safetensors")
    with Engine(replace(config, transformer=tmp_path / "t.safetensors", weights=weights)) as engine:
        short = {"num_inference_steps": 2}
        base = latents(run(engine, tmp_path / "base.mkv", **short))
        job = run(engine, tmp_path / "lora.mkv", loras=[loras[0]], **short)
        assert not latents(job).equal(base)
        assert latents(run(engine, tmp_path / "after.mkv", **short)).equal(base)
        output = OutputOptions(tmp_path / "lora.mkv", "ffv1", save_latents=True)
        same = GenerationRequest.parse(**(FIELDS | short), loras=[loras[0]])
        assert engine.is_finished(same, output)
    with Engine(replace(config, weights=weights)) as other:
        assert not other.is_finished(same, output)
