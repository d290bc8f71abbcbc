"""Weights that are stored in 8 bits with scales, as a source of dense float32 tensors.

Read are float8 (e4m3fn, e5m2) without scales, and float8 and int8 with a float32 scale for a matrix, for a row, or for a
group of columns of a row, under the names of ComfyUI (`scale_weight`; `weight_scale` with `_quantization_metadata` or
`comfy_quant`), musubi-tuner and LightX2V. Every other format is refused by name. A weight is its stored number times its
scale, rounded once, in float32; scales of inputs belong to products in 8 bits and are not needed.
"""

import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from wanduet.errors import WeightsError
from wanduet.untrusted import cut, parse_json
from wanduet.weights.source import TensorInfo, WeightSource

if TYPE_CHECKING:  # headers are read and checked before torch is imported
    import torch
    from torch import Tensor

INSTEAD = "Take the bf16, fp16, fp8 (e4m3fn, scaled or not) or GGUF file of the same model."
VERSION = "dequantised 1"  # part of the fingerprint: raise it when values change
SCALE_BYTES = 16 * 2**20  # of scales that are read at a time
_JSON_BYTES = 4096  # of a layer's description in a `comfy_quant`
_STORED = {"F8_E4M3": "fp8 (e4m3fn)", "F8_E5M2": "fp8 (e5m2)", "I8": "int8"}
_FLOATS = ("F64", "F32", "F16", "BF16")
# ComfyUI's names of formats, and the dtype in which a safetensors file has them.
_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
_SCALES = ("scale_weight", "weight_scale")
_NOT_NEEDED = ("scaled_fp8", "comfy_quant", "scale_input", "input_scale")
# How a layer may be named in the description of a file that has the model's tensors under a prefix, and the reverse.
_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "model.",
    "net.",
    "text_encoders.umt5xxl.transformer.",
    "vae.",
)
# By a pattern of tensors' names; the first that is found counts.
_NOT_READ = {
    r"\.weight\._(data|scale|shift|scale_shift|zeropoint)$": "quanto",
    r"\.(wscales|wtscale|smooth_factor|proj_down)$": "nunchaku (SVDQuant)",
    r"\.(qzeros|g_idx)$": "GPTQ or AWQ",
    r"\.(absmax|nested_absmax|quant_map|SCB)$|\.quant_state\.": "bitsandbytes",
    r":qdata$|weight_qdata$": "torchao",
    r"\.(weight_scale_2|weight_global_scale)$": "nvfp4",
    r"\.pre_quant_scale$": "fp8 with inputs that are scaled by columns (pre_quant_scale)",
    r"\.qweight$": "packed integers (qweight)",
}


@dataclass(frozen=True, slots=True)
class _Stored:
    """How a tensor is stored: its kind in words, and the name of its scale."""

    kind: str
    scale: str | None = None


def dequantised(source: WeightSource) -> WeightSource:
    """Return a source of the same weights without scales and marks, all of them floating; `source` itself if nothing in
    it is quantised.

    `source`: names as stored, with any prefix. Reads the header, and a few bytes for each layer that is described in a
    tensor. Raises WeightsError for a format that is not read, by its name, and for scales of a wrong shape.
    """
    _refuse_others(source)
    formats = _described(source)
    stored: dict[str, _Stored] = {}
    left_out: set[str | None] = {name for name in source.tensors if _last(name) in _NOT_NEEDED}
    for name, info in source.tensors.items():
        if name not in left_out and (found := _stored(source, name, info, formats.get(name))) is not None:
            stored[name] = found
    left_out |= {one.scale for one in stored.values()}
    return Dequantised(source, stored, left_out - {None}) if stored or left_out else source


