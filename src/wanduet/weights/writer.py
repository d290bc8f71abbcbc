"""Writes a component's weights as safetensors files, tensor by tensor, with little more memory than the source takes to read them."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wanduet.weights.source import WeightSource

if TYPE_CHECKING:
    from torch import Tensor

SHARD_BYTES = 5 * 10**9  # of tensors in one file, or one larger tensor
CHUNK = 4 * 2**20  # values that are converted at a time
WIDTHS = {"BF16": 2, "F32": 4}  # bytes of a value, by safetensors' names of the dtypes that are written

Wrote = Callable[[int], None]  # called with the bytes of each tensor; may raise to stop


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to write: its name in the source, its name in the file, its shape, and `BF16` or `F32`."""

    source: str
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor in the file."""
        return WIDTHS[self.dtype] * math.prod(self.shape)


def write_weights(path: Path, source: WeightSource, entries: Sequence[Entry], wrote: Wrote) -> dict[str, str]:
    """Write tensors as `path` (`x.safetensors`), or as `x-00001-of-0000N.safetensors` and an index if they have more than
    `SHARD_BYTES`; return the SHA-256 of each file by name. Raises WeightsError, OSError."""
    groups = _shards(entries)
    stem, count = path.name.removesuffix(".safetensors"), len(groups)
    hashes: dict[str, str] = {}
    places: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = path.name if count == 1 else f"{stem}-{number:05}-of-{count:05}.safetensors"
        hashes[name] = _write_file(path.with_name(name), source, group, wrote)
        places |= {entry.name: name for entry in group}
    if count > 1:
        total = sum(entry.num_bytes for entry in entries)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2)
        index = path.with_name(f"{path.name}.index.json")
        index.write_bytes(f"{text}\n".encode())
        hashes[index.name] = hashlib.sha256(index.read_bytes()).hexdigest()
    return hashes


def _shards(entries: Sequence[Entry]) -> list[list[Entry]]:
    groups: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if groups[-1] and size + entry.num_bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(entry)
        size += entry.num_bytes
    return groups


def _write_file(path: Path, source: WeightSource, entries: Sequence[Entry], wrote: Wrote) -> str:
    """Write one file, flushed to disk; return its SHA-256."""
    import torch

    dtypes = {"BF16": torch.bfloat16, "F32": torch.float32}
    digest = hashlib.sha256()
    with path.open("xb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(_header(entries))
        tensors = _in_order(source, [entry.source for entry in entries])
        for entry, tensor in zip(entries, tensors, strict=True):
            for part in tensor.flatten().split(CHUNK):
                put(part.to(dtypes[entry.dtype]).view(torch.uint8).numpy().data)
            wrote(entry.num_bytes)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _in_order(source: WeightSource, names: Sequence[str]) -> "Iterator[Tensor]":
    """Yield tensors in the order of `names`; `iterate` may choose another. Each is valid until the next one."""
    done = 0
    while done < len(names):
        before = done
        for name, tensor in source.iterate(names[done:]):
            if name != names[done]:
                break
            yield tensor
            done += 1
        if done == before:
            source.require([names[done]])
            _, tensor = next(iter(source.iterate([names[done]])))
            yield tensor
            done += 1


def _header(entries: Sequence[Entry]) -> bytes:
    """Return the beginning of a safetensors file: the header's length and the header, padded to 8 bytes."""
    described: dict[str, Mapping[str, object]] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for entry in entries:
        end = begin + entry.num_bytes
        described[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
