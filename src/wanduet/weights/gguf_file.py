"""Reads GGUF files of a transformer or a UMT5 encoder: their header, and their tensors block by block.

The header is parsed here, with limits, as it is a stranger's; the blocks are dequantised by the `gguf` package. Tensors
are read with plain reads, some blocks at a time in each of PyTorch's threads, so that little more than one dense tensor
is in memory.
"""

import hashlib
import math
import re
import struct
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wanduet.errors import WeightsError
from wanduet.untrusted import MAX_HEADER_BYTES, cut, open_regular
from wanduet.weights.quantised import INSTEAD, VERSION, Buffer
from wanduet.weights.safetensors import samples
from wanduet.weights.source import TensorInfo, WeightSource, fetch_again, some_of

if TYPE_CHECKING:  # headers are read and checked before torch is imported
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

CHUNK_ELEMENTS = 2**20  # that are dequantised at a time: some temporaries of 4 MiB
_MOST_DIMENSIONS, _MOST_ENTRIES = 8, 2**16
_DENSE = ("F32", "F16", "BF16")  # read as they are
_BLOCKS = (
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS",
    "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
)  # fmt: skip
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
# Architectures that mean nothing for Wan: the tools that write them give them to every model.
_VAGUE = ("pig", "cow", "")
_TRANSFORMERS = ("blocks.0.self_attn.q.weight", "blocks.0.attn1.to_q.weight")
_TEXT_ENCODER = "enc.blk.0.attn_q.weight"
_KNOWN = (
    *_TRANSFORMERS,
    _TEXT_ENCODER,
    "encoder.block.0.layer.0.SelfAttention.q.weight",
    "decoder.middle.0.residual.0.gamma",
    "decoder.mid_block.resnets.0.norm1.gamma",
)
# GGUF's names of a UMT5 encoder, and those of transformers.
_UMT5 = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}
_UMT5_BLOCK = {
    **{f"attn_{one}": f"0.SelfAttention.{one}" for one in "qkvo"},
    "attn_norm": "0.layer_norm",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
    "ffn_norm": "1.layer_norm",
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor is in the file. `type`: GGUF's name of its type; a block of it has `values` in `size` bytes."""

    type: str
    offset: int
    values: int
    size: int


class GGUFSource(WeightSource):
    """The tensors of a GGUF file, dense: F32, F16 and BF16 as they are stored, all others in float32.

    Names are as stored, with any prefix; those of a UMT5 encoder are transformers' names.
    """

    def __init__(self, name: str, path: Path) -> None:
        """Read the header. `name`: the component's name in messages. Raises WeightsError for a damaged file, another
        model's, or a type of blocks that is not known."""
        super().__init__(name)
        self.path = path
        self._places: dict[str, _Place] = {}
        self._types: set[str] = set()
        try:
            with open_regular(path) as file:
                self._size = file.seek(0, 2)
                file.seek(0)
                self._read_header(_Header(file))
        except OSError as error:
            raise WeightsError(f"Cannot read {path}: {error.strerror}.") from error
        except (ValueError, struct.error) as error:
            raise WeightsError(f"{path} is no GGUF file, or damaged ({cut(error)}).", hint=fetch_again(path)) from error
        self._check_model()
        kinds = {info.dtype for info in self.tensors.values()}
        self.quantisation = f"GGUF ({', '.join(sorted(self._types - {'F32', 'F16'}) or sorted(kinds))})"
        if _TEXT_ENCODER in self.tensors:
            self._rename_umt5()

    def iterate(self, names: Collection[str]) -> "Iterator[tuple[str, Tensor]]":
        """See `WeightSource`. Takes the memory of the largest tensor in float32, and of a few chunks a thread."""
        buffer = Buffer()
        with self._opened() as file:
            for name in sorted(set(names) & set(self._places), key=lambda name: self._places[name].offset):
                yield name, self._read(file, name, buffer)

    def read_rows(self, name: str, rows: Sequence[int], dtype: "torch.dtype") -> "Tensor":
        """See `WeightSource`; reads these rows only."""
        import torch

        self.require_rows(name, rows)
        shape = self.tensors[name].shape
        out = torch.empty(len(rows), *shape[1:], dtype=dtype)
        place = self._places[name]
        stride = self.tensors[name].num_bytes // shape[0]
        with self._opened() as file:
            for index, row in enumerate(rows):
                file.seek(place.offset + row * stride)
                data = _exactly(file, stride)
                if place.type in _DENSE:
                    values = torch.frombuffer(data, dtype=_torch_dtype(place.type))
                else:
                    values = torch.from_numpy(_dequantised(data, place.type))
                out[index] = values.view(shape[1:])
        return out

    @contextmanager
    def _opened(self) -> Iterator[BufferedReader]:
        """Open the file. Raises WeightsError if it cannot be read, also in the block."""
        try:
            with open_regular(self.path) as file:
                yield file
        except (OSError, ValueError) as error:
            raise WeightsError(f"{self.path} cannot be read: {cut(error)}.", hint=fetch_again(self.path)) from error

    def fingerprint(self) -> str:
        """Return a digest of the header and of samples of the data."""
        first = min((place.offset for place in self._places.values()), default=0)
        digest = hashlib.sha256(f"{VERSION} {self.path.name}:{self._size}".encode())
        with open_regular(self.path) as file:
            digest.update(file.read(first))
            for data in samples(file, first, self._size):
                digest.update(data)
        return digest.hexdigest()

    def _read_header(self, header: "_Header") -> None:
        """Read what the file has beside its tensors, and where they are. Raises ValueError, OSError."""
        if header.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = header.number("I")
        if version not in (2, 3):
            raise ValueError("it is big-endian" if version % 65536 == 0 else f"its version {version} is not known")
        count, entries = header.number("Q"), header.number("Q")
        if max(count, entries) > _MOST_ENTRIES:
            raise ValueError(f"its header says that it has {count} tensors and {entries} other entries")
        found: dict[str, Any] = {}
        for _ in range(entries):
            name = header.text()
            found[name] = header.value(header.number("I"))
        self.metadata = {name: value for name, value in found.items() if isinstance(value, str)}
        for _ in range(count):
            self._add(header.text(), header, found)
        alignment = found.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise ValueError("general.alignment is none")
        begin = -(-header.position // alignment) * alignment
        self._places = {name: replace(place, offset=place.offset + begin) for name, place in self._places.items()}
        end = max((self._places[name].offset + info.num_bytes for name, info in self.tensors.items()), default=begin)
        if end > self._size:
            raise ValueError(f"it is cut off: it has {self._size} bytes, its header says {end}")

    def _add(self, name: str, header: "_Header", found: dict[str, Any]) -> None:
        """Read one tensor's entry in the header. Raises ValueError."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        dimensions = header.number("I")
        if dimensions > _MOST_DIMENSIONS:
            raise ValueError(f"{cut(name)} has {dimensions} dimensions")
        shape = tuple(header.number("Q") for _ in range(dimensions))[::-1]
        number, offset = header.number("I"), header.number("Q")
        if name in self.tensors:
            raise ValueError(f"it has {cut(name)} twice")
        try:
            type = GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"{cut(name)} is of the type {number}, which is not known") from None
        values, size = GGML_QUANT_SIZES[type]
        if type.name not in (*_DENSE, *_BLOCKS):
            raise ValueError(f"{cut(name)} is of the type {type.name}, which cannot be dequantised")
        elements = math.prod(shape)
        if elements >= 2**48 or (shape[-1] if shape else 1) % values:
            raise ValueError(f"{cut(name)} has a shape that its type {type.name} cannot have: {list(shape)}")
        num_bytes = elements // values * size
        # ComfyUI's tools flatten some tensors, and keep their shape here.
        kept = found.get(f"comfy.gguf.orig_shape.{name}")
        if isinstance(kept, tuple) and all(isinstance(one, int) for one in kept) and math.prod(kept) == elements:
            shape = kept
        self._types.add(type.name)
        dtype = type.name if type.name in _DENSE else "F32"
        self.tensors[name] = TensorInfo(self.path, shape, dtype, num_bytes)
        self._places[name] = _Place(type.name, offset, values, size)

    def _check_model(self) -> None:
        """Raise WeightsError for a file of another model, and for a transformer without its first layer."""
        architecture = self.metadata.get("general.architecture", "")
        known = next((name for name in self.tensors if f".{name}".endswith(tuple(f".{one}" for one in _KNOWN))), None)
        if architecture not in (*_VAGUE, "wan", "t5", "t5encoder"):
            raise WeightsError(f"{self.path} is a model of another kind: {cut(architecture)}, not Wan.", hint=INSTEAD)
        if known is None:
            raise WeightsError(
                f"{self.path} has no tensors of Wan, but for example {some_of(sorted(self.tensors), 3) or 'none'}."
            )
        prefix = known.removesuffix(_TRANSFORMERS[0]).removesuffix(_TRANSFORMERS[1])
        if prefix != known and f"{prefix}patch_embedding.weight" not in self.tensors:
            raise WeightsError(
                f"{self.path} lacks patch_embedding.weight: it has 5 dimensions, which the tool that wrote the file "
                "cannot store, and which was not added afterwards.",
                hint="Take a GGUF file that has it, or the fp8 or bf16 file of the same model.",
            )

    def _rename_umt5(self) -> None:
        """Give the tensors of the encoder the names of transformers, and drop those of a decoder."""
        blocks = [name.removesuffix("attn_q.weight") for name in self.tensors if name.endswith(".attn_q.weight")]
        needed = [f"{block}attn_rel_b.weight" for block in blocks if block.startswith("enc.")]
        if without := sorted(set(needed) - set(self.tensors)):
            raise WeightsError(
                f"{self.path} lacks {some_of(without)}: in UMT5 every layer has one, in T5 only the first.",
                hint="Take a file of UMT5-XXL (umt5-xxl-encoder), not of T5 v1.1.",
            )
        names = {name: new for name in self.tensors if (new := umt5_name(name)) is not None}
        self.tensors = {new: self.tensors[name] for name, new in names.items()}
        self._places = {new: self._places[name] for name, new in names.items()}

    def _read(self, file: BufferedReader, name: str, buffer: Buffer) -> "Tensor":
        import torch

        info, place = self.tensors[name], self._places[name]
        file.seek(place.offset)
        if place.type in _DENSE:
            raw = buffer.take((info.num_bytes,), torch.uint8)
            if file.readinto(raw.numpy().data) < info.num_bytes:
                raise ValueError("it became shorter while it was read")
            return raw.view(_torch_dtype(info.dtype)).view(info.shape)
        elements = info.num_bytes // place.size * place.values
        out = buffer.take((elements,), torch.float32)
        numbers, step, lock = out.numpy(), max(1, CHUNK_ELEMENTS // place.values) * place.values, threading.Lock()

        def fill(start: int) -> None:
            part = numbers[start : start + step]
            with lock:
                file.seek(place.offset + start // place.values * place.size)
                data = _exactly(file, len(part) // place.values * place.size)
            part[:] = _dequantised(data, place.type)

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for _ in pool.map(fill, range(0, elements, step)):  # raises what a thread raised
                pass
        return out.view(info.shape)


class _Header:
    """Reads the parts of a header in turn, at most `MAX_HEADER_BYTES`. Every method raises ValueError at its end."""

    def __init__(self, file: BufferedReader) -> None:
        self.position, self._file = 0, file

    def take(self, count: int) -> bytes:
        """The next bytes."""
        self.position += count
        if self.position > MAX_HEADER_BYTES:
            raise ValueError("its header is too long")
        return bytes(_exactly(self._file, count))

    def number(self, code: str) -> Any:
        """A number, by its code in `struct`."""
        (found,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return found

    def text(self) -> str:
        """A text; what is no UTF-8 in it is replaced."""
        return self.take(self.number("Q")).decode(errors="replace")

    def value(self, kind: int) -> Any:
        """A value: a number, a text, or a tuple of at most 16 numbers; None for a longer list, which is skipped."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"it has a value of the kind {kind}, which is not known")
        of, count = self.number("I"), self.number("Q")
        if of == _TEXT:
            for _ in range(count):
                self.take(self.number("Q"))
            return None
        if of not in _NUMBERS:
            raise ValueError(f"it has a list of the kind {of}, which is not known")
        if count <= 16:
            return tuple(self.number(_NUMBERS[of]) for _ in range(count))
        self.take(count * struct.calcsize("<" + _NUMBERS[of]))
        return None


def umt5_name(name: str) -> str | None:
    """Return transformers' name of a tensor of a UMT5 encoder in GGUF; None if it is not part of the encoder."""
    layer, _, kind = name.rpartition(".")
    if layer in _UMT5:
        return f"{_UMT5[layer]}.{kind}"
    found = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)", layer)
    if found is None or found[2] not in _UMT5_BLOCK:
        return None
    return f"encoder.block.{found[1]}.layer.{_UMT5_BLOCK[found[2]]}.{kind}"


def _dequantised(data: bytearray, type: str) -> "NDArray[np.float32]":
    """Return the values `[N]` of whole blocks of a type."""
    import gguf
    import numpy as np

    blocks = np.frombuffer(data, np.uint8)[None]  # as one row: of several, the package takes 16 at a time
    values: NDArray[np.float32] = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type]).reshape(-1)
    return values


def _exactly(file: BufferedReader, count: int) -> bytearray:
    """Read so many bytes. Raises ValueError if the file ends before."""
    data = bytearray(file.read(count))
    if len(data) < count:
        raise ValueError("it is cut off")
    return data


def _torch_dtype(name: str) -> "torch.dtype":
    import torch

    return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
