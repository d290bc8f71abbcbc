"""Reads the safetensors files of one component: their headers, and their tensors.

Files are memory-mapped one at a time, only during a read, and mapped again after each `MAPPED_BYTES`, because pages
that were read stay resident as long as the mapping exists. So reading needs little more host memory than the requested
tensors, however large the files are.
"""

import hashlib
import math
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from wanduet.errors import WeightsError
from wanduet.untrusted import (
    check_regular,
    cut,
    not_safetensors,
    open_regular,
    read_safetensors_header,
)
from wanduet.weights.source import TensorInfo, WeightSource, fetch_again, some_of

if TYPE_CHECKING:  # configs and headers are read and checked before torch is imported
    from torch import Tensor

# Bits per value, by safetensors' dtype names.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# PyTorch's names of dtypes, and safetensors'.
DTYPES = {
    "torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16",
    "torch.float8_e4m3fn": "F8_E4M3", "torch.float8_e5m2": "F8_E5M2", "torch.int64": "I64", "torch.int32": "I32",
    "torch.int16": "I16", "torch.int8": "I8", "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip
# Bytes that the fingerprint hashes at each of `SAMPLES` places of a file.
SAMPLE_BYTES = 65536
SAMPLES = 16
MAPPED_BYTES = 256 * 2**20


class TensorFiles(WeightSource):
    """The tensors of a component, in one or several safetensors files."""

    def __init__(self, name: str, paths: Sequence[Path]) -> None:
        """Read the headers. `name`: the component's name in messages. Raises WeightsError for a damaged file."""
        super().__init__(name)
        self.paths = tuple(paths)
        for path in self.paths:
            found, metadata = _contents_of(path)
            if twice := sorted(set(found) & set(self.tensors)):
                files = f"{self.tensors[twice[0]].file} and {path}"
                raise WeightsError(
                    f"The {name}'s {some_of(twice)} stand in two files: {files}.", hint=fetch_again(path)
                )
            self.tensors.update(found)
            self.metadata.update(metadata)

    def iterate(self, names: Collection[str]) -> "Iterator[tuple[str, Tensor]]":
        """Yield the named tensors file by file, memory-mapped. Raises WeightsError."""
        for path in self.paths:
            wanted = [n for n in names if n in self.tensors and self.tensors[n].file == path]
            if not wanted:
                continue
            try:
                for portion in portions(wanted, self.tensors):
                    with safe_open(path, framework="pt") as file:
                        for name in portion:
                            yield name, file.get_tensor(name)
            except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: it vanished while it was opened
                raise WeightsError(f"{path} is damaged: {cut(error)}.", hint=fetch_again(path)) from error

    def fingerprint(self) -> str:
        """Return a digest of every header and of samples of the data; reads a few MiB, however large the files are."""
        digest = hashlib.sha256()
        for path in self.paths:
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                digest.update(file.read(length))
                for data in samples(file, 8 + length, size):
                    digest.update(data)
        return digest.hexdigest()


def portions(names: Sequence[str], tensors: Mapping[str, TensorInfo]) -> Iterator[list[str]]:
    """Yield groups of names to map together: at most `MAPPED_BYTES` each, or one larger tensor."""
    portion: list[str] = []
    mapped = 0
    for name in names:
        size = tensors[name].num_bytes
        if portion and mapped + size > MAPPED_BYTES:
            yield portion
            portion, mapped = [], 0
        portion.append(name)
        mapped += size
    yield portion


def samples(file: BufferedReader, begin: int, end: int) -> Iterator[bytes]:
    """Yield the bytes at `SAMPLES` places of a file, spread evenly from `begin` to `end`."""
    for sample in range(SAMPLES):
        file.seek(begin + (end - begin) * sample // SAMPLES)
        yield file.read(SAMPLE_BYTES)


_POINTER = b"version https://git-lfs"


def check_pointer(path: Path) -> None:
    """Raise WeightsError for a Git LFS pointer, which git checks out in place of a large file without LFS."""
    try:
        with open_regular(path) as file:
            is_pointer = file.read(len(_POINTER)) == _POINTER
    except OSError:
        return
    if is_pointer:
        raise WeightsError(
            f"{path} is a Git LFS pointer of a few bytes, not the file itself.",
            hint=f"Run `git lfs pull` in that folder, or: {fetch_again(path)}",
        )


def _contents_of(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return the entries of a file's header, checked against each other and against the file's size, and its metadata."""
    check_pointer(path)
    try:
        header = read_safetensors_header(path)
        size = check_regular(path)
        with open_regular(path) as file:
            (length,) = struct.unpack("<Q", file.read(8))
        tensors: dict[str, TensorInfo] = {}
        places: list[tuple[int, int, str]] = []
        metadata = {name: text for name, text in header.pop("__metadata__", {}).items() if isinstance(text, str)}
        for name, entry in header.items():
            info, begin, end = _entry(path, name, entry)
            tensors[name] = info
            places.append((begin, end, name))
        last = _require_side_by_side(places)
    except OSError as error:
        raise WeightsError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise WeightsError(f"{path} is {not_safetensors(path, error)}.", hint=fetch_again(path)) from error
    end = 8 + length + last
    if size != end:
        raise WeightsError(f"{path} is damaged: it has {size} bytes, its header says {end}.", hint=fetch_again(path))
    return tensors, metadata


def _entry(path: Path, name: str, entry: dict[str, Any]) -> tuple[TensorInfo, int, int]:
    """Return one tensor's header entry, its first byte and the byte after its last. Raises ValueError, LookupError or
    TypeError for an invalid one."""
    shape, dtype, (begin, end) = entry["shape"], entry["dtype"], entry["data_offsets"]
    if len(shape) > 16 or not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
        raise ValueError(f"{cut(name)} has a shape or a place that is none")
    bits = _BITS.get(dtype)
    if bits is None:
        raise ValueError(f"{cut(name)} is of the kind {cut(repr(dtype))}, which is not known")
    if 8 * (end - begin) != bits * math.prod(shape):
        raise ValueError(f"{cut(name)} does not have as many bytes as its shape needs")
    return TensorInfo(path, tuple(shape), dtype, end - begin), begin, end


def _require_side_by_side(places: list[tuple[int, int, str]]) -> int:
    """Require that tensors neither overlap nor leave gaps; return the end of the last. Raises ValueError."""
    last = 0
    for begin, end, name in sorted(places):
        if begin != last:
            raise ValueError(f"{cut(name)} overlaps another tensor, or there is a gap before it")
        last = end
    return last
