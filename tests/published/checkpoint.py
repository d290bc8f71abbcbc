"""Wan2.1-T2V-1.3B as it is published, without its gigabytes: true names, sizes, headers and configs over sparse files."""

import json
import os
import struct
from math import prod
from pathlib import Path
from typing import Any

PUBLISHED: dict[str, Any] = json.loads(Path(__file__).with_name("wan21_t2v_1_3b.json").read_text(encoding="utf-8"))
MODEL, REVISION = PUBLISHED["repository"], PUBLISHED["revision"]
SIZES = {name: file["bytes"] for name, file in PUBLISHED["files"].items()}
HASHES = {name: file["sha256"] for name, file in PUBLISHED["files"].items()}
INDEX_NAMES = {
    "transformer": "diffusion_pytorch_model.safetensors.index.json",
    "text_encoder": "model.safetensors.index.json",
}


def write_checkpoint(folder: Path) -> Path:
    """Every published file with its true size. What is not a config, an index or a header is a hole."""
    for name, size in SIZES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(small_file(name))
        os.truncate(path, size)
    return folder


def small_file(name: str) -> bytes:
    """What is known of a file's bytes: all of a config or an index, the header of a shard."""
    component, _, file = name.partition("/")
    if name in PUBLISHED["configs"]:
        content: str = PUBLISHED["configs"][name]
        return content.encode()
    if file == INDEX_NAMES.get(component):
        return _index(component)
    if file.endswith(".safetensors"):
        return _header(PUBLISHED["tensors"][component][file], SIZES[name])
    return b""


def _index(component: str) -> bytes:
    shards: dict[str, dict[str, list[int]]] = PUBLISHED["tensors"][component]
    total = sum(4 * prod(shape) for tensors in shards.values() for shape in tensors.values())
    weight_map = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    value = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _header(tensors: dict[str, list[int]], size: int) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in sorted(tensors.items()):  # the order that safetensors writes
        end = offset + 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    length = size - offset - 8
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    return struct.pack("<Q", length) + text.ljust(length)
