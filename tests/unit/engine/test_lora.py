"""The miniature with LoRA: swapped between jobs, the same bits by every strategy, recorded, and resumed with the same only."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from wanduet.config import EngineConfig
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError, InvalidRequestError, WanduetError, WeightsError
from wanduet.media.latents import load_latents
from wanduet.media.read import read_metadata
from wanduet.request import GenerationRequest
from wanduet.runtime import loras as module
from wanduet.weights.hub import open_model
from wanduet.weights.manifest import file_sha256

REQUEST = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "seed": 3}
KINDS: dict[str, dict[str, Any]] = {
    "single": {"devices": "cpu"},
    "8 bits": {"devices": "cpu", "weights": "q8"},
    "two ranks": {"strategy": "parallel", "devices": "cpu,cpu"},
}


def write_lora(path: Path, seed: int, *, dim: int = 0, size: float = 0.02) -> Path:
    """A LoRA of the query of each self-attention and of the text's keys, in the names of ComfyUI."""
    spec = open_model("miniature").spec.transformer
    width, generator = dim or spec.dim, torch.Generator().manual_seed(seed)
    tensors = {}
    for block in range(spec.num_layers):
        for part in ("self_attn.q", "cross_attn.k", "cross_attn.v"):
            name = f"diffusion_model.blocks.{block}.{part}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, width, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(width, 4, generator=generator) * size
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("style", "other"), start=1):
        write_lora(folder / f"{name}.safetensors", seed)
    return folder


Run = Callable[..., torch.Tensor]


@pytest.fixture(scope="module", params=KINDS)
def engine(request, config: EngineConfig) -> Iterator[Engine]:
    with Engine(replace(config, **KINDS[request.param])) as engine:
        yield engine


def submit(engine: Engine, path: Path, *loras: object, changes: dict[str, Any] | None = None, **options: Any) -> Job:
    request = GenerationRequest.parse(**(REQUEST | (changes or {})), loras=loras)
    return engine.submit(request, OutputOptions(path, "ffv1", save_latents=True, **options))


def latents(engine: Engine, path: Path, *loras: object, **changes: Any) -> torch.Tensor:
    submit(engine, path, *loras, changes=changes).result(120)
    return load_latents(Path(f"{path}.latents.safetensors"))[0]


def test_a_job_with_a_lora_leaves_the_next_one_as_the_first(engine: Engine, folder: Path, tmp_path: Path) -> None:
    style, other = (str(folder / f"{name}.safetensors") for name in ("style", "other"))
    base = latents(engine, tmp_path / "base.mkv")
    with_style = latents(engine, tmp_path / "style.mkv", style)
    both = latents(engine, tmp_path / "both.mkv", f"{style}:0.5", f"{other}:-0.5")
    assert latents(engine, tmp_path / "none.mkv").equal(base)
    assert latents(engine, tmp_path / "zero.mkv", f"{style}:0").equal(base)
    assert latents(engine, tmp_path / "again.mkv", style).equal(with_style)
    assert not with_style.equal(base)
    assert not both.equal(with_style)
    if engine.config.strategy != "parallel" and engine.config.weights == "auto":
        with Engine(engine.config) as fresh:  # as loaded for it
            assert latents(fresh, tmp_path / "fresh.mkv", f"{style}:0.5", f"{other}:-0.5").equal(both)


def test_strengths_by_step(engine: Engine, folder: Path, tmp_path: Path) -> None:
    """The first steps are those of the LoRA alone; a set that is the same in all steps is no change."""
    style, other = (str(folder / f"{name}.safetensors") for name in ("style", "other"))
    halves = latents(engine, tmp_path / "halves.mkv", f"{style}:1@0-0.5", f"{style}:1@0.5-1")
    assert halves.equal(latents(engine, tmp_path / "whole.mkv", style))
    first = latents(engine, tmp_path / "first.mkv", f"{style}:1@0-0.5", f"{other}:1@0.5-1")
    assert not first.equal(halves)
    assert latents(engine, tmp_path / "again.mkv", f"{style}:1@0-0.5", f"{other}:1@0.5-1").equal(first)


@pytest.fixture(scope="module")
def alone(config: EngineConfig) -> Iterator[Engine]:
    with Engine(replace(config, checkpoint_seconds=0.0)) as engine:
        yield engine


