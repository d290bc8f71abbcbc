"""Files of weights that are made to cost time and memory, or to be taken for another format: a sentence, at once."""

import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.weights.adapters.files import open_adapter
from wanduet.weights.components import open_source, recognise_file
from wanduet.weights.describe import describe_weights
from wanduet.weights.hub import open_model

TRANSFORMER = {
    "scale_shift_table": (1, 2, 64),
    "blocks.0.attn1.to_q.weight": (64, 64),
    "patch_embedding.weight": (64, 16, 1, 2, 2),
    "proj_out.weight": (64, 64),
    "condition_embedder.text_embedder.linear_1.weight": (64, 64),
    "condition_embedder.time_embedder.linear_1.weight": (64, 64),
    "blocks.0.ffn.net.0.proj.weight": (64, 64),
}
VAE = {"decoder.middle.0.residual.0.gamma": (1,), "decoder.upsamples.0.resample.1.weight": (1,)}


def with_header(path: Path, shapes: Mapping[str, tuple[int, ...]], length: int = 0) -> Path:
    """Write zeros in a safetensors file whose header has at least that length."""
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    data = save(state)
    (old,) = struct.unpack("<Q", data[:8])
    header = data[8 : 8 + old].ljust(length)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + old :])
    return path


@pytest.mark.parametrize("length", [640, 1408, 0x5050, ord("{") + 512], ids=hex)
def test_a_header_whose_length_looks_like_another_format(tmp_path: Path, length: int) -> None:
    path = with_header(tmp_path / "a.safetensors", TRANSFORMER, length)
    assert open_source(path).shapes == TRANSFORMER
    assert open_source(path).tensors["proj_out.weight"].file == path


def test_a_name_of_a_million_parts(tmp_path: Path) -> None:
    path = with_header(tmp_path / "a.safetensors", TRANSFORMER | {"a." * 500_000 + "x": (1,)})
    (kind,) = recognise_file(path)
    assert kind.component == "transformer"


@pytest.mark.parametrize("index", ["999999999", "9" * 5000], ids=["large", "longer"])
def test_a_vae_of_a_billion_blocks(tmp_path: Path, index: str) -> None:
    path = with_header(tmp_path / "a.safetensors", VAE | {f"decoder.upsamples.{index}.resample.1.weight": (1,)})
    with pytest.raises(WeightsError, match="not understood"):
        _ = open_model("miniature", files={"vae": path}).spec


def test_a_patch_without_values(tmp_path: Path) -> None:
    path = with_header(tmp_path / "a.safetensors", TRANSFORMER | {"patch_embedding.weight": (64, 16, 0, 2, 2)})
    shown = describe_weights(path)
    assert shown is not None
    assert "five axes" in shown["problem"]


def archive(path: Path, pickled: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive as PyTorch does, with any bytes as the description of its tensors."""
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            file.writestr(f"archive/{name}", data)
    return path


def test_pickles_that_unpack_to_more_than_the_file(tmp_path: Path) -> None:
    none = b"\x80\x02" + b"N0" * 2**20 + b"}."
    assert load_error(archive(tmp_path / "packed.pth", none, zipfile.ZIP_DEFLATED)).count("is packed") == 1
    assert "data.pkl in it has" in load_error(archive(tmp_path / "long.pth", none * 9))
    for tensor, words in (
        (torch.zeros(1).expand(2**40), "repeats its values"),
        (torch.eye(3).to_sparse(), "sparse or without values"),
        (torch.empty(3, device="meta"), "sparse or without values"),
    ):
        torch.save({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": tensor}, tmp_path / "a.pt")
        assert words in load_error(tmp_path / "a.pt")


def load_error(path: Path) -> str:
    """Return what is said of a file, by everything that opens one alike."""
    with pytest.raises(WeightsError) as whole:
        open_source(path)
    with pytest.raises(WeightsError) as adapter:
        _ = open_adapter(path).shapes
    assert whole.value.message == adapter.value.message
    return whole.value.message


@pytest.mark.parametrize("component", ["tokenizer", "text_encoder"])
def test_a_sentencepiece_model_of_gigabytes(tmp_path: Path, component: str) -> None:
    path = tmp_path / "a.model"
    with path.open("wb") as file:
        file.write(b"\n")
        file.truncate(2**35)  # sparse
    with pytest.raises(ModelNotFoundError, match="more than"):
        open_model("miniature", files={component: path})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    os.mkfifo(path)
    for files in ({}, {"vae": path}):
        with pytest.raises(ModelNotFoundError, match="a pipe or a device"):
            open_model(str(path), files=files)


def test_a_file_of_an_unknown_user(tmp_path: Path) -> None:
    for model, files in (("miniature", {"vae": Path("~nobody-of-that-name/a.pth")}), ("~nobody-of-that-name/a", {})):
        with pytest.raises(ModelNotFoundError, match="There is no"):
            open_model(model, files=files)
