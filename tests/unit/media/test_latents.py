import pytest
import safetensors.torch
import torch

from wanduet.errors import OutputError
from wanduet.media.files import UnreadableFileError
from wanduet.media.latents import load_latents, save_latents

METADATA = {"schema": 1, "request": {"prompt": "a cat 猫"}, "seed": 3}


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(16, 3, 8, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_is_exact(tmp_path, latents, dtype) -> None:
    path = tmp_path / "new" / "a.mp4.latents.safetensors"
    save_latents(path, latents.to(dtype), METADATA)
    got, metadata = load_latents(path)
    assert got.dtype == dtype
    assert torch.equal(got, latents.to(dtype))
    assert metadata == METADATA
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_any_strides_and_a_gradient_are_fine(tmp_path, latents) -> None:
    view = latents.transpose(2, 3).requires_grad_()
    save_latents(tmp_path / "a.safetensors", view, METADATA)
    assert torch.equal(load_latents(tmp_path / "a.safetensors")[0], view)


def test_same_latents_same_bytes(tmp_path, latents) -> None:
    save_latents(tmp_path / "a.safetensors", latents, METADATA)
    save_latents(tmp_path / "b.safetensors", latents.clone(), METADATA)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(1, 16, 3, 8, 8), torch.zeros(3, 8, 8), torch.zeros(16, 0, 8, 8), torch.zeros(16, 3, 8, 8).long()],
)
def test_wrong_latents_are_not_saved(tmp_path, bad) -> None:
    with pytest.raises(ValueError, match="Latents must be"):
        save_latents(tmp_path / "a.safetensors", bad, METADATA)
    assert list(tmp_path.iterdir()) == []


def test_every_damaged_byte_is_noticed(tmp_path, latents) -> None:
    """Each byte of the header's frame and a sample of all others, flipped; and every kind of truncation."""
    path = tmp_path / "a.safetensors"
    save_latents(path, latents, METADATA)
    good = path.read_bytes()
    positions = [*range(8), *range(8, 300), *range(300, len(good), 97), len(good) - 1]
    undetected = []
    for position in positions:
        path.write_bytes(good[:position] + bytes([good[position] ^ 0x10]) + good[position + 1 :])
        try:
            load_latents(path)
        except UnreadableFileError:
            continue
        undetected.append(position)
    assert undetected == []
    for length in [*range(0, 400, 7), len(good) // 2, len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(UnreadableFileError):
            load_latents(path)
    path.write_bytes(good + b"x")
    with pytest.raises(UnreadableFileError):
        load_latents(path)
    path.write_bytes(good)
    assert torch.equal(load_latents(path)[0], latents)


def test_foreign_files_are_refused(tmp_path, latents) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"weight": latents}, path)
    with pytest.raises(UnreadableFileError, match="holds weight, not latents"):
        load_latents(path)
    safetensors.torch.save_file({"weight": latents}, path, {"wanduet": "{}"})
    with pytest.raises(UnreadableFileError, match="holds weight, not latents"):
        load_latents(path)
    safetensors.torch.save_file({"latents": latents[0].contiguous()}, path, {"wanduet": "{}"})
    with pytest.raises(UnreadableFileError, match=r"must be \[C, T, h, w\]"):
        load_latents(path)
    safetensors.torch.save_file({"latents": latents}, path, {"wanduet": "{}"})
    with pytest.raises(UnreadableFileError, match="does not have the hash"):
        load_latents(path)
    with pytest.raises(UnreadableFileError, match="No such file"):
        load_latents(tmp_path / "missing.safetensors")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poisoned_latents_are_refused(tmp_path, latents, poison) -> None:
    latents[3, 1, 2, 2] = poison
    save_latents(tmp_path / "a.safetensors", latents, METADATA)
    with pytest.raises(UnreadableFileError, match="NaN or infinity"):
        load_latents(tmp_path / "a.safetensors")


def test_unwritable_place_is_an_output_error(tmp_path, latents) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputError, match="not a folder"):
        save_latents(tmp_path / "x" / "a.safetensors", latents, METADATA)
