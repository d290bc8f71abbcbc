"""One model in every layout: the same tensors, whatever file they come from."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.weight_files import ALL_IN_ONE, prefixed, tensors_of, write_all_in_one, write_official, write_shards
from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.weights.describe import describe_weights
from wanduet.weights.diffusers import COMPONENTS, ModelFolder
from wanduet.weights.hub import local_model, open_model
from wanduet.weights.keymaps import TRANSFORMER, UMT5, renamed
from wanduet.weights.recognise import recognise


@pytest.fixture(scope="module")
def miniature() -> ModelFolder:
    return open_model("miniature")


def assert_equal(found: ModelFolder, model: ModelFolder) -> None:
    """The same names, values and shapes. No file of weights has the VAE's statistics, or the number of heads."""
    for component in COMPONENTS:
        theirs, ours = getattr(found, component), getattr(model, component)
        assert theirs.shapes == ours.shapes
        read = theirs.read(list(theirs.tensors), torch.float32)
        for name, tensor in ours.iterate(list(ours.tensors)):
            torch.testing.assert_close(read[name], tensor.float(), rtol=0, atol=0)
    assert found.spec.text_encoder == model.spec.text_encoder
    same = ("latents_mean", "latents_std")
    assert replace(found.spec.vae, **{n: getattr(model.spec.vae, n) for n in same}) == model.spec.vae


@pytest.mark.parametrize("sharded", [False, True])
def test_the_official_folder(tmp_path: Path, miniature: ModelFolder, sharded: bool) -> None:
    folder = write_official(tmp_path / "Wan2.1-T2V-tiny", miniature, sharded)
    found = open_model(str(folder))
    assert (found.name, found.few_step) == ("Wan2.1-T2V-tiny", None)
    assert_equal(found, miniature)
    assert found.spec.transformer == miniature.spec.transformer  # the heads are in its config.json
    assert found.fingerprint != miniature.fingerprint
    assert found.fingerprint == open_model(str(folder)).fingerprint
    state = tensors_of(miniature, "vae")
    state["conv2.bias"] += 1
    torch.save(state, folder / "Wan2.1_VAE.pth")
    assert open_model(str(folder)).fingerprint != found.fingerprint


@pytest.mark.parametrize(
    ("prefix", "official"),
    [("", True), ("model.diffusion_model.", True), ("net.", True), ("", False), ("diffusion_model.", False)],
)
def test_a_transformer_in_one_file(tmp_path: Path, miniature: ModelFolder, prefix: str, official: bool) -> None:
    state = tensors_of(miniature, "transformer", official) | {"freqs": torch.zeros(2)}
    save_file(prefixed(prefix, state), tmp_path / "any name.safetensors")
    files = {"transformer": tmp_path / "any name.safetensors"}
    found = open_model("miniature", files=files)
    assert_equal(found, miniature)
    assert (found.spec.transformer, found.spec.vae) == (miniature.spec.transformer, miniature.spec.vae)
    assert found.spec.defaults == miniature.spec.defaults
    assert found.name == "any name"


@pytest.mark.parametrize("official", [True, False])
@pytest.mark.parametrize(
    ("kind", "stored", "name"),
    [
        ("vsa", "to_gate_compress", "to_gate_compress"),
        ("sla", "self_attn.attn_op.local_attn.proj_l", "attn1.proj_l"),
    ],
)
def test_a_module_of_sparse_attention_in_one_file(
    tmp_path: Path, miniature: ModelFolder, official: bool, kind: str, stored: str, name: str
) -> None:
    state, blocks = tensors_of(miniature, "transformer", official), range(miniature.spec.transformer.num_layers)
    state |= {f"blocks.{block}.{stored}.{part}": torch.zeros(1) for block in blocks for part in ("weight", "bias")}
    save_file(state, tmp_path / "t.safetensors")
    found = open_model("miniature", files={"transformer": tmp_path / "t.safetensors"})
    assert found.spec.transformer.attention == kind
    assert set(found.transformer.tensors) - set(miniature.transformer.tensors) == {
        f"blocks.{block}.{name}.{part}" for block in blocks for part in ("weight", "bias")
    }
    shown = describe_weights(tmp_path / "t.safetensors")
    assert shown is not None
    assert shown["runs"]


