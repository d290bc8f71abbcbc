import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.manifest import Notes, file_sha256, find_damaged, verify, write_manifest

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def write_config(folder: Path, component: str, **values: object) -> None:
    (folder / component / "config.json").write_text(json.dumps(values))


def test_a_folder_that_is_no_model(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="no folder"):
        ModelFolder(tmp_path / "nowhere", "x")
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(ModelNotFoundError, match="lacks vae/, tokenizer/"):
        ModelFolder(folder, "x")


def test_configs_become_a_spec(folder: Path) -> None:
    spec = ModelFolder(folder, "x").spec
    assert (spec.transformer.num_layers, spec.vae.base_dim, spec.text_encoder.num_layers) == (2, 16, 2)
    assert spec.defaults == WAN_1_3B.defaults
    (folder / "generation_defaults.json").write_text('{"height": 64, "flow_shift": 3}')
    defaults = ModelFolder(folder, "x").spec.defaults
    assert (defaults.height, defaults.width, defaults.flow_shift) == (64, 832, 3)


@pytest.mark.parametrize(
    ("component", "values"),
    [
        ("transformer", {"num_layers": "30"}),
        ("transformer", {"num_layers": -1}),
        ("transformer", {"num_layers": 2.5}),
        ("transformer", {"num_layers": None}),
        ("transformer", {"num_attention_heads": True}),
        ("transformer", {"patch_size": 2}),
        ("transformer", {"patch_size": [1, 2, "2"]}),
        ("transformer", {"patch_size": [1, 0, 2]}),
        ("transformer", {"eps": "small"}),
        ("transformer", {"eps": float("nan")}),
        ("vae", {"latents_mean": [None] * 16}),
        ("vae", {"latents_std": {}}),
        ("vae", {"temperal_downsample": [0, 1, 1]}),
        ("vae", {"dim_mult": []}),
        ("text_encoder", {"d_model": [128]}),
    ],
)
def test_a_config_with_values_of_another_kind_names_file_and_field(folder: Path, component: str, values: dict) -> None:
    write_config(folder, component, **values)
    with pytest.raises(ModelNotFoundError, match=next(iter(values))) as caught:
        _ = ModelFolder(folder, "x").spec
    assert f"{component}/config.json" in caught.value.message.replace("\\", "/")


@pytest.mark.parametrize(
    ("component", "values", "words"),
    [
        ("transformer", {"patch_size": [1, 2]}, "patch_size must be"),
        ("transformer", {"patch_size": [2, 2, 2]}, "patch_size must be"),
        ("transformer", {"patch_size": [1, 2, 4]}, "patch_size must be"),
        ("transformer", {"attention_head_dim": 7}, "must be even"),
        ("transformer", {"in_channels": 8}, "z_dim"),
        ("transformer", {"text_dim": 64}, "d_model"),
        ("vae", {"z_dim": 4}, "z_dim"),
        ("vae", {"dim_mult": [1, 2]}, "dim_mult"),
        ("vae", {"latents_mean": [0.0]}, "latents_mean"),
        ("vae", {"latents_std": [0.0] * 16}, "above 0"),
        ("text_encoder", {"d_model": 64}, "d_model"),
    ],
)
def test_configs_that_do_not_fit_together(folder: Path, component: str, values: dict, words: str) -> None:
    write_config(folder, component, **values)
    with pytest.raises(ModelNotFoundError, match=words):
        _ = ModelFolder(folder, "x").spec


def test_the_fingerprints_depend_on_the_configs(folder: Path) -> None:
    before = ModelFolder(folder, "x")
    prints = [before.fingerprint, before.text_fingerprint]
    write_config(folder, "vae", latents_mean=[0.0] * 16)
    write_config(folder, "text_encoder", num_layers=1)
    after = ModelFolder(folder, "x")
    assert after.fingerprint != prints[0]
    assert after.text_fingerprint != prints[1]


def test_damaged_generation_defaults(folder: Path) -> None:
    for text in ('{"height": "tall"}', "[]", "{", '{"negative_prompt": 5}'):
        (folder / "generation_defaults.json").write_text(text)
        with pytest.raises(ModelNotFoundError, match="generation_defaults"):
            _ = ModelFolder(folder, "x").spec


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\x00", b"\x80" * 100])
def test_a_garbage_config_names_the_file(folder: Path, content: bytes) -> None:
    (folder / "vae" / "config.json").write_bytes(content)
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        _ = ModelFolder(folder, "x").spec


def test_a_config_that_is_missing_or_a_folder(folder: Path) -> None:
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ModelNotFoundError, match="is missing"):
        _ = ModelFolder(folder, "x").spec
    (folder / "vae" / "config.json").mkdir()
    with pytest.raises(ModelNotFoundError, match="cannot be read"):
        _ = ModelFolder(folder, "x").spec


def test_a_component_without_its_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelNotFoundError, match=r"lacks its \.safetensors"):
        _ = ModelFolder(folder, "x").transformer


