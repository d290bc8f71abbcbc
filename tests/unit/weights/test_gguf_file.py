"""GGUF files give the numbers of their blocks, under transformers' names for UMT5; others are refused by name."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from wanduet.errors import WeightsError
from wanduet.weights import gguf_file
from wanduet.weights.gguf_file import GGUFSource
from wanduet.weights.hub import open_model

MATRIX = "blocks.0.self_attn.q.weight"
PATCH = "patch_embedding.weight"
PREFIX = "model.diffusion_model."


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def write(
    path: Path, tensors: dict[str, tuple[np.ndarray, Type]], architecture: str | None = "wan", **texts: list[str]
) -> Path:
    """Write a file. A tensor is an array of bytes whose rows are whole blocks, or of numbers."""
    writer = gguf.GGUFWriter(path, architecture or "none")
    if architecture is None:
        writer.kv_data[0].pop("general.architecture")
    for name, value in texts.items():
        writer.add_array(f"tokenizer.ggml.{name}", value)
    for name, (data, type) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def with_five_dimensions(path: Path) -> Path:
    """Write a file by hand with a tensor of five dimensions, which the package's writer cannot."""
    text = b"GGUF" + struct.pack("<IQQ", 3, 2, 1)
    for one in (b"general.architecture",):
        text += struct.pack("<Q", len(one)) + one + struct.pack("<IQ", 8, 3) + b"wan"
    patch, matrix = normal(2, 3, 1, 2, 2), normal(2, 4, seed=1)
    for name, data, offset in ((PATCH, patch, 0), (MATRIX, matrix, 96)):
        text += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", data.ndim)
        text += struct.pack(f"<{data.ndim}Q", *data.shape[::-1]) + struct.pack("<IQ", 0, offset)
    text += bytes(-len(text) % 32)
    path.write_bytes(text + patch.tobytes() + matrix.tobytes())
    return path


def wan(**tensors: tuple[np.ndarray, Type]) -> dict[str, tuple[np.ndarray, Type]]:
    return {MATRIX: (normal(4, 256), Type.F32), PATCH: (normal(4, 16, 2, 2), Type.F32), **tensors}


def read(source: GGUFSource) -> dict[str, torch.Tensor]:
    found = {name: tensor.clone() for name, tensor in source.iterate(list(source.tensors))}
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == source.shapes
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    assert {name: names[tensor.dtype] for name, tensor in found.items()} == {
        n: i.dtype for n, i in source.tensors.items()
    }
    return found


