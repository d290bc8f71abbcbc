"""A small transformer, and LoRA files for it."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.dit.model import WanTransformer
from wanduet.weights.adapters.adapter import Adapter
from wanduet.weights.adapters.reader import measure_adapter, read_adapter

SPEC = replace(
    WAN_1_3B.transformer,
    num_attention_heads=2,
    attention_head_dim=12,
    text_dim=20,
    freq_dim=16,
    ffn_dim=40,
    num_layers=3,
)
with torch.device("meta"):
    SHAPES = {name: tuple(tensor.shape) for name, tensor in WanTransformer(SPEC).state_dict().items()}
# Modules as a Diffusers checkpoint and as the official one name them.
OFFICIAL = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.0.attn1.to_out.0": "blocks.0.self_attn.o",
    "blocks.1.attn2.to_k": "blocks.1.cross_attn.k",
    "blocks.1.attn2.to_v": "blocks.1.cross_attn.v",
    "blocks.2.ffn.net.0.proj": "blocks.2.ffn.0",
    "blocks.2.ffn.net.2": "blocks.2.ffn.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
Q = "blocks.0.attn1.to_q"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def base_weights() -> dict[str, torch.Tensor]:
    return {name: normal(*shape, seed=index) for index, (name, shape) in enumerate(SHAPES.items())}


def factors(module: str, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """A [rank, in] and B [out, rank] for a module, always the same."""
    out, columns = SHAPES[f"{module}.weight"]
    return normal(rank, columns, seed=len(module)), normal(out, rank, seed=len(module) + 50)


def saved(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def saved_peft(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    folder.mkdir()
    saved(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
    return folder


def read(path: Path) -> Adapter:
    """Read a file; what is found in its header alone is the same."""
    adapter = read_adapter(path, SPEC, SHAPES)
    header = measure_adapter(path, SPEC, SHAPES)
    assert (header.num_bytes, header.updates.keys()) == (adapter.num_bytes, adapter.updates.keys())
    return adapter


def changes(path: Path, strength: float = 1.0) -> dict[str, torch.Tensor]:
    """What a LoRA adds to each parameter that it changes, with a base of zeros."""
    return {name: update.applied(torch.zeros(SHAPES[name]), strength) for name, update in read(path).updates.items()}