def test_every_component_from_a_file_of_its_own(tmp_path: Path, miniature: ModelFolder) -> None:
    files = {
        "transformer": write_shards(tmp_path, tensors_of(miniature, "transformer")),
        "vae": tmp_path / "vae.safetensors",
        "text_encoder": tmp_path / "text.pt",
        "tokenizer": miniature.tokenizer,
    }
    save_file(tensors_of(miniature, "vae"), files["vae"])
    torch.save(tensors_of(miniature, "text_encoder", official=False), files["text_encoder"])
    found = open_model("nobody/nothing", fetch=False, files=files)
    assert_equal(found, miniature)
    rows = [5, 0, 639]
    ours, theirs = (m.text_encoder.read_rows("shared.weight", rows, torch.float32) for m in (miniature, found))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(WeightsError, match="do not belong together"):
        found.text_encoder.read_rows("shared.weight", [640], torch.float32)


def test_all_in_one_file(tmp_path: Path, miniature: ModelFolder) -> None:
    path = write_all_in_one(tmp_path / "all.safetensors", miniature)
    found = open_model(str(path), files={"tokenizer": miniature.tokenizer})
    assert (found.name, found.spec.transformer.attention_head_dim) == ("all", 128)  # as in all published ones
    assert_equal(found, miniature)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_another_dtype_in_the_file_is_the_same_model_rounded(tmp_path: Path, miniature: ModelFolder, dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in tensors_of(miniature, "vae").items()}
    save_file(state, tmp_path / "vae.safetensors")
    found = open_model("miniature", files={"vae": tmp_path / "vae.safetensors"})
    read = found.vae.read(list(found.vae.tensors), torch.float32)
    for name, tensor in miniature.vae.iterate(list(miniature.vae.tensors)):
        torch.testing.assert_close(read[name], tensor.to(dtype).float(), rtol=0, atol=0)
    assert found.spec == miniature.spec  # also its statistics, which are the base's