def test_the_texts_keys_are_projected_again_where_the_set_changes(alone: Engine, folder: Path, tmp_path: Path) -> None:
    """A LoRA from the second half on gives the steps that a run gives which resumes there with that set merged."""
    style = str(folder / "style.safetensors")
    job = submit(alone, tmp_path / "late.mkv", f"{style}:1@0.5-1")
    seen: list[torch.Tensor] = []
    request = GenerationRequest.parse(**REQUEST, loras=(f"{style}:1@0.5-1",))
    job.result(120)
    stop = threading.Event()

    def cancel_at_half(info: Any) -> None:
        if info.step == 0 and not stop.is_set():
            stop.set()
            again.cancel()
        seen.append(info.latents)

    again = alone.submit(request, OutputOptions(tmp_path / "cut.mkv", "ffv1", save_latents=True), watch=cancel_at_half)
    with pytest.raises(CancelledError):
        again.result(120)
    resumed = alone.submit(request, OutputOptions(tmp_path / "cut.mkv", "ffv1", save_latents=True, resume=True))
    resumed.result(120)
    whole, cut = (load_latents(tmp_path / f"{name}.mkv.latents.safetensors")[0] for name in ("late", "cut"))
    assert cut.equal(whole)


APG: dict[str, Any] = {"guidance_mode": "apg", "guidance_scale": 5.0, "num_inference_steps": 6}


def test_apg_goes_on_bit_for_bit_where_a_strength_changes(alone: Engine, folder: Path, tmp_path: Path) -> None:
    """Cancelled after the change at half of the steps."""
    style = str(folder / "style.safetensors")
    loras = (f"{style}:0.5@0-0.5", f"{style}:1@0.5-1")
    whole = latents(alone, tmp_path / "whole.mkv", *loras, **APG)
    request = GenerationRequest.parse(**(REQUEST | APG), loras=loras)

    def cancel(info: Any) -> None:
        if info.step == 3:
            job.cancel()

    job = alone.submit(request, OutputOptions(tmp_path / "cut.mkv", "ffv1", save_latents=True), watch=cancel)
    with pytest.raises(CancelledError):
        job.result(120)
    steps: list[int] = []
    again = OutputOptions(tmp_path / "cut.mkv", "ffv1", save_latents=True, resume=True)
    alone.submit(request, again, watch=lambda info: steps.append(info.step)).result(120)
    assert steps == [4, 5]
    assert load_latents(tmp_path / "cut.mkv.latents.safetensors")[0].equal(whole)


def test_apg_keeps_its_momentum_where_weights_are_merged_again(alone: Engine, tmp_path: Path) -> None:
    """A LoRA that changes nothing, with other strengths in the second half, gives the job without LoRA."""
    nothing = str(write_lora(tmp_path / "nothing.safetensors", 1, size=0.0))
    halves = (f"{nothing}:0.5@0-0.5", f"{nothing}:1@0.5-1")
    plain = latents(alone, tmp_path / "plain.mkv", **APG)
    assert latents(alone, tmp_path / "halves.mkv", *halves, **APG).equal(plain)
    assert not latents(alone, tmp_path / "cfg.mkv", **(APG | {"guidance_mode": "cfg"})).equal(plain)


def test_metadata_and_what_is_resumed(alone: Engine, folder: Path, tmp_path: Path) -> None:
    style = folder / "style.safetensors"
    latents(alone, tmp_path / "a.mkv", f"{style}:0.5")
    recorded = read_metadata(tmp_path / "a.mkv")["request"]["loras"]
    assert recorded == [{"name": "style.safetensors", "strength": 0.5, "sha256": file_sha256(style)}]
    moved = tmp_path / "moved" / "style.safetensors"
    moved.parent.mkdir()
    moved.write_bytes(style.read_bytes())
    same, other = (GenerationRequest.parse(**REQUEST, loras=(f"{moved}:{strength}",)) for strength in ("0.5", "0.6"))
    output = OutputOptions(tmp_path / "a.mkv", "ffv1", save_latents=True)
    assert alone.is_finished(same, output)
    assert not alone.is_finished(other, output)
    assert not alone.is_finished(GenerationRequest(**REQUEST), output)