def test_the_usual_file_counts_and_not_what_lies_beside_it(folder: Path) -> None:
    """Variants, adapters; a variant alone is taken."""
    usual = folder / WEIGHTS
    variant = usual.with_name("diffusion_pytorch_model.fp16.safetensors")
    shutil.copy(usual, variant)
    save_file({"lora": torch.zeros(1)}, usual.with_name("pytorch_lora_weights.safetensors"))
    shards = {"weight_map": {"x": "diffusion_pytorch_model.bf16-00001-of-00001.safetensors"}}
    usual.with_name("diffusion_pytorch_model.safetensors.index.bf16.json").write_text(json.dumps(shards))
    usual.with_name("diffusion_pytorch_model.bf16.safetensors.index.json").write_text(json.dumps(shards))
    assert ModelFolder(folder, "x").transformer.paths == (usual,)
    for path in usual.parent.glob("*.index*"):
        path.unlink()
    usual.with_name("pytorch_lora_weights.safetensors").unlink()
    usual.unlink()
    assert ModelFolder(folder, "x").transformer.paths == (variant,)


@pytest.mark.parametrize("part", ["transformer_2", "image_encoder"])
def test_a_pipeline_with_other_parts_is_refused(folder: Path, part: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {part: [None, None]}))
    assert ModelFolder(folder, "x").spec
    (folder / "model_index.json").write_text(json.dumps(index | {part: ["diffusers", "Something"]}))
    with pytest.raises(ModelNotFoundError, match=part):
        _ = ModelFolder(folder, "x").spec
    (folder / "model_index.json").unlink()
    assert ModelFolder(folder, "x").spec


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, "lacks one.safetensors, two.safetensors"),
        ({}, "lacks"),
        ({"weight_map": []}, "weight_map"),
        ({"weight_map": {"a": 5}}, "weight_map"),
        ({"weight_map": {"a": "../../../etc/passwd"}}, "weight_map"),
    ],
)
def test_an_index_of_shards_is_not_trusted(folder: Path, index: object, words: str) -> None:
    (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFoundError, match=words):
        _ = ModelFolder(folder, "x").transformer


def test_the_text_fingerprint_depends_on_tokenizer_and_encoder(folder: Path) -> None:
    prints = {ModelFolder(folder, "x").text_fingerprint}
    (folder / "tokenizer" / "tokenizer.json").write_text("{ }")
    prints.add(ModelFolder(folder, "x").text_fingerprint)
    data = bytearray((folder / "text_encoder" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "text_encoder" / "model.safetensors").write_bytes(data)
    prints.add(ModelFolder(folder, "x").text_fingerprint)
    assert len(prints) == 3
    assert ModelFolder(folder, "y").fingerprint == ModelFolder(folder, "x").fingerprint


def test_every_flipped_byte_is_detected_and_named(folder: Path) -> None:
    write_manifest(folder)
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    assert len(hashes) == 10
    tried = detected = 0
    for name in hashes:
        path = folder / name
        whole = path.read_bytes()
        for at in {0, len(whole) // 2, len(whole) - 1}:
            data = bytearray(whole)
            data[at] ^= 4
            path.write_bytes(data)
            tried += 1
            detected += find_damaged(folder, hashes)[0] == [name]
        path.write_bytes(whole)
    assert detected == tried >= 29
    assert verify(folder, hashes) == 10


def test_the_message_names_what_is_damaged_and_what_is_missing(folder: Path) -> None:
    write_manifest(folder)
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    (folder / WEIGHTS).write_bytes(b"")
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model\.safetensors is damaged"):
        verify(folder, hashes)
    (folder / WEIGHTS).unlink()
    with pytest.raises(WeightsError, match=r"diffusion_pytorch_model\.safetensors is missing"):
        verify(folder, hashes)


def test_good_files_are_remembered_until_they_change(folder: Path, tmp_path: Path) -> None:
    write_manifest(folder)
    hashes = json.loads((folder / "manifest.json").read_text())["sha256"]
    remember = tmp_path / "data" / "verified.json"
    assert verify(folder, hashes, Notes(remember)) == 10
    assert verify(folder, hashes, Notes(remember)) == 0
    known: dict[str, str] = {}
    assert verify(folder, hashes, Notes(None, known)) == 10
    assert verify(folder, hashes, Notes(None, known)) == 0
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1] + b"x")
    for where in ((remember, None), (None, known)):
        with pytest.raises(WeightsError, match="transformer"):
            verify(folder, hashes, Notes(*where))
    remember.write_text("{broken")
    with pytest.raises(WeightsError, match="transformer"):
        verify(folder, hashes, Notes(remember))


def test_a_note_that_cannot_be_written_costs_nothing_but_time(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    hashes = {"README.md": file_sha256(folder / "README.md")}
    assert verify(folder, hashes, Notes(tmp_path / "file" / "verified.json")) == 1


def test_gits_own_hash(tmp_path: Path) -> None:
    (tmp_path / "hello").write_bytes(b"hello\n")
    assert find_damaged(tmp_path, {"hello": "ce013625030ba8dba906f756967f9e9ca394464a"})[0] == []  # git hash-object
    (tmp_path / "hello").write_bytes(b"Hello\n")
    assert find_damaged(tmp_path, {"hello": "ce013625030ba8dba906f756967f9e9ca394464a"})[0] == ["hello"]
