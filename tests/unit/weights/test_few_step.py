"""Few-step weights: a folder or a name is enough to run them as they were distilled, or to say what they lack."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.weight_files import tensors_of
from wanduet import WanPipeline
from wanduet.errors import InvalidRequestError, ModelNotFoundError, WeightsError
from wanduet.family.distilled import FEW_STEP, FewStep, by_name, by_tensors
from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.dit.model import WanTransformer
from wanduet.request import GenerationRequest
from wanduet.sampling.samplers import Schedule, make_sampler
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.hub import download, local_model, open_model, verify_manifest
from wanduet.weights.names import check_few_step

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
        ("TurboDiffusion/TurboWan2.1-T2V-1.3B-480P", "a file of a transformer alone"),
        ("gdhe17/Self-Forcing", "causal attention"),
        ("tianweiy/CausVid", r"a \.pt file with the original names, which wanduet does not fetch"),
        ("lightx2v/Wan-NVFP4", "NVFP4"),
    ],
)
def test_published_weights_that_do_not_run_are_refused_before_anything_is_fetched(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wanduet.weights.hub.fetch", lambda *_: 1 / 0)
    for use in (open_model, download):
        with pytest.raises(ModelNotFoundError, match=words):
            use(name)


def test_a_file_of_known_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "self_forcing_dmd.pt").write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match=r"Self-Forcing.*causal attention"):
        local_model(str(tmp_path / "self_forcing_dmd.pt"))


def test_turbodiffusions_own_file_is_a_transformer(tmp_path: Path) -> None:
    """Official names in a .pth, and SLA's projections under TurboDiffusion's."""
    miniature = open_model("miniature")
    size, state = miniature.spec.transformer.attention_head_dim, tensors_of(miniature, "transformer")
    for block in range(miniature.spec.transformer.num_layers):
        name = f"blocks.{block}.self_attn.attn_op.local_attn.proj_l"
        state |= {f"{name}.weight": torch.full((size, size), block + 0.5), f"{name}.bias": torch.zeros(size)}
    path = tmp_path / "TurboWan2.1-T2V-1.3B-480P.pth"
    torch.save(state, path)
    model = open_model("miniature", files={"transformer": path})
    assert model.few_step is not None
    assert model.few_step.name == "TurboWan by its authors"  # by the file's name
    assert (model.spec.transformer.attention, model.spec.defaults.guidance_scale) == ("sla", 1.0)
    transformer = WanTransformer(model.spec.transformer)
    model.transformer.load_into({name: p.data for name, p in transformer.named_parameters()})
    assert transformer.state_dict()["blocks.3.attn1.proj_l.weight"].unique().tolist() == [3.5]
    torch.testing.assert_close(
        transformer.state_dict()["blocks.3.attn2.to_q.weight"], state["blocks.3.cross_attn.q.weight"].float()
    )


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


@pytest.fixture
def folder(folder: Path) -> Path:
    """The model of a few kilobytes, with a transformer that is small when it is written whole."""
    config = folder / "transformer" / "config.json"
    small = {"num_attention_heads": 1, "attention_head_dim": 16, "ffn_dim": 16, "freq_dim": 16}
    config.write_text(json.dumps(json.loads(config.read_text()) | small))
    return folder


def sparse_folder(folder: Path, kind: str, prefix: str = "") -> ModelFolder:
    """Write a transformer with VSA's gates, or with SLA's projections whose names begin with `prefix`, into a folder."""
    spec = ModelFolder(folder, "x").spec.transformer
    tensors = WanTransformer(spec).state_dict()
    for block in range(spec.num_layers):
        name, size = (f"blocks.{block}.to_gate_compress", spec.dim)
        if kind == "sla":
            name, size = (f"blocks.{block}.{prefix}proj_l", spec.attention_head_dim)
        tensors |= {f"{name}.weight": torch.full((size, size), block + 0.5), f"{name}.bias": torch.zeros(size)}
    save_file(tensors, folder / WEIGHTS)
    return ModelFolder(folder, "x")


@pytest.mark.parametrize(
    ("kind", "prefix", "share"),
    [
        ("vsa", "", 0.2),
        ("sla", "self_attn.attn_op.local_attn.", 0.1),
        ("sla", "attn1.attn_op.local_attn.", 0.1),
        ("sla", "attn1.attn_impl.", 0.1),
        ("sla", "attn1.", 0.1),
    ],
)
def test_weights_trained_for_sparse_attention_run_by_their_tensors(
    folder: Path, kind: str, prefix: str, share: float
) -> None:
    plain = ModelFolder(folder, "x").spec
    assert (plain.transformer.attention, plain.transformer.key_share) == ("dense", 1.0)
    made = sparse_folder(folder, kind, prefix)
    assert made.spec.transformer == replace(plain.transformer, attention=kind, key_share=share)
    assert made.spec.defaults.sampler == "renoise"
    made.check_complete()
    model = WanTransformer(made.spec.transformer)
    made.transformer.load_into({name: p.data for name, p in model.named_parameters()})
    module = model.blocks[1].to_gate_compress if kind == "vsa" else model.blocks[1].attn1.proj_l
    assert (module.weight == 1.5).all()
    assert made.fingerprint == ModelFolder(folder, "y").fingerprint


def test_the_name_says_how_sparse_gates_are(folder: Path) -> None:
    sparse_folder(folder, "vsa")
    name = "FastVideo/FastWan2.1-T2V-14B-Diffusers"
    assert ModelFolder(folder, name).spec.transformer.key_share == 0.1
    assert ModelFolder(folder, "FastVideo/FastWan-QAD-1.3B").spec.transformer.attention == "vsa"  # it has the gates
    check_few_step(name)
    check_few_step("IPostYellow/TurboWan2.1-T2V-1.3B-Diffusers")


@pytest.mark.parametrize(("name", "words"), [("FastWan2.1-T2V-1.3B-Diffusers", "VSA.*to_gate_compress"),
                                             ("turbowan2.1-t2v-1.3b-diffusers", "SLA.*proj_l")])  # fmt: skip
def test_a_name_without_the_module_is_refused(folder: Path, name: str, words: str) -> None:
    renamed = folder.rename(folder.with_name(name))
    with pytest.raises(ModelNotFoundError, match=words):
        open_model(str(renamed))


def test_half_of_a_module_is_refused(folder: Path) -> None:
    made = sparse_folder(folder, "vsa")
    tensors = load_file(folder / WEIGHTS)
    del tensors["blocks.1.to_gate_compress.bias"]
    save_file(tensors, folder / WEIGHTS)
    made = ModelFolder(folder, "x")
    with pytest.raises(WeightsError, match=r"missing: blocks\.1\.to_gate_compress\.bias\."):
        made.transformer.check({n: tuple(p.shape) for n, p in WanTransformer(made.spec.transformer).named_parameters()})


def test_a_config_cannot_ask_for_the_module(folder: Path) -> None:
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention": "vsa", "key_share": 0.5}))
    assert ModelFolder(folder, "x").spec.transformer.attention == "dense"


def test_a_request_takes_the_weights_share_or_its_own(folder: Path) -> None:
    spec = sparse_folder(folder, "vsa").spec
    for fields in ({}, {"speed": "exact"}):
        request = GenerationRequest(prompt="x", **fields).resolve(spec)
        assert (request.sparse, request.approximations) == (1.0, {})
    assert GenerationRequest(prompt="x", sparse=0.5, timesteps=(1000,)).resolve(spec).sparse == 0.5


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