class Dequantised(WeightSource):
    """The weights of another source as dense float32 tensors; those that are not quantised as they are."""

    def __init__(self, source: WeightSource, stored: Mapping[str, _Stored], left_out: Collection[str | None]) -> None:
        """`stored`: how the quantised tensors are stored, by name; `left_out`: names of what is not a weight."""
        super().__init__(source.name)
        self.source, self._stored, self.metadata = source, stored, source.metadata
        self.tensors = {
            name: replace(info, dtype="F32") if name in stored else info
            for name, info in source.tensors.items()
            if name not in left_out
        }
        self.quantisation = "; ".join(sorted({one.kind for one in stored.values()})) or None

    def iterate(self, names: Collection[str]) -> "Iterator[tuple[str, Tensor]]":
        """See `WeightSource`. Takes the memory of the largest tensor in float32, and of `SCALE_BYTES` of scales."""
        import torch

        buffer = Buffer()
        for portion in self._portions([name for name in names if name in self.tensors]):
            wanted = {name: one.scale for name in portion if (one := self._stored.get(name)) and one.scale}
            scales = self.source.read(list(wanted.values()), torch.float32)
            for name, tensor in self.source.iterate(portion):
                if name not in self._stored:
                    yield name, tensor
                    continue
                out = buffer.take(tuple(tensor.shape), torch.float32).copy_(tensor)
                yield name, self._multiply(name, out, scales[wanted[name]] if name in wanted else None)

    def read_rows(self, name: str, rows: Sequence[int], dtype: "torch.dtype") -> "Tensor":
        """See `WeightSource`; dequantises these rows only."""
        import torch

        found = self._stored.get(name)
        if found is None:
            self.require([name])
            return self.source.read_rows(name, rows, dtype)
        exact = self.source.read_rows(name, rows, torch.float32)
        scale = self.source.read([found.scale], torch.float32)[found.scale] if found.scale else None
        if scale is not None and scale.numel() > 1:
            scale = scale[torch.tensor(rows, dtype=torch.long)]
        return self._multiply(name, exact, scale).to(dtype)

    def fingerprint(self) -> str:
        """See `WeightSource`."""
        return hashlib.sha256(f"{VERSION} {self.source.fingerprint()}".encode()).hexdigest()

    def _multiply(self, name: str, out: "Tensor", scale: "Tensor | None") -> "Tensor":
        """Multiply a matrix by its scale in place. Raises WeightsError for a scale that is no number."""
        if scale is None:
            return out
        if not bool(scale.isfinite().all()):
            raise WeightsError(f"A scale of the {self.name}'s {cut(name)} is not a finite number.")
        if scale.numel() == 1:
            return out.mul_(scale.reshape(()))
        rows = out.view(len(out), scale.numel() // len(out), -1)
        rows.mul_(scale.view(*rows.shape[:2], 1))
        return out

    def _portions(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Yield groups of names whose scales take at most `SCALE_BYTES`, or one with larger scales."""
        portion: list[str] = []
        size = 0
        for name in names:
            scale = self._stored[name].scale if name in self._stored else None
            count = 4 * math.prod(self.source.tensors[scale].shape) if scale else 0
            if portion and size + count > SCALE_BYTES:
                yield portion
                portion, size = [], 0
            portion.append(name)
            size += count
        yield portion


class Buffer:
    """Memory of tensors of which only one is in use at a time; it is as large as the largest."""

    def __init__(self) -> None:
        """It is empty until a tensor is taken."""
        import torch

        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: "torch.dtype") -> "Tensor":
        """Return a tensor of undefined values; what was taken before becomes invalid."""
        size = math.prod(shape) * dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = self._bytes.new_empty(0)  # the old memory is freed first
            self._bytes = self._bytes.new_empty(size)
        return self._bytes[:size].view(dtype).view(shape)


def refuse(source: str, what: str, format: str) -> WeightsError:
    """Return the error for a format that is not read. `source`: the component; `what`: a tensor or layer of it."""
    return WeightsError(f"The {source}'s {cut(what)} is stored as {cut(format)}, which is not read.", hint=INSTEAD)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _refuse_others(source: WeightSource) -> None:
    for pattern, format in _NOT_READ.items():
        if found := next(filter(re.compile(pattern).search, source.tensors), None):
            raise refuse(source.name, found, format)
    if any('"_type"' in text and "Tensor" in text for text in source.metadata.values()):
        raise refuse(source.name, "weights", "torchao")


def _described(source: WeightSource) -> dict[str, str]:
    """Return the dtype that ComfyUI's descriptions give, by names of weights. Raises WeightsError."""
    layers: dict[str, Any] = {}
    try:
        if (text := source.metadata.get("_quantization_metadata")) is not None:
            layers.update(parse_json(text)["layers"])
        names = [name for name in source.tensors if _last(name) == "comfy_quant"]
        for name in names:
            if source.tensors[name].dtype != "U8" or source.tensors[name].num_bytes > _JSON_BYTES:
                raise ValueError(f"{cut(name)} is too long")
        for name, tensor in source.iterate(names):
            layers[name.removesuffix(".comfy_quant")] = parse_json(bytes(tensor.flatten().tolist()))
        formats = {layer: str(described["format"]) for layer, described in layers.items()}
    except (ValueError, LookupError, TypeError) as error:
        raise WeightsError(
            f"The {source.name}'s file describes its quantised layers in a way that is not understood: {cut(error)}.",
            hint=INSTEAD,
        ) from error
    found: dict[str, str] = {}
    for layer, format in formats.items():
        if format not in _FORMATS or layers[layer].get("convrot"):
            raise refuse(source.name, layer, format if format not in _FORMATS else f"{format} with convrot")
        found |= {name: _FORMATS[format] for name in _names_of(layer) if name in source.tensors}
    return found


def _names_of(layer: str) -> list[str]:
    """Return the names that a layer's weight may have in a file: with a prefix that the description lacks, or
    without one that it has."""
    shorter = [layer.removeprefix(prefix) for prefix in _PREFIXES]
    return [f"{one}.weight" for one in (layer, *shorter, *(prefix + layer for prefix in _PREFIXES))]


def _stored(source: WeightSource, name: str, info: TensorInfo, described: str | None) -> _Stored | None:
    """Return how a tensor is quantised; None if it is a floating one without a scale, or no weight."""
    layer = name.removesuffix(".weight")
    scales = [f"{layer}.{one}" for one in _SCALES if f"{layer}.{one}" in source.tensors] if layer != name else []
    if described is not None and described != info.dtype:
        raise WeightsError(
            f"The {source.name}'s {cut(name)} is described as {_STORED[described]}, but stored as {cut(info.dtype)}."
        )
    if not scales:
        if info.dtype == "I8" and layer != name:
            raise refuse(source.name, name, "int8 without scales (weight_scale)")
        if info.dtype.startswith(("F8", "F6", "F4")) and info.dtype not in _STORED:
            raise refuse(source.name, name, info.dtype)
        return _Stored(_STORED[info.dtype]) if info.dtype.startswith("F8") else None
    if len(scales) > 1:
        raise WeightsError(f"The {source.name}'s {cut(name)} has two scales: {cut(', '.join(scales))}.")
    scale = source.tensors[scales[0]]
    if info.dtype in ("U8", "F4"):
        raise refuse(source.name, name, "nvfp4 or other packed 4 bits")
    if scale.dtype in ("F8_E8M0", "U8"):
        raise refuse(source.name, name, "mxfp8")
    if info.dtype not in (*_STORED, *_FLOATS) or scale.dtype not in _FLOATS:
        raise refuse(source.name, name, f"{info.dtype} with scales of the kind {scale.dtype}")
    kind = _STORED.get(info.dtype, info.dtype)
    return _Stored(f"{kind}, {_scale_kind(source.name, name, info.shape, scale.shape)}", scales[0])


def _scale_kind(component: str, name: str, shape: tuple[int, ...], scale: tuple[int, ...]) -> str:
    """Return what a scale of this shape is for. Raises WeightsError for a shape that does not fit."""
    if not math.prod(scale):
        raise WeightsError(f"The scale of the {component}'s {cut(name)} is empty.")
    if math.prod(scale) == 1 and len(scale) <= max(1, len(shape)):
        return "a scale a matrix"
    if shape and scale[0] == shape[0] and len(scale) <= len(shape) and math.prod(scale[1:]) == 1:
        return "a scale a row"
    if len(shape) == 2 and len(scale) == 3 and scale[::2] == (shape[0], 1) and scale[1] and shape[1] % scale[1] == 0:
        return f"a scale for {shape[1] // scale[1]} columns"
    raise WeightsError(
        f"The scale of the {component}'s {cut(name)} has the shape {list(scale)}, which does not fit {list(shape)}: "
        "neither one number, nor one for each row, nor one for each group of columns."
    )
