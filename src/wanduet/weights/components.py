"""Opens a component's weights from a file of any layout, under the names of a Diffusers checkpoint, with its config."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.untrusted import MAX_HEADER_BYTES, MAX_JSON_BYTES, cut, open_regular, read_file
from wanduet.weights.gguf_file import GGUFSource
from wanduet.weights.json_files import read_json
from wanduet.weights.keymaps import IGNORED, Renamed, pairs_for, renamed
from wanduet.weights.pickles import PickledTensors
from wanduet.weights.quantised import dequantised
from wanduet.weights.recognise import NAMES, TAKE_T2V, Recognised, recognise
from wanduet.weights.safetensors import TensorFiles
from wanduet.weights.source import WeightSource

SENTENCEPIECE = "spiece_model"  # a tokenizer's bytes in ComfyUI's text encoder
_SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.safetensors")
_EXPERT = re.compile(r"(high|low)[-_. ]?noise", re.IGNORECASE)


def open_source(path: Path, label: str = "file") -> WeightSource:
    """Open a file of weights by its first bytes, as dense tensors with the names stored in it: safetensors, the index of
    several, GGUF, or PyTorch's pickles of tensors. `label`: its name in messages.

    Raises WeightsError for a damaged file or a quantisation that is not read, ModelNotFoundError for a missing file, and
    for one of several that belong together.
    """
    shard = _SHARD.fullmatch(path.name)
    if shard is not None and int(shard[2]) > 1:
        index = f"{shard[1]}.safetensors.index.json"
        raise ModelNotFoundError(
            f"{path} is one of the {int(shard[2])} files of a model.",
            hint=f"Give {index}, which is beside them, or the folder if it is a whole model's.",
        )
    try:
        with open_regular(path) as file:
            start = file.read(8)
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error.strerror}.") from error
    if start[:4] == b"GGUF":
        return GGUFSource(label, path)
    # The length of a safetensors header, of which the lowest bytes may be those of any other format.
    is_length = len(start) == 8 and int.from_bytes(start, "little") <= MAX_HEADER_BYTES
    if start[:4] == b"PK\3\4" or (start[:1] == b"\x80" and not is_length):
        return dequantised(PickledTensors(label, path))
    paths = [path]
    if start[:1] == b"{" and not is_length:
        paths = [path.parent / name for name in shards(path)]
        if missing := [one.name for one in paths if not one.is_file()]:
            raise ModelNotFoundError(f"{path.parent} lacks {', '.join(missing)}, which {path.name} names.")
    return dequantised(TensorFiles(label, paths))


def shards(index: Path) -> list[str]:
    """Return the files that an index names. Raises ModelNotFoundError."""
    weights = read_json(index).get("weight_map", {})
    names = {str(name) for name in weights.values()} if isinstance(weights, dict) else {""}
    if any(not name.endswith(".safetensors") or Path(name).name != name for name in names):
        raise ModelNotFoundError(f"{index} is not understood: its weight_map must give each tensor's file.")
    return sorted(names)


def recognise_file(path: Path) -> tuple[Recognised, ...]:
    """Return the models whose tensors a file has. Raises WeightsError, ModelNotFoundError."""
    return recognise(open_source(path).tensors)


def open_component(path: Path, component: str) -> WeightSource:
    """Open one component's tensors in a file, by the names of a Diffusers checkpoint.

    Raises ModelNotFoundError, which says what the file is, if it has no such component or one that does not run;
    WeightsError for a damaged file.
    """
    source = open_source(path, component.replace("_", " "))
    kinds = recognise(source.tensors)
    kind = next((kind for kind in kinds if kind.component == component), None)
    if kind is None:
        what = kinds[0]
        raise ModelNotFoundError(
            f"{path} is not a {NAMES[component]}: it is {what.described}.",
            hint=f"Give it as --{what.component.replace('_', '-')}." if what.problem is None else what.hint,
        )
    if (problem := why_not(path, kind)) is not None:
        raise ModelNotFoundError(f"{path} cannot be used: {problem}.", hint=kind.hint or TAKE_T2V)
    inside = {name.removeprefix(kind.prefix): name for name in source.tensors if name.startswith(kind.prefix)}
    inside = {name: stored for name, stored in inside.items() if not IGNORED.fullmatch(name)}
    pairs = pairs_for(component, kind.layout, inside)
    if not pairs and len(inside) == len(source.tensors) and not kind.prefix:
        return source
    new = renamed(inside, pairs) if pairs else {name: name for name in inside}
    # A tensor that the table lacks keeps its name, and `WeightSource.check` refuses it.
    return Renamed(source, {stored: new.get(name, name) for name, stored in inside.items()}, source.name)


def why_not(path: Path, kind: Recognised) -> str | None:
    """Return why wanduet does not run a model of a file; None if it does.

    Wan2.2 A14B's two transformers have Wan2.1's tensors, so that only the name of a file or its folder shows them.
    """
    half = _EXPERT.search(f"{path.absolute().parent.name}/{path.name}") if kind.component == "transformer" else None
    if kind.problem is None and half:
        return f"it is the {half[1].lower()}-noise half of Wan2.2 A14B, which does not work alone"
    return kind.problem


def read_sentencepiece(path: Path) -> bytes | None:
    """Return the SentencePiece model in a text encoder's file, or a file that is one; None without one.

    Raises WeightsError, ModelNotFoundError.
    """
    try:
        with open_regular(path) as file:
            start = file.read(1)
        if path.suffix == ".model" and start == b"\n":
            return read_file(path)
    except OSError as error:
        raise ModelNotFoundError(f"{path} cannot be read: {error.strerror}.") from error
    source = open_source(path)
    names = [name for name in source.tensors if name.rpartition(".")[2] == SENTENCEPIECE]
    if names and source.tensors[names[0]].num_bytes > MAX_JSON_BYTES:
        raise WeightsError(f"{path} has a SentencePiece model of more than {MAX_JSON_BYTES} bytes.")
    for _, tensor in source.iterate(names[:1]):
        return bytes(tensor.numpy().tobytes())
    return None


def derived_config(component: str, source: WeightSource, known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a component by the shapes of its tensors, in the keys of a Diffusers checkpoint.

    `known`: entries of a config that may belong to it. They decide what shapes do not show, if they fit the shapes.
    """
    shapes = source.shapes
    try:
        return {"transformer": _transformer, "vae": _vae, "text_encoder": _text_encoder}[component](shapes, known)
    except (LookupError, ValueError, TypeError, ZeroDivisionError) as error:
        raise WeightsError(f"The {source.name}'s tensors are not understood: {cut(error)}.") from error


