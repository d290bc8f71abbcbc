"""Few-step weights: a folder or a name is enough to run them as they were distilled, or to say what they lack."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wanduet import WanPipeline
from wanduet.errors import InvalidRequestError, ModelNotFoundError
from wanduet.family.distilled import FEW_STEP, FewStep, by_name, by_tensors
from wanduet.family.wan21 import WAN_1_3B
from wanduet.request import GenerationRequest
from wanduet.sampling.samplers import Schedule, make_sampler
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.hub import download, local_model, open_model, verify_manifest

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
DMD = (1000.0, 757.0, 522.0)


def mark(folder: Path, pipeline: str | None = None, tensor: str | None = None) -> None:
    """Give a folder of random weights the marks of few-step weights."""
    if pipeline is not None:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    if tensor is not None:
        tensors = load_file(folder / WEIGHTS)
        save_file({**tensors, tensor: torch.zeros(4, 4)}, folder / WEIGHTS)


def test_a_pipeline_for_few_steps_sets_the_models_defaults(folder: Path) -> None:
    mark(folder, "WanDMDPipeline")
    model = open_model(str(folder))
    defaults = model.spec.defaults
    assert (defaults.sampler, defaults.timesteps, defaults.guidance_scale) == ("renoise", DMD, 1.0)
    assert (defaults.height, defaults.negative_prompt) == (480, WAN_1_3B.defaults.negative_prompt)
    request = GenerationRequest(prompt="x").resolve(model.spec)
    assert (request.sampler, request.timesteps, request.num_inference_steps, request.uses_guidance) == (
        "renoise", DMD, 3, False,
    )  # fmt: skip


def test_a_name_is_enough(folder: Path) -> None:
    renamed = folder.rename(folder.with_name("fastwan-qad-1.3b"))
    local = local_model(str(renamed))
    assert local is not None
    assert local.spec.defaults.timesteps == DMD
    assert ModelFolder(renamed, "FastVideo/FastWan-QAD-FP8-1.3B", "0").spec.defaults.timesteps == DMD
    assert ModelFolder(renamed, "FastVideo/FastWan-QAD-FP8-1.3B-mine").spec.defaults == WAN_1_3B.defaults
    assert ModelFolder(renamed, "rCM_Wan2.1_T2V_1.3B_480p.pt").spec.defaults.num_frames == 77


def test_the_folders_own_defaults_come_first(folder: Path) -> None:
    mark(folder, "WanDMDPipeline")
    file = folder / "generation_defaults.json"
    file.write_text('{"timesteps": [1000, 500], "height": 64}')
    defaults = ModelFolder(folder, "x").spec.defaults
    assert (defaults.timesteps, defaults.sampler, defaults.height) == ((1000, 500), "renoise", 64)
    for text in ('{"timesteps": [500, 1000]}', '{"timesteps": ["x"]}', '{"sampler": "magic"}'):
        file.write_text(text)
        with pytest.raises(ModelNotFoundError, match=r"generation_defaults\.json is not understood"):
            _ = ModelFolder(folder, "x").spec
    file.write_text('{"timesteps": []}')
    assert ModelFolder(folder, "x").spec.defaults.timesteps == ()


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ("blocks.0.to_gate_compress.weight", "video sparse attention"),
        ("blocks.0.attn1.attn_op.local_attn.proj_l.weight", "sparse-linear attention"),
        ("blocks.0.attn1.to_q.weight_global_scale", "NVFP4"),
    ],
)
def test_tensors_that_need_a_module_of_their_own_are_refused_by_its_name(folder: Path, tensor: str, words: str) -> None:
    mark(folder, "WanDMDPipeline", tensor)
    for use in (open_model, lambda name: ModelFolder(Path(name), "x").spec):
        with pytest.raises(ModelNotFoundError, match=words) as refused:
            use(str(folder))
        assert "FastVideo/FastWan-QAD-1.3B" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FastVideo/FastWan2.1-T2V-1.3B-Diffusers", "video sparse attention"),
        ("TurboDiffusion/TurboWan2.1-T2V-1.3B-480P", "sparse-linear attention"),
        ("gdhe17/Self-Forcing", "causal attention"),
        ("tianweiy/CausVid", r"a \.pt file with the original names, which wanduet does not read"),
        ("lightx2v/Wan-NVFP4", "NVFP4"),
    ],
)
def test_published_weights_that_do_not_run_are_refused_before_anything_is_fetched(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanduet.weights.hub._fetch", lambda *_: 1 / 0)
    for use in (open_model, download):
        with pytest.raises(ModelNotFoundError, match=words):
            use(name)


def test_a_file_of_known_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "self_forcing_dmd.pt").write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match=r"Self-Forcing.*causal attention"):
        local_model(str(tmp_path / "self_forcing_dmd.pt"))


@pytest.mark.parametrize("row", FEW_STEP, ids=lambda row: row.name)
def test_every_row_is_found_and_can_be_asked_for(row: FewStep) -> None:
    for name in (*row.repositories, *row.files):
        assert by_name(name) is row
    for key in row.keys:
        assert by_tensors(["patch_embedding.weight", f"blocks.0.x{key}weight"]) is row
    values = row.defaults()
    request = GenerationRequest.parse(
        prompt="x", **{name: values[name] for name in ("sampler", "timesteps", "guidance_scale")}
    ).resolve(WAN_1_3B)
    sampler = make_sampler(Schedule.of(request), 0, torch.device("cpu"))
    assert sampler.timesteps == pytest.approx(row.timesteps)
    assert len(row.timesteps) == values["num_inference_steps"]


def test_rcms_noise_levels() -> None:
    (rcm,) = (row for row in FEW_STEP if row.name == "rCM")
    assert [t / 1000 for t in rcm.timesteps] == pytest.approx([0.98765, 0.93378, 0.85289, 0.60898], abs=1e-5)


def test_no_common_model_counts_as_few_steps() -> None:
    for name in ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "miniature", "model", "", "FastVideo"):
        assert by_name(name) is None
    assert by_tensors(["blocks.0.attn1.to_q.weight", "proj_out.weight"]) is None
    with pytest.raises(InvalidRequestError):
        GenerationRequest(prompt="x", timesteps=DMD).resolve(WAN_1_3B)


def test_the_fast_miniature_is_the_miniature_but_for_its_transformer() -> None:
    fast, whole = open_model("miniature-fast"), open_model("miniature")
    assert (fast.spec.vae, fast.spec.transformer, fast.text_fingerprint) == (
        whole.spec.vae, whole.spec.transformer, whole.text_fingerprint,
    )  # fmt: skip
    assert fast.fingerprint != whole.fingerprint
    assert verify_manifest(fast, None) > verify_manifest(
        ModelFolder(fast.path, fast.name, parts=fast.parts), None, ("transformer",)
    )
    request = GenerationRequest(prompt="x").resolve(fast.spec)
    assert (request.sampler, request.num_inference_steps, request.uses_guidance) == ("euler", 4, False)
    assert (request.height, request.num_frames) == (96, 33)


def test_its_scheduler_in_diffusers_form_takes_the_same_steps() -> None:
    pipeline = WanPipeline.from_pretrained("miniature-fast", torch_dtype=torch.float32)
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(4)
    wanted = Schedule.of(GenerationRequest(prompt="x").resolve(open_model("miniature-fast").spec))
    sampler = make_sampler(wanted, 0, torch.device("cpu"))
    torch.manual_seed(0)
    ours = theirs = torch.randn(1, 16, 1, 2, 2)
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = torch.randn_like(ours)
        ours = sampler.step(velocity, index, ours)
        theirs = scheduler.step(velocity, timestep, theirs, return_dict=False)[0]
    torch.testing.assert_close(theirs, ours, atol=2e-3, rtol=2e-3)