@pytest.mark.parametrize("name", gguf_file._DENSE + gguf_file._BLOCKS)
def test_every_type_in_chunks_is_the_packages_whole(tmp_path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Random blocks; their numbers of 16 bits are finite."""
    type = Type[name]
    values, size = gguf.GGML_QUANT_SIZES[type]
    columns = max(values, 32) * 3
    data = np.random.default_rng(0).integers(0, 60, (5, columns // values * size), np.uint8)
    typed = data.view({"F32": np.float32, "F16": np.float16}.get(name, np.uint8))
    path = write(tmp_path / "a.gguf", wan(a=(typed, type)))
    monkeypatch.setattr(gguf_file, "CHUNK_ELEMENTS", 2 * values + 1)
    source = GGUFSource("transformer", path)
    expected = torch.from_numpy(gguf.dequantize(data, type).copy())
    assert source.shapes["a"] == tuple(expected.shape) == (5, columns)
    assert torch.equal(read(source)["a"].float(), expected)
    assert torch.equal(source.read_rows("a", [3, 0, 3], torch.float32), expected[[3, 0, 3]])
    with pytest.raises(WeightsError, match="5 rows"):
        source.read_rows("a", [5], torch.float32)
    assert name in (source.quantisation or "") or name in ("F32", "F16")


@pytest.mark.parametrize("type", [Type.Q8_0, Type.Q4_0, Type.Q5_1])
def test_what_the_package_quantised(tmp_path: Path, type: Type) -> None:
    matrix = normal(8, 128)
    path = write(tmp_path / "a.gguf", wan(a=(gguf.quantize(matrix, type), type)))
    got = read(GGUFSource("transformer", path))["a"].numpy()
    assert np.abs(got - matrix).max() < {Type.Q8_0: 0.02, Type.Q5_1: 0.15, Type.Q4_0: 0.35}[type]


def test_q4_k_and_q6_k_from_bytes_whose_values_are_known(tmp_path: Path) -> None:
    """Q4_K: d * scale * q - dmin * min, with 8 scales of 32 values; Q6_K: d * scale * (q - 32), with 16 of 16."""
    scales, mins = [1, 2, 3, 4], [5, 6, 7, 8]  # of the first four; the last four have 4 bits at the end: 1 and 2
    q4 = struct.pack("<ee", 0.5, 0.25) + bytes(scales + mins + [0x21] * 4) + bytes([0x73] * 128)
    first = [0.5 * s * q - 0.25 * m for s, m, q in zip(scales, mins, [3, 7, 3, 7], strict=True)]
    last = [0.5 * 1 * q - 0.25 * 2 for q in (3, 7, 3, 7)]
    q6 = bytes([0x51] * 128) + bytes([0b11_10_01_00] * 64) + struct.pack("<16b", *range(-8, 8)) + struct.pack("<e", 0.5)
    # Of 128 values, each 32 take: low 4 bits and bits 0-1, low and 2-3, high and 4-5, high and 6-7.
    numbers = [1 + 16 * 0, 1 + 16 * 1, 5 + 16 * 2, 5 + 16 * 3] * 2
    expected = [0.5 * (part - 8) * (numbers[part // 2] - 32) for part in range(16)]
    tensors = wan(a=(np.frombuffer(q4, np.uint8)[None], Type.Q4_K), b=(np.frombuffer(q6, np.uint8)[None], Type.Q6_K))
    source = GGUFSource("transformer", write(tmp_path / "a.gguf", tensors))
    got = read(source)
    assert got["a"].view(8, 32).eq(torch.tensor(first + last)[:, None]).all()
    assert got["b"].view(16, 16).eq(torch.tensor(expected)[:, None]).all()
    assert source.quantisation == "GGUF (Q4_K, Q6_K)"


def test_five_dimensions(tmp_path: Path) -> None:
    source = GGUFSource("transformer", with_five_dimensions(tmp_path / "a.gguf"))
    got = read(source)
    assert torch.equal(got[PATCH], torch.from_numpy(normal(2, 3, 1, 2, 2)))
    assert torch.equal(got[MATRIX], torch.from_numpy(normal(2, 4, seed=1)))


def test_a_shape_that_was_flattened_is_as_it_was(tmp_path: Path) -> None:
    data = normal(4, 16, 1, 2, 2)
    tensors = {MATRIX: (normal(4, 256), Type.F32), PATCH: (data.reshape(4, 64), Type.F32)}
    writer_path = write(tmp_path / "a.gguf", tensors)
    writer = gguf.GGUFWriter(writer_path, "wan")
    writer.add_array(f"comfy.gguf.orig_shape.{PATCH}", list(data.shape))
    for name, (array, _) in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert torch.equal(read(GGUFSource("transformer", writer_path))[PATCH], torch.from_numpy(data))


@pytest.mark.parametrize("architecture", ["wan", "pig", "cow", None])
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_the_architecture_may_be_missing(tmp_path: Path, architecture: str | None, prefix: str) -> None:
    tensors = {prefix + name: tensor for name, tensor in wan().items()}
    assert GGUFSource("transformer", write(tmp_path / "a.gguf", tensors, architecture)).tensors.keys() == tensors.keys()


@pytest.mark.parametrize("architecture", ["flux", "llama", "sd3"])
def test_another_model_is_refused_by_name(tmp_path: Path, architecture: str) -> None:
    path = write(tmp_path / "a.gguf", wan(), architecture)
    with pytest.raises(WeightsError, match=architecture):
        GGUFSource("transformer", path)


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"double_blocks.0.img_attn.qkv.weight": (normal(4, 32), Type.F32)}, "pig")
    with pytest.raises(WeightsError, match=r"double_blocks\.0"):
        GGUFSource("transformer", path)


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_transformer_without_its_first_layer_is_refused(tmp_path: Path, prefix: str) -> None:
    path = write(tmp_path / "a.gguf", {prefix + MATRIX: (normal(4, 256), Type.F32)})
    with pytest.raises(WeightsError, match=r"lacks patch_embedding\.weight"):
        GGUFSource("transformer", path)


def umt5(blocks: int = 2) -> dict[str, tuple[np.ndarray, Type]]:
    tensors = {"token_embd.weight": (gguf.quantize(normal(9, 32), Type.Q8_0), Type.Q8_0)}
    for index in range(blocks):
        for number, part in enumerate(gguf_file._UMT5_BLOCK):
            tensors[f"enc.blk.{index}.{part}.weight"] = (normal(2, 32, seed=number), Type.F32)
    tensors["enc.output_norm.weight"] = (normal(32), Type.F32)
    return tensors


@pytest.mark.parametrize("architecture", ["t5", "t5encoder", None])
def test_umt5_has_the_names_of_transformers(tmp_path: Path, architecture: str | None) -> None:
    path = write(
        tmp_path / "a.gguf",
        umt5() | {"dec.blk.0.attn_q.weight": (normal(2, 32), Type.F32), "output.weight": (normal(9, 32), Type.F32)},
        architecture,
        tokens=[f"piece {i}" for i in range(300)],
    )
    source = GGUFSource("text encoder", path)
    names = open_model("miniature").text_encoder.tensors
    assert source.tensors.keys() == {n for n in names if ".block." not in n or n.split(".")[2] in ("0", "1")}
    got = read(source)
    for number, part in enumerate(("q", "k", "v", "o")):
        assert torch.equal(
            got[f"encoder.block.1.layer.0.SelfAttention.{part}.weight"], torch.from_numpy(normal(2, 32, seed=number))
        )
    rows = source.read_rows("shared.weight", [8, 1], torch.bfloat16)
    assert torch.equal(rows, got["shared.weight"][[8, 1]].bfloat16())


def test_t5_is_refused_as_it_has_one_bias_of_positions(tmp_path: Path) -> None:
    tensors = umt5()
    del tensors["enc.blk.1.attn_rel_b.weight"]
    with pytest.raises(WeightsError, match=r"enc\.blk\.1\.attn_rel_b") as refused:
        GGUFSource("text encoder", write(tmp_path / "a.gguf", tensors, "t5"))
    assert "UMT5" in (refused.value.hint or "")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = with_five_dimensions(tmp_path / "a.gguf")
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 3), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"a\.gguf"):
            GGUFSource("transformer", path)


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", wan(a=(gguf.quantize(normal(4, 64), Type.Q8_0), Type.Q8_0)))
    source = GGUFSource("transformer", path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(WeightsError, match=r"a\.gguf"):
        read(source)


def start(*parts: bytes, tensors: int = 0, entries: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(type: int, *shape: int, offset: int = 0) -> bytes:
    return (
        text(b"a")
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", type, offset)
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cut off"),
        (b"PK" * 20, "begin with GGUF"),
        (start(version=3 << 24), "cut off|big-endian|not known"),
        (start(version=1 << 16), "big-endian"),
        (start(version=9), "version 9"),
        (start(tensors=2**20), "1048576 tensors"),
        (start(entries=2**63), f"{2**63} other entries"),
        (start(struct.pack("<Q", 2**63), entries=1), "too long"),
        (start(text(b"a"), struct.pack("<I", 99), entries=1), "kind 99"),
        (start(text(b"a"), struct.pack("<IIQ", 9, 9, 2**60), entries=1), "list of the kind 9"),
        (start(text(b"a"), struct.pack("<IIQ", 9, 4, 2**60), entries=1), "too long"),
        (start(text(b"a"), struct.pack("<IIQ", 9, 8, 2**60), entries=1), "cut off"),
        (start(tensor(77, 32), tensors=1), "type 77"),
        (start(tensor(15, 256), tensors=1), "Q8_K"),
        (start(tensor(8, 33), tensors=1), "Q8_0 cannot have"),
        (start(tensor(0, 2**62, 2**62), tensors=1), "cannot have"),
        (start(tensor(0, *[1] * 9), tensors=1), "9 dimensions"),
        (start(tensor(0, 32), tensor(0, 32), tensors=2), "twice"),
        (start(tensor(0, 32, offset=2**63), tensors=1), "cut off"),
        (start(text(b"general.alignment"), struct.pack("<II", 4, 0), entries=1), "alignment"),
    ],
)
def test_a_damaged_header_is_an_error_that_names_the_file(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(WeightsError, match=words) as refused:
        GGUFSource("transformer", tmp_path / "bad.gguf")
    assert "bad.gguf" in refused.value.message


def test_a_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.gguf"):
        GGUFSource("transformer", tmp_path / "none.gguf")


def test_the_fingerprint_is_of_the_header_and_the_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", wan())
    first = GGUFSource("transformer", path).fingerprint()
    assert first == GGUFSource("transformer", path).fingerprint()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert GGUFSource("transformer", path).fingerprint() != first
