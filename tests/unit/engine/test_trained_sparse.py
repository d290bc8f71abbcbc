"""Weights that are trained for sparse attention (VSA, SLA) through the engine, whoever runs them. (Formulas: unit/models.)"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.engine.test_lora import write_lora
from wanduet.config import EngineConfig
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError, ConfigError
from wanduet.family.registry import RANDOM_SPECS
from wanduet.kernels import verdicts
from wanduet.kernels.attention import sparse_steps
from wanduet.kernels.attention.sparse import KeyLists, plain_listed
from wanduet.media.latents import load_latents
from wanduet.media.read import read_metadata
from wanduet.planning.cost import denoise_flop
from wanduet.planning.hardware import parse_hardware
from wanduet.planning.planner import make_plan
from wanduet.request import GenerationRequest
from wanduet.runtime.models import Models
from wanduet.weights.hub import open_model

# 2 x 6 x 6 tokens: four tiles, each cut in another way; one block of 128 queries and two of 64 keys.
SMALL = {
    "prompt": "a red circle",
    "height": 96,
    "width": 96,
    "num_frames": 5,
    "seed": 5,
    "timesteps": (1000, 757, 522),
}
STRATEGIES = {
    "placed": {"devices": "vae=cpu,transformer=cpu"},
    "parallel": {"strategy": "parallel", "devices": "cpu,cpu"},
}


@pytest.fixture(scope="module", params=["vsa", "sla"])
def config(request, tmp_path_factory) -> EngineConfig:
    """Of the miniature with gates or projections of random values."""
    miniature, path = open_model("miniature"), tmp_path_factory.mktemp(request.param)
    copytree(miniature.path, path / "model", ignore=ignore_patterns("manifest.json", "generation_defaults.json"))
    weights = path / "model" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors, spec = load_file(weights), miniature.spec.transformer
    torch.manual_seed(0)
    for block in range(spec.num_layers):
        name, size = f"blocks.{block}.to_gate_compress", spec.dim
        if request.param == "sla":
            name, size = f"blocks.{block}.attn1.attn_op.local_attn.proj_l", spec.attention_head_dim
        tensors |= {f"{name}.weight": torch.randn(size, size) * 0.1, f"{name}.bias": torch.randn(size) * 0.1}
    save_file(tensors, weights)
    return EngineConfig(
        model=str(path / "model"), devices="cpu", data_dir=path / "data", checkpoint_seconds=0.0, strategy="single"
    )


@pytest.fixture(scope="module")
def engine(config: EngineConfig) -> Iterator[Engine]:
    with Engine(config) as one:
        yield one


def run(engine: Engine, path: Path, after: int | None = None, resume: bool = False, **fields: Any) -> Job:
    """Run a job; `after`: cancel it after so many steps."""
    jobs: list[Job] = []

    def watch(info: Any) -> None:
        if info.step + 1 == after:
            jobs[0].cancel()

    output = OutputOptions(path, "ffv1", save_latents=True, resume=resume)
    jobs.append(engine.submit(GenerationRequest(**(SMALL | fields)), output, watch=watch))
    jobs[0].result(120)
    return jobs[0]


def latents(job: Job) -> torch.Tensor:
    return load_latents(job.result().videos[0].latents_path)[0]


@pytest.fixture(scope="module")
def made(engine: Engine, tmp_path_factory) -> Job:
    return run(engine, tmp_path_factory.mktemp("made") / "a.mkv")


def test_every_step_and_block_is_sparse_by_the_weights_share_or_the_requests(
    engine: Engine, made: Job, tmp_path: Path, key_lists: list[KeyLists]
) -> None:
    again, other = run(engine, tmp_path / "a.mkv"), run(engine, tmp_path / "b.mkv", sparse=0.7)
    layers, is_vsa = engine.models.spec.transformer.num_layers, engine.models.spec.transformer.attention == "vsa"
    assert [lists.index.shape[3] for lists in key_lists] == [1] * 3 * layers + [3 if is_vsa else 1] * 3 * layers
    assert torch.equal(latents(again), latents(made))
    assert torch.equal(latents(other), latents(made)) != is_vsa
    about = read_metadata(made.result().videos[0].path)
    assert about["attention"] == f"sdpa+{engine.models.spec.transformer.attention} plain"
    assert "sparse" not in about["request"]  # it is no approximation
    assert read_metadata(other.result().videos[0].path)["request"]["sparse"] == 0.7
    (choice,) = [one for one in made.plan.as_dict()["choices"] if one["setting"] == "sparse"]
    assert choice["why"].startswith("as these weights are trained: self-attention reads")
    assert made.request.sampler == "renoise"


def test_a_lora_is_merged_and_taken_out_again(engine: Engine, made: Job, tmp_path: Path) -> None:
    path = str(write_lora(tmp_path / "a.safetensors", 1))
    assert not torch.equal(latents(run(engine, tmp_path / "a.mkv", loras=(path,))), latents(made))
    assert torch.equal(latents(run(engine, tmp_path / "b.mkv")), latents(made))


def test_an_interrupted_job_goes_on_bit_for_bit(engine: Engine, made: Job, tmp_path: Path) -> None:
    with pytest.raises(CancelledError):
        run(engine, tmp_path / "a.mkv", after=1)
    assert torch.equal(latents(run(engine, tmp_path / "a.mkv", resume=True)), latents(made))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_devices_give_the_same(config: EngineConfig, made: Job, tmp_path: Path, strategy: str) -> None:
    with Engine(replace(config, **({"strategy": "auto"} | STRATEGIES[strategy]))) as engine:
        job = run(engine, tmp_path / "a.mkv")
    assert job.plan.strategy == strategy
    assert job.plan.group.layout.ulysses == (2 if strategy == "parallel" else 1)
    # Other keys, or another rank's heads, would change them by a thousand times as much.
    assert (latents(job) - latents(made)).abs().max() <= 1e-5 * latents(made).abs().max()


def test_matrices_in_8_bits_and_products_in_8_bits_are_close(
    config: EngineConfig, engine: Engine, tmp_path: Path
) -> None:
    """In one step and with (almost) all keys: roundings also change which blocks are read, and that much more."""
    one_step = {"timesteps": (1000,), "sparse": 0.99}
    exact = latents(run(engine, tmp_path / "exact.mkv", **one_step))
    with Engine(replace(config, weights="q8")) as small:
        for name, fields in (("a", {}), ("b", {"quantize": "int8"})):
            got = latents(run(small, tmp_path / f"{name}.mkv", **one_step, **fields))
            assert 0 < (got - exact).norm() / exact.norm() < 0.2


def test_nan_is_computed_again_by_the_plain_kernel(engine: Engine, made: Job, tmp_path: Path, monkeypatch) -> None:
    def nan(*given: Any) -> Any:
        return tuple(one * torch.nan for one in plain_listed(*given))

    broken = sparse_steps.ListedBackend("broken", nan)
    monkeypatch.setattr("wanduet.runtime.loaded.choose_listed", lambda *_: broken)
    job = run(engine, tmp_path / "a.mkv")
    assert torch.equal(latents(job), latents(made))
    about = job.result().videos[0].provenance
    assert about["attention"] == f"sdpa+{engine.models.spec.transformer.attention} plain"


def test_a_kernel_that_fails_in_mid_job_is_replaced_by_the_plain_form(
    engine: Engine, made: Job, tmp_path: Path, monkeypatch
) -> None:
    counts = [0]

    def listed(*given: Any) -> Any:
        counts[0] += 1
        if counts[0] > 3:  # one is the check
            raise RuntimeError("no such instruction")
        return plain_listed(*given)

    verdicts.forget()
    sparse_steps.choose_listed.cache_clear()
    monkeypatch.setattr(sparse_steps, "listed_backends", lambda *_: (sparse_steps.ListedBackend("fast", listed),))
    job = run(engine, tmp_path / "a.mkv")
    verdicts.forget()
    sparse_steps.choose_listed.cache_clear()
    assert torch.equal(latents(job), latents(made))
    about = job.result().videos[0].provenance
    attention = engine.models.spec.transformer.attention
    assert about["attention"] == f"sdpa+{attention} fast, then sdpa+{attention} plain"
    assert about["rungs"][0].startswith("denoise: sparse attention by plain in place of sparse attention by fast (Runt")


@pytest.mark.parametrize("attention", ["vsa", "sla"])
def test_plans_count_the_module_and_the_lists(attention: str) -> None:
    """On the true shapes: more weights and more memory, fewer operations, and no ring."""
    plans, request = (
        {},
        GenerationRequest(prompt="a red circle", timesteps=(1000, 757), guidance_scale=1, sampler="euler"),
    )
    for name in ("random:1.3b", f"random:1.3b-{attention}"):
        config = EngineConfig(model=name, devices="cuda:0")
        models, spec = Models(config), RANDOM_SPECS[name]
        resolved = request.resolve(spec)
        plans[name] = make_plan(resolved, models.memory, config, parse_hardware("h100")), denoise_flop(resolved, spec)
        weights = models.memory.transformer_weights("bfloat16")
        plans[name] += (weights,)
    (dense, dense_flop, dense_weights), (sparse, flop, weights) = plans.values()
    assert weights - dense_weights == 30 * ((1536 * 1536 + 1536) * 2 if attention == "vsa" else (128 * 128 + 128) * 4)
    assert sparse.prediction.devices[0].phases["denoise"] > dense.prediction.devices[0].phases["denoise"]
    assert flop < 0.5 * dense_flop
    config = EngineConfig(
        model=f"random:1.3b-{attention}", strategy="parallel", devices=",".join(f"cuda:{i}" for i in range(8))
    )
    with pytest.raises(ConfigError, match=f"{attention.upper()}.*cannot be used on these 8 devices"):
        make_plan(request.resolve(RANDOM_SPECS[config.model]), Models(config).memory, config, parse_hardware("8xh100"))
