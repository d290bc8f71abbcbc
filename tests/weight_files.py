"""Writes a model's weights in the layouts that people have: the official one, ComfyUI's, one file or several."""

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from wanduet.weights.diffusers import COMPONENTS, ModelFolder
from wanduet.weights.keymaps import TRANSFORMER, UMT5, renamed, vae_pairs, vae_size

ALL_IN_ONE = {
    "transformer": "model.diffusion_model.", "vae": "vae.", "text_encoder": "text_encoders.umt5xxl.transformer.",
}  # fmt: skip


def tensors_of(model: ModelFolder, component: str, official: bool = True) -> dict[str, Tensor]:
    """Return copies of a component's tensors, by official names or by those of Diffusers."""
    source = getattr(model, component)
    state = {name: tensor.clone() for name, tensor in source.iterate(list(source.tensors))}
    if not official:
        return state
    pairs = {"transformer": TRANSFORMER, "vae": vae_pairs(*vae_size(state)), "text_encoder": UMT5}[component]
    names = renamed(state, [(theirs, ours) for ours, theirs in pairs])
    return {names[name]: tensor for name, tensor in state.items()}


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same tensors with a prefix before their names."""
    return {prefix + name: tensor for name, tensor in state.items()}


def write_shards(folder: Path, state: dict[str, Tensor], count: int = 3) -> Path:
    """Write tensors in several files with an index, as Wan's 14B has them, and return the index."""
    names = list(state)
    files = {}
    for shard in range(count):
        file = f"diffusion_pytorch_model-{shard + 1:05}-of-{count:05}.safetensors"
        save_file({name: state[name] for name in names[shard::count]}, folder / file)
        files |= dict.fromkeys(names[shard::count], file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return index


def write_official(folder: Path, model: ModelFolder, sharded: bool = False) -> Path:
    """Write a model as Wan's own repositories have it: configs are the transformer's only."""
    folder.mkdir()
    state = tensors_of(model, "transformer")
    if sharded:
        write_shards(folder, state)
    else:
        save_file(state, folder / "diffusion_pytorch_model.safetensors")
    spec = model.spec.transformer
    config = {
        "model_type": "t2v",
        "dim": spec.dim,
        "num_heads": spec.num_attention_heads,
        "num_layers": spec.num_layers,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors_of(model, "vae"), folder / "Wan2.1_VAE.pth")
    torch.save(tensors_of(model, "text_encoder"), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    tokenizer = folder / "google" / "umt5-xxl"
    tokenizer.mkdir(parents=True)
    for path in model.tokenizer.iterdir():
        (tokenizer / path.name).write_bytes(path.read_bytes())
    return folder


def write_all_in_one(path: Path, model: ModelFolder) -> Path:
    """Write a model in one file, as ComfyUI's checkpoints are: its text encoder has transformers' names."""
    state: dict[str, Tensor] = {}
    for component in COMPONENTS:
        state |= prefixed(ALL_IN_ONE[component], tensors_of(model, component, component != "text_encoder"))
    save_file(state, path)
    return path


def _field(number: int, value: int | bytes | float) -> bytes:
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def sentencepiece_model(pieces: list[tuple[str, float, int]], unknown: int = 2, kind: int = 1) -> bytes:
    """Return a SentencePiece model: pieces with their scores and kinds (1 normal, 2 unknown, 3 control, 4 user's)."""
    listed = (_field(1, text.encode()) + _field(2, score) + _field(3, kind) for text, score, kind in pieces)
    return b"".join(_field(1, piece) for piece in listed) + _field(2, _field(3, kind) + _field(40, unknown))