def _count(shapes: Mapping[str, tuple[int, ...]], pattern: str) -> int:
    return max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1) + 1


def _transformer(shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, Any]) -> dict[str, Any]:
    width, channels, *patch = shapes["patch_embedding.weight"]
    heads = known.get("num_attention_heads", known.get("num_heads"))
    head_dim = known.get("attention_head_dim", known["dim"] // heads if heads and "dim" in known else None)
    if not heads or not head_dim or heads * head_dim != width:
        heads, head_dim = width // 128, 128
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0] // math.prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": _count(shapes, r"blocks\.(\d+)\."),
        "patch_size": patch,
    }


def _vae(shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, Any]) -> dict[str, Any]:
    base, levels = shapes["encoder.conv_in.weight"][0], _count(shapes, r"decoder\.up_blocks\.(\d+)\.")
    resnets = _count(shapes, r"decoder\.up_blocks\.0\.resnets\.(\d+)\.")
    widths = [shapes[f"decoder.up_blocks.{i}.resnets.{resnets - 1}.conv2.weight"][0] for i in range(levels)]
    longer = [f"decoder.up_blocks.{i}.upsamplers.0.time_conv.weight" in shapes for i in range(levels - 1)]
    config = {
        "base_dim": base,
        "z_dim": shapes["decoder.conv_in.weight"][1],
        "dim_mult": [width // base for width in reversed(widths)],
        "num_res_blocks": resnets - 1,
        "temperal_downsample": longer[::-1],
    }
    same = all(known.get(name) == value for name, value in config.items())
    return config | ({name: known[name] for name in ("latents_mean", "latents_std") if name in known} if same else {})


def _text_encoder(shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, Any]) -> dict[str, Any]:
    attention, feed_forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
    inner, width = shapes[f"{attention}.q.weight"]
    vocabulary = shapes.get("shared.weight") or shapes["encoder.embed_tokens.weight"]
    return {
        "vocab_size": vocabulary[0],
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": shapes[f"{feed_forward}.wi_0.weight"][0],
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": known.get("relative_attention_max_distance", 128),
    }
