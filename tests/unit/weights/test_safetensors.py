import gc
import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from wanduet.errors import WeightsError
from wanduet.untrusted import MAX_HEADER_BYTES
from wanduet.weights.safetensors import TensorFiles


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}, path)
    return path


def with_header(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        b"not a safetensors file at all",
        struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
        struct.pack("<Q", 2**63),
        with_header(b"{broken"),
        with_header(b"\xff\xfe{}"),
        with_header([]),
        with_header(b"[" * 100_000),
        with_header({"a": 5}, b"1234"),
        with_header({"a": {}}, b"1234"),
        with_header({"a": ENTRY | {"shape": "x"}}, b"1234"),
        with_header({"a": ENTRY | {"shape": None}}, b"1234"),
        with_header({"a": ENTRY | {"data_offsets": []}}, b"1234"),
        with_header({"a": ENTRY | {"data_offsets": [0, "x"]}}, b"1234"),
        with_header({"a": {k: v for k, v in ENTRY.items() if k != "dtype"}}, b"1234"),
        with_header({"a": ENTRY}, b"123"),
        with_header({"a": ENTRY}, b"12345"),
    ],
)
def test_a_damaged_header_is_an_error_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"bad\.safetensors"):
        TensorFiles("transformer", [tmp_path / "bad.safetensors"])


def test_every_truncation_is_noticed(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            TensorFiles("transformer", [path])
    path.write_bytes(whole)
    assert TensorFiles("transformer", [path]).shapes == {"a": (2, 3), "b": (4,)}


def test_tensors_that_do_not_match_are_all_named(path: Path) -> None:
    files = TensorFiles("transformer", [path])
    with pytest.raises(WeightsError) as caught:
        files.load_into({"a": torch.empty(3, 2), "c": torch.empty(1)})
    assert "missing: c" in caught.value.message
    assert "not known: b" in caught.value.message
    assert "of another shape: a" in caught.value.message


def test_loading_keeps_the_targets_dtype(path: Path) -> None:
    a, b = torch.empty(2, 3, dtype=torch.bfloat16), torch.empty(4)
    TensorFiles("transformer", [path]).load_into({"a": a, "b": b})
    assert a.dtype == torch.bfloat16
    assert a.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert b.tolist() == [1] * 4


def test_reading(path: Path) -> None:
    files = TensorFiles("text encoder", [path])
    assert files.read_rows("a", [1, 0, 1], torch.float32).tolist() == [[3, 4, 5], [0, 1, 2], [3, 4, 5]]
    assert files.read(["b"], torch.float16)["b"].dtype == torch.float16
    with pytest.raises(WeightsError, match="text encoder's files lack c"):
        files.read(["b", "c"], torch.float32)
    with pytest.raises(WeightsError, match="lack c"):
        files.read_rows("c", [0], torch.float32)
    with pytest.raises(WeightsError, match="has 2 rows, but row 2"):
        files.read_rows("a", [0, 2], torch.float32)


def test_reading_rows_keeps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.safetensors"
    save_file({"a": torch.zeros(2000, 2)}, path)
    files = TensorFiles("text encoder", [path])

    def read(times: int) -> None:
        for _ in range(times):
            files.read_rows("a", range(1000, 1064), torch.float32)

    read(5)
    tracemalloc.start()
    try:
        read(100)
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 28 * 64 * 100 / 2, "half a number for each row"
    finally:
        tracemalloc.stop()


def test_a_file_that_vanishes_is_an_error(path: Path) -> None:
    files = TensorFiles("vae", [path])
    path.unlink()
    for act in (lambda: files.read(["a"], torch.float32), lambda: files.read_rows("a", [0], torch.float32)):
        with pytest.raises(WeightsError, match=r"model\.safetensors"):
            act()


def test_the_fingerprint_depends_on_header_data_and_name(path: Path, tmp_path: Path) -> None:
    first = TensorFiles("vae", [path]).fingerprint()
    assert TensorFiles("vae", [path]).fingerprint() == first
    other = tmp_path / "other.safetensors"
    other.write_bytes(path.read_bytes())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    renamed = save({"z": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)})
    prints = {first, TensorFiles("vae", [other]).fingerprint(), TensorFiles("vae", [path]).fingerprint()}
    path.write_bytes(renamed)
    assert len(prints | {TensorFiles("vae", [path]).fingerprint()}) == 4
