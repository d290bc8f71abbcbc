"""A LoRA in every trainer's spelling gives the same weights, and every kind of update is what its formula says."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.unit.weights.lora_files import (
    OFFICIAL,
    SHAPES,
    SPEC,
    Q,
    base_weights,
    changes,
    factors,
    normal,
    read,
    saved,
    saved_peft,
)
from wanduet.weights.adapters.facts import describe_adapter
from wanduet.weights.adapters.modules import find_module

# Names of A and B; `official` and `diffusers` are a module's names, `_` at the end: with underscores for dots.
SPELLINGS = {
    "diffusion-pipe": ("diffusion_model.{official}.lora_A.weight", "diffusion_model.{official}.lora_B.weight"),
    "kijai": ("diffusion_model.{official}.lora_down.weight", "diffusion_model.{official}.lora_up.weight"),
    "diffusers": ("transformer.{diffusers}.lora_A.weight", "transformer.{diffusers}.lora_B.weight"),
    "old diffusers": ("transformer.{diffusers}.lora.down.weight", "transformer.{diffusers}.lora.up.weight"),
    "linear layer": (
        "unet.{diffusers}.lora_linear_layer.down.weight",
        "unet.{diffusers}.lora_linear_layer.up.weight",
    ),
    "processor": ("unet.{diffusers}_lora.down.weight", "unet.{diffusers}_lora.up.weight"),
    "raw peft": ("base_model.model.{diffusers}.lora_A.weight", "base_model.model.{diffusers}.lora_B.weight"),
    "state of peft": ("{diffusers}.lora_A.default.weight", "{diffusers}.lora_B.default.weight"),
    "named in peft": (
        "base_model.model.{official}.lora_A.mine.weight",
        "base_model.model.{official}.lora_B.mine.weight",
    ),
    "diffsynth": ("{official}.lora_A.default.weight", "{official}.lora_B.default.weight"),
    "diffsynth pipe": ("pipe.dit.{official}.lora_A.weight", "pipe.dit.{official}.lora_B.weight"),
    "no weight": ("model.{official}.lora_A", "model.{official}.lora_B"),
    "musubi": ("lora_unet_{official_}.lora_down.weight", "lora_unet_{official_}.lora_up.weight"),
    "videox": ("lora_unet__{official_}.lora_down.weight", "lora_unet__{official_}.lora_up.weight"),
    "mixed dots": ("lora_unet_{official}.lora_down.weight", "lora_unet_{official}.lora_up.weight"),
    "lycoris": ("lycoris_{diffusers_}.lora_down.weight", "lycoris_{diffusers_}.lora_up.weight"),
    "checkpoint": ("model.diffusion_model.{official}.lora_A.weight", "model.diffusion_model.{official}.lora_B.weight"),
    "low noise": ("transformer_2.{diffusers}.lora_A.weight", "transformer_2.{diffusers}.lora_B.weight"),
    "ai-toolkit": (
        "diffusion_model.transformer_1.{official}.lora_A.weight",
        "diffusion_model.transformer_1.{official}.lora_B.weight",
    ),
    "compiled": ("_orig_mod.{diffusers}.lora_A.weight", "_orig_mod.{diffusers}.lora_B.weight"),
}


def spelled(form: str, module: str) -> str:
    official = OFFICIAL[module]
    return form.format(
        official=official, diffusers=module, official_=official.replace(".", "_"), diffusers_=module.replace(".", "_")
    )


def written(spelling: str, module: str) -> dict[str, torch.Tensor]:
    a, b = SPELLINGS[spelling]
    down, up = factors(module)
    return {spelled(a, module): down, spelled(b, module): up}


def expected() -> dict[str, torch.Tensor]:
    return {f"{module}.weight": factors(module)[1] @ factors(module)[0] for module in OFFICIAL}


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_same_update(spelling: str, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for module in OFFICIAL:
        tensors |= written(spelling, module)
    adapter = read(saved(tmp_path / "mine.safetensors", tensors))
    shown = describe_adapter(adapter.path)
    assert (adapter.name, shown["kinds"], shown["rank"], shown["alpha"]) == ("mine", ["lora"], (3, 3), (3.0, 3.0))
    assert shown["hidden_size"] == 24
    assert not adapter.ignored
    assert_equal(changes(adapter.path), expected())


def test_a_file_may_mix_all_spellings(tmp_path: Path) -> None:
    for seed in range(20):
        chosen = random.Random(seed)
        single = [name for name in SPELLINGS if name not in ("low noise", "ai-toolkit")]  # of two transformers
        tensors: dict[str, torch.Tensor] = {}
        for module in OFFICIAL:
            tensors |= written(chosen.choice(single), module)
        assert_equal(changes(saved(tmp_path / "mixed.safetensors", tensors)), expected())


def test_the_same_update_in_both_vocabularies_counts_once(tmp_path: Path) -> None:
    path = saved(tmp_path / "both.safetensors", written("diffusers", Q) | written("musubi", Q))
    assert_equal(changes(path), {f"{Q}.weight": expected()[f"{Q}.weight"]})


def test_every_parameter_is_found_by_either_name() -> None:
    for block in range(40):
        for ours, official in (
            ("attn1.to_v", "self_attn.v"),
            ("attn1.norm_k", "self_attn.norm_k"),
            ("attn2.to_out.0", "cross_attn.o"),
            ("attn2.add_k_proj", "cross_attn.k_img"),
            ("norm2", "norm3"),
            ("scale_shift_table", "modulation"),
        ):
            module = f"blocks.{block}.{ours}"
            for name in (module, f"lora_unet_blocks_{block}_{official.replace('.', '_')}"):
                assert find_module(name) == module
    for parameter in SHAPES:
        module = parameter if parameter.endswith("table") else parameter.rpartition(".")[0]
        assert find_module(module) == module


def lora(module: str = Q, alpha: torch.Tensor | float | None = None, rank: int = 3) -> dict[str, torch.Tensor]:
    down, up = factors(module, rank)
    found = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    return found if alpha is None else found | {f"{module}.alpha": torch.as_tensor(alpha)}


@pytest.mark.parametrize(
    ("alpha", "factor"),
    [
        (None, 1.0),
        (0.5, 0.125),
        (torch.tensor(1.5, dtype=torch.bfloat16), 0.375),
        (torch.tensor([8.0]), 2.0),
        (torch.tensor(2), 0.5),
        (0.0, 1.0),
    ],
    ids=["none", "fraction", "bf16", "of one axis", "whole", "zero"],
)
def test_alpha_over_rank_scales_the_product(alpha: torch.Tensor | float | None, factor: float, tmp_path: Path) -> None:
    down, up = factors(Q, 4)
    path = saved(tmp_path / "a.safetensors", lora(alpha=alpha, rank=4))
    assert_equal(changes(path), {f"{Q}.weight": factor * up @ down})


def test_each_module_has_its_own_rank_and_alpha(tmp_path: Path) -> None:
    other = "blocks.2.ffn.net.2"
    path = saved(tmp_path / "a.safetensors", lora(Q, 1.0, 2) | lora(other, 10.0, 5))
    (q_down, q_up), (down, up) = factors(Q, 2), factors(other, 5)
    assert_equal(changes(path), {f"{Q}.weight": q_up @ q_down / 2, f"{other}.weight": up @ down * 2})
    shown = describe_adapter(path)
    assert (shown["rank"], shown["alpha"]) == ((2, 5), (1.0, 10.0))


CONFIGS = {
    "alpha": ({"r": 4, "lora_alpha": 8}, 2.0),
    "square root": ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
    "pattern": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {Q: 2}}, 0.5),
    "pattern by its end": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"to_k": 1, "to_q": 4}}, 1.0),
    "official pattern": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {r"blocks\.\d+\.self_attn\.q": 1}}, 0.25),
    "rank pattern": ({"r": 16, "lora_alpha": 8, "rank_pattern": {Q: 4}}, 2.0),
}


@pytest.mark.parametrize("form", ["folder", "file in a folder", "metadata", "metadata of a pipeline"])
@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_gives_the_alpha_that_the_tensors_lack(form: str, case: str, tmp_path: Path) -> None:
    config, factor = CONFIGS[case]
    tensors = {f"base_model.model.{name}": tensor for name, tensor in lora(rank=4).items()}
    if form.startswith("metadata"):
        prefix = "transformer." if "pipeline" in form else ""
        text = json.dumps({f"{prefix}{key}": value for key, value in config.items()})
        path = saved(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": text})
    else:
        folder = saved_peft(tmp_path / "adapter", tensors, config)
        path = folder if form == "folder" else folder / "adapter_model.safetensors"
    down, up = factors(Q, 4)
    assert_equal(changes(path), {f"{Q}.weight": factor * up @ down})


def test_the_config_belongs_to_the_hash_of_a_folder(tmp_path: Path) -> None:
    tensors = lora(rank=4)
    hashes = {
        read(saved_peft(tmp_path / str(alpha), tensors, {"r": 4, "lora_alpha": alpha})).sha256 for alpha in (4, 8)
    }
    assert len(hashes) == 2


def test_differences_of_weights_biases_norms_and_modulations(tmp_path: Path) -> None:
    wanted = {
        "blocks.0.attn1.to_q.weight": "blocks.0.self_attn.q.diff",
        "blocks.0.attn1.to_q.bias": "blocks.0.self_attn.q.diff_b",
        "blocks.1.norm2.weight": "blocks.1.norm3.diff",
        "blocks.1.norm2.bias": "blocks.1.norm3.diff_b",
        "blocks.1.attn2.norm_k.weight": "blocks.1.cross_attn.norm_k.diff",
        "blocks.2.scale_shift_table": "blocks.2.diff_m",
        "scale_shift_table": "head.modulation.diff",
        "patch_embedding.weight": "patch_embedding.diff",
        "condition_embedder.text_embedder.linear_2.bias": "text_embedding.2.diff_b",
    }
    values = {name: normal(*SHAPES[name], seed=index) for index, name in enumerate(wanted)}
    path = saved(
        tmp_path / "a.safetensors", {f"diffusion_model.{wanted[name]}": value for name, value in values.items()}
    )
    assert_equal(changes(path), values)
    assert_equal(changes(path, -0.5), {name: -0.5 * value for name, value in values.items()})
    assert describe_adapter(path)["kinds"] == ["diff"]


def test_a_lora_beside_a_difference_adds_both(tmp_path: Path) -> None:
    difference, bias = normal(24, 24, seed=8), normal(24, seed=9)
    tensors = lora(alpha=6.0) | {f"{Q}.diff": difference, f"{Q}.diff_b": bias}
    down, up = factors(Q)
    got = changes(saved(tmp_path / "a.safetensors", tensors), 2.0)
    assert_equal(got, {f"{Q}.weight": 2 * (2 * up @ down + difference), f"{Q}.bias": 2 * bias})


def test_a_bias_of_b_is_scaled_as_b_is(tmp_path: Path) -> None:
    bias = normal(24, seed=9)
    tensors = lora(alpha=6.0) | {f"{Q}.lora_B.bias": bias}
    assert torch.equal(changes(saved(tmp_path / "a.safetensors", tensors))[f"{Q}.bias"], 2 * bias)


def test_a_base_is_neither_changed_nor_touched_at_strength_zero(tmp_path: Path) -> None:
    magnitude = {f"{Q}.dora_scale": normal(24, 1).abs()}
    path = saved(tmp_path / "a.safetensors", lora() | magnitude | lora("proj_out"))
    base = {name: -torch.zeros(SHAPES[name]) for name in read(path).updates}  # -0.0 + 0.0 would be 0.0
    for name, update in read(path).updates.items():
        before = base[name].clone()
        assert update.applied(base[name], 0.0).signbit().all()
        first, second = update.applied(base[name], 0.7), update.applied(base[name], 0.7)
        assert torch.equal(first, second)
        assert not torch.equal(first, before)
        assert base[name].signbit().all()


def numpy_delta(kind: str, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    """The change of a weight, without alpha."""
    t = {name: tensor.numpy().astype(np.float64) for name, tensor in tensors.items()}
    if kind == "loha":
        return (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    w2 = t["lokr_w2"] if "lokr_w2" in t else t["lokr_w2_a"] @ t["lokr_w2_b"]
    return np.kron(w1, w2)


PRODUCTS = {
    "loha": {"hada_w1_a": (24, 2), "hada_w1_b": (2, 24), "hada_w2_a": (24, 2), "hada_w2_b": (2, 24)},
    "lokr of whole": {"lokr_w1": (4, 3), "lokr_w2": (6, 8)},
    "lokr, second factored": {"lokr_w1": (4, 3), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 8)},
    "lokr, first factored": {"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 3), "lokr_w2": (6, 8)},
    "lokr, both factored": {
        "lokr_w1_a": (4, 2), "lokr_w1_b": (2, 3), "lokr_w2_a": (6, 2), "lokr_w2_b": (2, 8),
    },
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["lycoris_blocks_0_self_attn_q.", f"base_model.model.{Q}."])
@pytest.mark.parametrize("case", PRODUCTS)
def test_loha_and_lokr_equal_numpy(case: str, prefix: str, tmp_path: Path) -> None:
    tensors = {name: normal(*shape, seed=index) for index, (name, shape) in enumerate(PRODUCTS[case].items())}
    alpha = {f"{prefix}alpha": torch.tensor(1.0)}
    path = saved(tmp_path / "a.safetensors", {prefix + name: tensor for name, tensor in tensors.items()} | alpha)
    factor = 1.0 if case == "lokr of whole" else 0.5
    got = changes(path, 3.0)[f"{Q}.weight"]
    np.testing.assert_allclose(got, 3 * factor * numpy_delta(case[:4], tensors), rtol=1e-4, atol=1e-5)
    assert describe_adapter(path)["kinds"] == [case[:4]]


@pytest.mark.parametrize(
    ("name", "shape", "axis"),
    [
        ("dora_scale", (24, 1), 1),
        ("dora_scale", (1, 24), 0),
        ("dora_scale", (24,), 1),
        ("lora_magnitude_vector", (24,), 1),
        ("lora_magnitude_vector.default.weight", (24,), 1),
    ],
)
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_dora_equals_numpy(name: str, shape: tuple[int, ...], axis: int, strength: float, tmp_path: Path) -> None:
    magnitude = normal(*shape, seed=3).abs() + 0.5
    path = saved(tmp_path / "a.safetensors", lora(alpha=6.0) | {f"{Q}.{name}": magnitude})
    base = base_weights()[f"{Q}.weight"]
    got = read(path).updates[f"{Q}.weight"].applied(base, strength)
    down, up = (factor.numpy() for factor in factors(Q))
    w = base.numpy()
    v = w + 2 * up @ down
    m = magnitude.numpy().reshape((-1, 1) if axis == 1 else (1, -1))
    new = m * v / np.linalg.norm(v, axis=axis, keepdims=True)
    np.testing.assert_allclose(got, w + strength * (new - w), rtol=1e-4, atol=1e-5)
    assert describe_adapter(path)["kinds"] == ["dora", "lora"]


def test_the_convolution_takes_every_kind(tmp_path: Path) -> None:
    name, shape = "patch_embedding", SHAPES["patch_embedding.weight"]
    down, up = normal(2, *shape[1:]), normal(shape[0], 2, 1, 1, 1)
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    wanted = torch.einsum("or,rixyz->oixyz", up[:, :, 0, 0, 0], down)
    assert_equal(changes(saved(tmp_path / "lora.safetensors", tensors)), {f"{name}.weight": wanted})
    w1, w2 = normal(4, 2), normal(6, 8, *shape[2:])
    path = saved(tmp_path / "lokr.safetensors", {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2})
    wanted = torch.einsum("ac,bdxyz->abcdxyz", w1, w2).reshape(shape)
    assert_equal(changes(path), {f"{name}.weight": wanted})
    magnitude = normal(1, shape[1], 1, 1, 1).abs()
    path = saved(tmp_path / "dora.safetensors", tensors | {f"{name}.dora_scale": magnitude})
    base = base_weights()[f"{name}.weight"]
    moved = base + torch.einsum("or,rixyz->oixyz", up[:, :, 0, 0, 0], down)
    wanted = magnitude * moved / moved.pow(2).sum((0, 2, 3, 4), keepdim=True).sqrt()
    got = read(path).updates[f"{name}.weight"].applied(base, 1.0)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_stored_dtype_is_kept_and_summed_in_float32(tmp_path: Path) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        down, up = (factor.to(dtype) for factor in factors(Q))
        path = saved(tmp_path / "a.safetensors", {f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up})
        assert read(path).num_bytes == down.nbytes + up.nbytes
        assert_equal(changes(path), {f"{Q}.weight": up.float() @ down.float()})


def test_a_pytorch_file_is_read(tmp_path: Path) -> None:
    for made in (lora(), {"state_dict": lora(), "step": 3}):
        torch.save(made, tmp_path / "a.pt")
        assert_equal(changes(tmp_path / "a.pt"), {f"{Q}.weight": expected()[f"{Q}.weight"]})


def test_text_encoder_and_image_tensors_are_left_out_with_a_note(tmp_path: Path) -> None:
    others = {
        "lora_te_text_model_encoder_layers_0.lora_down.weight": normal(2, 8),
        "text_encoders.umt5.shared.lora_A.weight": normal(2, 8),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight": normal(3, 24),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_B.weight": normal(24, 3),
        "diffusion_model.blocks.0.cross_attn.norm_k_img.diff": normal(24),
        "diffusion_model.img_emb.proj.0.diff": normal(1280),
        "lora_unet_blocks_2_cross_attn_v_img.alpha": torch.tensor(1.0),
    }
    path = saved(tmp_path / "a.safetensors", others | lora())
    assert sorted(read(path).ignored.values()) == [2, 5]
    assert_equal(changes(path), {f"{Q}.weight": expected()[f"{Q}.weight"]})


def test_widths_of_the_image_encoder_are_not_the_hidden_size(tmp_path: Path) -> None:
    tensors = {"img_emb.proj.0.diff": normal(1280), "text_embedding.0.diff_b": normal(24)}
    path = saved(tmp_path / "a.safetensors", tensors)
    assert (describe_adapter(path)["hidden_size"], list(read(path).ignored.values())) == (24, [1])


@pytest.mark.parametrize(
    ("file", "metadata", "steps"),
    [
        ("Wan21_CausVid_bidirect2_T2V_1_3B_lora_rank32", None, 8),
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32", None, 4),
        ("mine", {"modelspec.title": "My CausVid"}, 8),
        ("mine", None, None),
    ],
)
def test_a_known_few_step_lora_brings_its_settings(
    file: str, metadata: dict[str, str] | None, steps: int | None, tmp_path: Path
) -> None:
    few_step = read(saved(tmp_path / f"{file}.safetensors", lora(), metadata)).few_step
    assert (few_step.defaults()["num_inference_steps"] if few_step else None) == steps
    if few_step:
        assert few_step.defaults()["guidance_scale"] == 1.0


def test_a_description_needs_no_model(tmp_path: Path) -> None:
    modules = [f"diffusion_model.blocks.{block}.self_attn.{part}" for block in range(30) for part in "qv"]
    tensors: dict[str, torch.Tensor] = {}
    for module in modules:
        tensors |= {f"{module}.lora_A.weight": normal(2, 1536), f"{module}.lora_B.weight": normal(1536, 2)}
    tensors["diffusion_model.blocks.0.self_attn.q.alpha"] = torch.tensor(0.5)
    path = saved(tmp_path / "style.safetensors", tensors | {"lora_te_x.lora_up.weight": normal(1, 1)})
    found = describe_adapter(path)
    assert found["fits"] == ["Wan2.1-T2V-1.3B"]
    assert (found["name"], found["rank"], found["alpha"], found["hidden_size"]) == ("style", (2, 2), (0.5, 2.0), 1536)
    assert (found["targets"], found["blocks"]) == ({"self_attn.q": 30, "self_attn.v": 30}, 30)
    assert (found["kinds"], found["unmatched"], list(found["ignored"].values())) == (["lora"], 0, [1])
    assert found["bytes"] == path.stat().st_size
    assert found["few_step"] is None
    json.dumps(found)
    assert SPEC.dim not in (1536, 5120)