def test_weights_in_8_bits_give_the_dequantised_ones(tmp_path: Path, miniature: ModelFolder) -> None:
    state = tensors_of(miniature, "transformer")
    scaled: dict[str, torch.Tensor] = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    expected = {}
    for name, tensor in state.items():
        if tensor.ndim == 2 and name.startswith("blocks."):
            scale = tensor.float().abs().max() / 448
            scaled[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = scale
            expected[name] = scaled[name].float() * scale
        else:
            scaled[name], expected[name] = tensor, tensor.float()
    path = tmp_path / "fp8.safetensors"
    save_file(prefixed("model.diffusion_model.", scaled), path)
    found = open_model("miniature", files={"transformer": path})
    read = found.transformer.read(list(found.transformer.tensors), torch.float32)
    assert found.transformer.shapes == miniature.transformer.shapes
    for name, new in renamed(expected, TRANSFORMER).items():
        torch.testing.assert_close(read[new], expected[name], rtol=0, atol=0)
    shown = describe_weights(path)
    assert shown is not None
    assert (shown["runs"], shown["tensors"]) == (True, len(state))
    assert "fp8" in shown["quantisation"]
    assert shown["dtypes"][0] == "F8_E4M3"


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
def test_gguf(tmp_path: Path, miniature: ModelFolder, component: str) -> None:
    gguf = pytest.importorskip("gguf")
    state = tensors_of(miniature, component)
    path = tmp_path / "any.gguf"
    writer = gguf.GGUFWriter(path, "wan" if component == "transformer" else "t5encoder")
    names = renamed(state, UMT5) if component == "text_encoder" else {name: name for name in state}
    stored = {umt5_in_gguf(new) if component == "text_encoder" else new: state[name] for name, new in names.items()}
    for name, tensor in stored.items():
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_equal(open_model("miniature", files={component: path}), miniature)


def umt5_in_gguf(name: str) -> str:
    """Return llama.cpp's name of a tensor of the encoder."""
    parts = {
        "shared": "token_embd", "encoder.final_layer_norm": "enc.output_norm", "encoder.block": "enc.blk",
        ".layer.0.SelfAttention.relative_attention_bias": ".attn_rel_b", ".layer.0.SelfAttention.": ".attn_",
        ".layer.0.layer_norm": ".attn_norm", ".layer.1.layer_norm": ".ffn_norm",
        ".layer.1.DenseReluDense.wi_0": ".ffn_gate", ".layer.1.DenseReluDense.wi_1": ".ffn_up",
        ".layer.1.DenseReluDense.wo": ".ffn_down",
    }  # fmt: skip
    for ours, theirs in parts.items():
        name = name.replace(ours, theirs)
    return name


def test_what_files_lack_is_named_with_its_size(tmp_path: Path, miniature: ModelFolder, monkeypatch) -> None:
    monkeypatch.setattr("wanduet.weights.hub._cached", lambda *_: None)
    save_file(tensors_of(miniature, "transformer"), tmp_path / "t.safetensors")
    with pytest.raises(ModelNotFoundError, match="no vae, no tokenizer") as caught:
        local_model(str(tmp_path / "t.safetensors"), None, {"text_encoder": miniature.part("text_encoder")})
    hint = str(caught.value.hint)
    assert f"wanduet download --model {shlex.quote(str(tmp_path / 't.safetensors'))} --text-encoder" in hint
    assert "505 MiB, or less with --form comfy" in hint  # the VAE and the tokenizer


class Stranger:
    """An object that no file of weights may have."""


def test_pickles_of_anything_but_tensors_are_refused_unread(tmp_path: Path, miniature: ModelFolder) -> None:
    path = tmp_path / "vae.pth"
    state = tensors_of(miniature, "vae")
    for made, words in (
        (state | {"x": Stranger()}, "to open it would run code"),
        ({"generator": state, "hook": Stranger()}, "to open it would run code"),
        ({"generator": {"step": 1}}, "no dictionary of tensors: it holds 'generator'"),
        (state | {"generator": state}, "no dictionary of tensors: it holds 'generator'"),
        ({"generator": {"x": state["conv2.bias"], "module.x": state["conv2.bias"]}}, "several tensors of one name"),
        ([1], "no dictionary of tensors"),
    ):
        torch.save(made, path)
        with pytest.raises(WeightsError, match=words):
            _ = open_model("miniature", files={"vae": path}).vae
    torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(WeightsError, match="damaged"):
        _ = open_model("miniature", files={"vae": path}).vae


@pytest.mark.parametrize("roots", [("generator_ema", "critic", "generator"), ("generator",), ("state_dict",)])
def test_what_a_training_has_saved(tmp_path: Path, miniature: ModelFolder, roots: tuple[str, ...]) -> None:
    """The averaged weights count, by the names that they had before FSDP wrapped them; other objects do not matter."""
    state = tensors_of(miniature, "transformer")
    wrapped = {
        f"model._fsdp_wrapped_module.{name.replace('.self_attn.', '._fsdp_wrapped_module.self_attn.')}": tensor
        for name, tensor in state.items()
    }
    others = {name: tensor + 1 for name, tensor in wrapped.items()}
    path = tmp_path / "bidirectional_checkpoint2" / "model.pt"
    path.parent.mkdir()
    made = {root: others if index else wrapped for index, root in enumerate(roots)}
    torch.save({**dict(reversed(made.items())), "step": 3, "optimizer": {"state": {0: torch.zeros(1)}}}, path)
    found = open_model("miniature", files={"transformer": path})
    assert_equal(found, miniature)
    assert (found.spec.defaults.timesteps, found.spec.defaults.sampler) == ((1000.0, 757.0, 522.0), "renoise")


def test_weights_for_frame_by_frame_are_refused_by_their_folder(tmp_path: Path, miniature: ModelFolder) -> None:
    path = tmp_path / "autoregressive_checkpoint" / "model.pt"
    path.parent.mkdir()
    torch.save({"generator": prefixed("model.", tensors_of(miniature, "transformer"))}, path)
    with pytest.raises(ModelNotFoundError, match="causal attention"):
        _ = open_model("miniature", files={"transformer": path}).spec


def wrong_files(model: ModelFolder) -> dict[str, dict[str, torch.Tensor]]:
    """Files that are no Wan2.1 text to video, as small as they can be recognised."""
    transformer, one = tensors_of(model, "transformer"), torch.zeros(1)
    patch = "patch_embedding.weight"
    vae = {"decoder.middle.0.residual.0.gamma": one, "decoder.conv1.weight": torch.zeros(2, 48, 1, 1, 1)}
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    return {
        "i2v": transformer | {patch: torch.zeros(256, 36, 1, 2, 2), "img_emb.proj.0.bias": one},
        "i2v 2.2": transformer | {patch: torch.zeros(256, 36, 1, 2, 2)},
        "flf2v": transformer | {patch: torch.zeros(256, 36, 1, 2, 2), "img_emb.emb_pos": one},
        "vace": transformer | {"vace_patch_embedding.weight": one},
        "skyreels": transformer | {"fps_embedding.weight": one},
        "5b": transformer | {patch: torch.zeros(3072, 48, 1, 2, 2)},
        "control": transformer | {patch: torch.zeros(256, 48 - 16, 1, 2, 2)},
        "vae 2.2": vae,
        "t5": {query: one, "shared.weight": torch.zeros(32128, 1)},
        "clip": {"vision_model.embeddings.class_embedding": one},
        "lora": {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": one},
        "other": {"some.weight": one},
    }


WRONG = [
    ("i2v", "transformer", "I2V-256 wide is for image to video"),
    ("i2v 2.2", "transformer", r"Wan2\.2 I2V is for image to video"),
    ("flf2v", "transformer", "is for video between two images"),
    ("vace", "transformer", "VACE-256 wide is for video editing"),
    ("skyreels", "transformer", "SkyReels-V2 DF-256 wide is for video of any length"),
    ("5b", "transformer", r"TI2V-5B needs Wan2\.2's VAE"),
    ("control", "transformer", "takes 32 channels and gives 16"),
    ("vae 2.2", "vae", "Wan2.2's VAE, of 48 latent channels"),
    ("t5", "text_encoder", "T5 v1.1, with a vocabulary of 32128"),
    ("clip", "vae", "is not a VAE: it is the image encoder of CLIP"),
    ("lora", "transformer", "is not a transformer: it is an adapter"),
    ("other", "transformer", "is not a transformer: it is no model that is known"),
]


@pytest.mark.parametrize(("name", "component", "words"), WRONG)
def test_a_wrong_file_is_named_with_what_to_take_instead(
    tmp_path: Path, miniature: ModelFolder, name: str, component: str, words: str
) -> None:
    path = tmp_path / "model.safetensors"
    save_file(wrong_files(miniature)[name], path)
    with pytest.raises(ModelNotFoundError, match=words) as caught:
        _ = open_model("miniature", files={component: path}).spec
    assert caught.value.hint
    with pytest.raises(ModelNotFoundError) as caught:
        open_model(str(path))
    assert caught.value.hint


def test_files_that_do_not_go_together_are_refused(tmp_path: Path, miniature: ModelFolder) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for path in (one, two):
        save_file(tensors_of(miniature, "transformer"), path)
    with pytest.raises(ModelNotFoundError, match="two transformers"):
        open_model(str(one), files={"transformer": two})
    with pytest.raises(ModelNotFoundError, match=r"is not a VAE: it is the transformer of Wan2\.1") as caught:
        _ = open_model("miniature", files={"vae": one}).spec
    assert caught.value.hint == "Give it as --transformer."
    half = tmp_path / "wan2.2_t2v_high_noise_14B.safetensors"
    one.rename(half)
    with pytest.raises(ModelNotFoundError, match=r"high-noise half of Wan2\.2 A14B"):
        open_model(str(half))
    two.write_bytes(two.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="is damaged: it has"):
        open_model(str(two))
    with pytest.raises(ModelNotFoundError, match="--vae names"):
        open_model("miniature", files={"vae": tmp_path / "nothing"})


def test_an_official_folder_that_is_not_whole_names_what_it_lacks(tmp_path: Path, miniature: ModelFolder) -> None:
    folder = write_official(tmp_path / "model", miniature)
    (folder / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(ModelNotFoundError, match=r"lacks its vae"):
        open_model(str(folder))
    (folder / "high_noise_model").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"Wan2\.2 A14B, with two transformers"):
        open_model(str(folder))


def test_what_is_said_of_a_transformer(miniature: ModelFolder) -> None:
    (found,) = recognise(miniature.transformer.tensors)
    assert (found.component, found.layout, found.prefix, found.problem) == ("transformer", "diffusers", "", None)
    assert found.dtypes == ("BF16",)
    assert found.device_bytes == sum(t.num_bytes for t in miniature.transformer.tensors.values())


def test_inspect_shows_weights_and_lora_and_refuses_a_truncated_file(tmp_path: Path, miniature: ModelFolder) -> None:
    path = write_all_in_one(tmp_path / "all.safetensors", miniature)
    shown = describe_weights(path)
    assert shown is not None
    assert [(one["component"], one["prefix"]) for one in shown["models"]] == list(ALL_IN_ONE.items())
    assert all(one["runs"] for one in shown["models"])
    half = tmp_path / "low_noise.safetensors"
    save_file(tensors_of(miniature, "transformer"), half)
    shown = describe_weights(half)
    assert shown is not None
    assert (shown["runs"], shown["hint"]) == (False, "Take the weights of Wan2.1 T2V, 1.3B or 14B.")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="is damaged: it has"):
        describe_weights(path)
    lora = {f"diffusion_model.blocks.{i}.ffn.0.lora_{ab}.weight": torch.zeros(4, 4) for i in range(2) for ab in "AB"}
    save_file(lora, tmp_path / "lora.safetensors")
    shown = describe_weights(tmp_path / "lora.safetensors")
    assert shown is not None
    assert (shown["kind"], shown["rank"], shown["targets"]) == ("lora", (4, 4), {"ffn.0": 2})
    save_file({name.replace("ffn", "other"): tensor for name, tensor in lora.items()}, path)
    shown = describe_weights(path)
    assert shown is not None
    assert (shown["component"], shown["runs"]) == ("adapter", False)
    save_file({"latents": torch.zeros(1)}, tmp_path / "latents.safetensors")
    assert describe_weights(tmp_path / "latents.safetensors") is None
    (tmp_path / "a.mp4").write_bytes(b"GGUF")
    assert describe_weights(tmp_path / "a.mp4") is None


QUERY = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([f"{QUERY}.lora_A.weight", f"{QUERY}.lora_B.weight"], None),
        ([f"{QUERY}.diff"], None),
        (["blocks.0.self_attn.norm_q.diff"], None),
        ([f"{QUERY}.lora_A.weight"], "is incomplete, it lacks up"),
        ([f"{QUERY}.alpha"], "it has alpha without matrices"),
        ([f"{QUERY}.oft_blocks"], "a kind that wanduet does not read"),
        (
            ["lora_te_layers_0.lora_down.weight", "lora_te_layers_0.lora_up.weight"],
            "it changes nothing in a transformer",
        ),
        (["lora_unet_down_blocks_0_conv.lora_down.weight"], "it is no LoRA for Wan"),
    ],
)
def test_a_lora_of_few_tensors_is_one(tmp_path: Path, names: list[str], words: str | None) -> None:
    path = tmp_path / "mine.safetensors"
    save_file({name: torch.zeros(8, 8) if "norm" not in name else torch.zeros(8) for name in names}, path)
    shown = describe_weights(path)
    assert shown is not None
    if words is None:
        assert (shown["kind"], shown["hidden_size"]) == ("lora", 8)
    else:
        assert (shown["component"], shown["runs"]) == ("adapter", False)
        assert words in shown["problem"]
        assert "LoRA" in shown["hint"]


@pytest.mark.parametrize("names", [(), ("latents",), ("prompt_embeds",), ("anything",)])
def test_few_tensors_of_other_names_are_no_weights(tmp_path: Path, names: tuple[str, ...]) -> None:
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / "mine.safetensors")
    assert describe_weights(tmp_path / "mine.safetensors") is None
