"""A model folder in every state that disks, users and networks leave it in: named, and never run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
ALL = (TRANSFORMER, VAE, TEXT)
SMALLEST = ("--steps", "1", "--num-frames", "1", "--resolution", "16x16", "--seed", "1", "--json")


@pytest.fixture
def refuse(wanduet, model: Path, work: Path, tmp_path: Path) -> Callable[..., str]:
    """Generates with the damaged model; the message of the refusal, which left no video and no embeddings of it."""

    def run(*words: str, embeddings: bool = False) -> str:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        ran = wanduet("generate", "a red circle", "--model", str(model), *SMALLEST)
        assert ran.code == 1
        message = ran.error
        assert ran.json["error"]["code"] in ("bad_weights", "model_not_found")
        assert not [name for name in os.listdir(work) if name.endswith((".mp4", ".partial"))]
        if not embeddings:
            assert not list(tmp_path.glob("data/embeddings/*"))
        for word in words:
            assert word in message.replace("\\", "/")
        return message

    return run


def edit(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def unsigned(model: Path) -> Path:
    (model / "manifest.json").unlink()
    return model


def test_a_flipped_bit_is_named(refuse, model: Path) -> None:
    for name in ALL:
        whole = (model / name).read_bytes()
        data = bytearray(whole)
        data[len(data) // 3] ^= 16
        (model / name).write_bytes(data)
        refuse(name, "damaged", embeddings=name != TEXT)
        (model / name).write_bytes(whole)


def test_embeddings_of_a_damaged_encoder_are_never_kept(wanduet, refuse, model: Path, tmp_path: Path) -> None:
    whole = (model / TEXT).read_bytes()
    data = bytearray(whole)
    data[-7] ^= 64
    (model / TEXT).write_bytes(data)
    refuse(TEXT)
    ran = wanduet("encode", "a red circle", "--model", str(model), "--json")
    assert ran.code == 1
    assert TEXT in ran.error.replace("\\", "/")
    (model / TEXT).write_bytes(whole)
    assert wanduet("encode", "a red circle", "--model", str(model), "--json").code == 0


@pytest.mark.parametrize("name", ALL)
def test_a_file_that_is_cut_off_empty_or_missing(refuse, model: Path, name: str) -> None:
    whole = (model / name).read_bytes()
    for keep in (len(whole) - 1, len(whole) // 2, 9, 0):
        (model / name).write_bytes(whole[:keep])
        refuse(name, "damaged")
    (model / name).unlink()
    refuse(name.split("/")[0], "lacks its .safetensors file")


@pytest.mark.parametrize("name", [TRANSFORMER, TEXT])
def test_tensors_that_do_not_match_are_named(refuse, model: Path, name: str) -> None:
    path = unsigned(model) / name
    whole = path.read_bytes()
    first = sorted(load_file(path))[0]
    edit(path, lambda t: t.pop(first))
    refuse("missing", first, embeddings=name != TEXT)
    path.write_bytes(whole)
    edit(path, lambda t: t.update({"renamed": t.pop(first)}))
    refuse("missing", first, "not known: renamed", embeddings=name != TEXT)
    path.write_bytes(whole)
    edit(path, lambda t: t.update({first: torch.zeros(3, 5)}))
    refuse("of another shape", first, embeddings=name != TEXT)
    path.write_bytes(whole)
    edit(path, lambda t: t.update({first: t[first] * float("nan")}))
    refuse("nan" if name == TRANSFORMER else "NaN", embeddings=name != TEXT)


def test_a_vae_that_does_not_match_is_named(refuse, model: Path) -> None:
    edit(unsigned(model) / VAE, lambda t: t.pop("decoder.conv_in.bias"))
    refuse("missing: decoder.conv_in.bias", embeddings=True)


def test_weights_in_another_precision_are_fine(wanduet, model: Path) -> None:
    for name in ALL:
        edit(unsigned(model) / name if name == TRANSFORMER else model / name, _to_bfloat16)
    assert wanduet("generate", "a red circle", "--model", str(model), *SMALLEST).code == 0


def _to_bfloat16(tensors: dict[str, torch.Tensor]) -> None:
    tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})


@pytest.mark.parametrize("file", [TRANSFORMER, VAE, TEXT])
def test_weights_of_whole_numbers_are_named(refuse, model: Path, file: str) -> None:
    """What a quantised checkpoint holds: without its scales it would give noise."""
    name = next(name for name, tensor in load_file(model / file).items() if tensor.ndim > 1)
    edit(unsigned(model) / file, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refuse(f"{name} is stored as int8 without scales")


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_config_that_is_garbage_empty_or_missing(refuse, model: Path, component: str) -> None:
    config = unsigned(model) / component / "config.json"
    config.write_text("garbage")
    refuse(f"{component}/config.json", "cannot be read")
    config.write_text("{}")  # the defaults are those of Wan2.1, which the miniature is not
    refuse(component.replace("_", " ") if component == "vae" else "", embeddings=True)
    config.unlink()
    refuse(f"{component}/config.json", "is missing")


@pytest.mark.parametrize(
    ("component", "values", "words"),
    [
        ("transformer", {"num_layers": "six"}, "num_layers"),
        ("transformer", {"patch_size": [1, 2]}, "patch_size"),
        ("transformer", {"image_dim": 5}, "image_dim"),
        ("vae", {"is_residual": True}, "is_residual"),
        ("vae", {"latents_std": [0.0] * 16}, "latents_std"),
        ("text_encoder", {"feed_forward_proj": "relu"}, "feed_forward_proj"),
        ("text_encoder", {"num_layers": 1}, "not known: encoder.block.1"),
        ("text_encoder", {"vocab_size": 10}, "shared.weight"),
        ("text_encoder", {"dropout_rate": None}, "dropout_rate"),
        ("text_encoder", {"layer_norm_epsilon": "x"}, "layer_norm_epsilon"),
    ],
)
def test_a_config_with_other_values(refuse, model: Path, component: str, values: dict, words: str) -> None:
    config = unsigned(model) / component / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    refuse(words)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "nonsense"}}'),
        ("tokenizer_config.json", b"["),
    ],
)
def test_a_tokenizer_that_cannot_be_read(refuse, model: Path, name: str, content: bytes) -> None:
    (unsigned(model) / "tokenizer" / name).write_bytes(content)
    refuse("tokenizer")


def test_no_tokenizer(refuse, model: Path) -> None:
    for path in (unsigned(model) / "tokenizer").iterdir():
        path.unlink()
    assert len(refuse("tokenizer lacks tokenizer.json", "tokenizer.json").splitlines()) == 2
    shutil.rmtree(model / "tokenizer")
    refuse("lacks tokenizer/")


def test_a_damaged_cache_entry_is_made_again(wanduet, tmp_path: Path) -> None:
    arguments = ("encode", "a red circle", "--model", "miniature", "--json")
    assert wanduet(*arguments).code == 0
    (entry,) = (tmp_path / "data" / "embeddings").iterdir()
    whole = entry.read_bytes()
    for damaged in (whole[:-1], b"", b"garbage" * 100, whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]):
        entry.write_bytes(damaged)
        ran = wanduet(*arguments)
        assert ran.code == 0
        assert "made again" in ran.err
        assert entry.read_bytes() == whole