def test_a_job_that_is_cancelled_in_mid_swap_leaves_nothing_to_the_next(
    alone: Engine, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    style = str(folder / "style.safetensors")
    base, with_style = latents(alone, tmp_path / "base.mkv"), latents(alone, tmp_path / "style.mkv", style)
    latents(alone, tmp_path / "base2.mkv")
    loaded = alone.models.transformer.loaded
    assert loaded is not None
    assert loaded.loras is not None
    merge = loaded.loras.merge

    def cut_short(adapters: Any, progress: Any) -> bool:
        def cancelled(done: int, total: int) -> None:
            if done == 3:
                job.cancel()
            progress(done, total)

        return merge(adapters, cancelled)

    for name, then in (("none", ()), ("same", (style,))):
        with monkeypatch.context() as patched:
            patched.setattr(loaded.loras, "merge", cut_short)
            job = submit(alone, tmp_path / f"cut-{name}.mkv", style)
            with pytest.raises(CancelledError):
                job.result(120)
        found = latents(alone, tmp_path / f"after-{name}.mkv", *then)
        assert found.equal(with_style if then else base)
        latents(alone, tmp_path / f"back-{name}.mkv")


def test_a_file_that_changes_before_it_is_merged_is_refused(alone: Engine, folder: Path, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "mine.safetensors", 1)
    sha256 = file_sha256(path)
    write_lora(path, 2)
    with pytest.raises(InvalidRequestError, match="has changed"):
        submit(alone, tmp_path / "a.mkv", {"name": str(path), "sha256": sha256})


def test_a_lora_of_another_size_is_refused_before_anything_is_loaded(config: EngineConfig, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "large.safetensors", 1, dim=1536)
    with Engine(config) as engine:
        with pytest.raises(WeightsError, match="1536"):
            submit(engine, tmp_path / "a.mkv", str(path))
        for name in (str(tmp_path / "not there.safetensors"), "~nobody-of-that-name/not there.safetensors"):
            with pytest.raises(InvalidRequestError, match="a file that exists"):
                submit(engine, tmp_path / "a.mkv", name)
        assert engine.models.transformer.loaded is None


def test_the_plan_counts_them(alone: Engine, folder: Path) -> None:
    style = str(folder / "style.safetensors")
    without = alone.plan(GenerationRequest(**REQUEST))
    plan = alone.plan(GenerationRequest.parse(**REQUEST, loras=(f"{style}:1@0-0.5",)))
    assert plan.loras is not None
    assert plan.loras["merges"] == 2
    assert plan.prediction.host_bytes - without.prediction.host_bytes == plan.loras["host_bytes"] > 0
    assert any(choice.setting == "loras" for choice in plan.choices)
    assert "loras" not in without.as_dict()


def test_names_in_an_operators_folder(config: EngineConfig, folder: Path, tmp_path: Path) -> None:
    outside = write_lora(tmp_path / "outside.safetensors", 3)
    with Engine(replace(config, lora_dir=folder)) as engine:
        resolved = engine.models.resolve(GenerationRequest.parse(**REQUEST, loras=("style.safetensors",)))
        assert resolved.loras[0].name == "style.safetensors"
        for name in (str(outside), f"../{tmp_path.name}/outside.safetensors", "..", r"..\outside.safetensors", "C:x"):
            with pytest.raises(WanduetError) as caught:
                engine.models.resolve(GenerationRequest.parse(**REQUEST, loras=({"name": name},)))
            assert "without a path" in str(caught.value)


def test_a_file_that_goes_while_its_job_runs_is_still_merged(alone: Engine, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "late.safetensors", 7)
    expected = latents(alone, tmp_path / "a.mkv", f"{path}:1@0.5-1")
    request = GenerationRequest.parse(**REQUEST, loras=(f"{path}:1@0.5-1",))
    output = OutputOptions(tmp_path / "b.mkv", "ffv1", save_latents=True)
    alone.submit(request, output, watch=lambda info: path.unlink(missing_ok=True)).result(120)
    assert not path.exists()
    assert load_latents(tmp_path / "b.mkv.latents.safetensors")[0].equal(expected)


def test_a_few_step_lora_brings_its_sampling_where_none_is_given(alone: Engine, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "wan_causvid.safetensors", 8)
    resolve = alone.models.resolve
    found = resolve(GenerationRequest.parse(prompt="x", loras=(str(path),)))
    assert (found.sampler, found.guidance_scale, found.num_inference_steps) == ("euler", 1.0, 8)
    assert found.timesteps is not None
    given = resolve(GenerationRequest.parse(prompt="x", loras=(str(path),), guidance_scale=3.0, num_inference_steps=5))
    assert (given.sampler, given.guidance_scale, given.num_inference_steps) == ("euler", 3.0, 5)
    off = resolve(GenerationRequest.parse(prompt="x", loras=(f"{path}:0",)))
    assert off == resolve(GenerationRequest.parse(prompt="x", seed=off.seed)).model_copy(update={"loras": off.loras})


@pytest.mark.parametrize("count", [1, module.KEPT + 1])
def test_a_file_is_read_once(alone: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    reads: list[Path] = []
    read = module.read_adapter
    monkeypatch.setattr(module, "read_adapter", lambda path, *more: reads.append(path) or read(path, *more))
    paths = [write_lora(tmp_path / f"{seed}.safetensors", seed) for seed in range(count)]
    for name in ("a", "b"):
        latents(alone, tmp_path / f"{name}.mkv", *map(str, paths))
    assert reads == paths
