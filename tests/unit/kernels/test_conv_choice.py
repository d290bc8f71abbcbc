"""Which tile convolutions take on a GPU without wgmma; kernels run in Triton's interpreter."""

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from wanduet.kernels import measurements
from wanduet.kernels.measurements import Timing
from wanduet.kernels.vae import choose as conv_choice
from wanduet.kernels.vae import conv_tiles
from wanduet.kernels.vae.choose import CHOICES_FILE, choose_tiles, measure
from wanduet.kernels.vae.conv_tiles import chosen_tile
from wanduet.kernels.vae.plain import Epilogue, Filter

pytest.importorskip("triton")

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SMALL_CARD, HOPPER, TURING = 99 * 1024, 227 * 1024, 64 * 1024  # bytes of shared memory
SMALL = "64x(64+32)"


@pytest.fixture(autouse=True)
def new_process() -> Iterator[None]:
    conv_choice.CHOSEN.clear()
    yield
    conv_choice.CHOSEN.clear()


@pytest.fixture(autouse=True)
def convolutions(interpreted) -> ModuleType:
    return interpreted("wanduet.kernels.vae.conv")


@pytest.fixture
def products_in_order(convolutions, monkeypatch) -> None:
    """The interpreter's matrix products add up one factor after another, as GPUs do in their units' steps; NumPy's order
    depends on the matrices' sides."""
    from triton.runtime import interpreter

    def create_dot(self, a, b, d, *options):
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k, None].astype(np.float32) * b.data[None, k].astype(np.float32)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_smaller_tiles_are_offered_where_two_of_them_fit(convolutions, itemsize) -> None:
    def names(width: int, limit: int) -> list[str]:
        offered = convolutions.offered_tiles(width, width, itemsize, limit)
        today = conv_tiles.tiles_for(width, width, itemsize, limit)
        assert offered[: len(today)] == today
        return [tile.name for tile in offered[len(today) :]]

    assert names(384, SMALL_CARD) == [SMALL, "64x(128+0)"]
    assert names(192, SMALL_CARD) == names(96, SMALL_CARD) == [SMALL]
    for other in (HOPPER, TURING) if itemsize == 4 else (HOPPER,):
        assert names(384, other) == names(192, other) == names(96, other) == []
    assert len(convolutions.offered_tiles(96, 3, itemsize, SMALL_CARD)) == 1


@pytest.mark.parametrize(("outputs", "dtype"), [(96, torch.float32), (192, torch.bfloat16), (384, torch.float32)])
def test_every_tile_gives_the_same_to_the_last_bit(convolutions, products_in_order, outputs, dtype) -> None:
    """It adds up the same taps and channels in the same order. (That of a norm's squares is the compiler's.)"""
    torch.manual_seed(0)
    x, weight, out = torch.randn(1, 40, 1, 2, 5), torch.randn(outputs, 40, 1, 3, 3), torch.empty(1, outputs, 1, 2, 5)
    x, weight, out = (one.to(dtype, memory_format=torch.channels_last_3d) for one in (x, weight, out))
    tiles = convolutions.offered_tiles(40, outputs, dtype.itemsize, SMALL_CARD)
    results = [torch.empty_like(out) for _ in tiles]
    for tile, result in zip(tiles, results, strict=True):
        convolutions.convolve(x, None, Filter(weight, torch.zeros(outputs), (1, 1)), Epilogue(result), tile)
    assert len({tile.name for tile in tiles}) > 1
    assert all(torch.equal(result, results[0]) for result in results)


def test_tiles_that_fail_or_give_something_else_are_dropped(convolutions, monkeypatch) -> None:
    first, small = convolutions.offered_tiles(96, 96, 4, SMALL_CARD)
    wrong, wrong_norm, broken = (replace(small, pixels=pixels) for pixels in (16, 32, 8))
    short, times = replace(small, pixels=4), {first.name: 2.0, small.name: 1.0}
    parameters = inspect.signature(convolutions.convolve)

    def convolve(*args) -> None:
        given = parameters.bind(*args).arguments
        tile, filter, epilogue = given["tile"], given["filter"], given["epilogue"]
        residual, gamma = epilogue.residual, epilogue.gamma
        assert (residual is None) != (gamma is None)
        if tile is broken:
            raise RuntimeError("no such tile")
        if tile is short:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        off = 1.001 if tile is wrong or (tile is wrong_norm and gamma is not None) else 1.0
        epilogue.out.copy_(off * F.conv3d(given["x"][:, :8], filter.weight[:, :8, -1:], filter.bias, padding=(0, 1, 1)))

    monkeypatch.setattr(convolutions, "convolve", convolve)
    monkeypatch.setattr(conv_choice, "milliseconds", lambda run, device: [times[run.args[0].name]])
    rows = measure((first, wrong, wrong_norm, broken, small, short), 96, torch.float32, CPU)
    table = {row.name: row for row in rows}
    assert {name: row.milliseconds for name, row in table.items() if row.usable} == times
    for tile in (wrong, wrong_norm):
        assert "not those of the first" in (table[tile.name].problem or "")
    assert table[broken.name].problem == "RuntimeError"
    assert table[short.name].free_bytes is not None  # it is tried again when more is free


@pytest.fixture
def measured(monkeypatch) -> list[tuple[str, ...]]:
    """A card that is measured, as its names of tiles: the last one offered is the fastest."""
    seen: list[tuple[str, ...]] = []

    def measure(tiles, width, dtype, device):
        seen.append(tuple(tile.name for tile in tiles))
        return tuple(Timing(tile.name, 9.0 - number, None) for number, tile in enumerate(tiles))

    monkeypatch.setattr(conv_choice, "measure", measure)
    monkeypatch.setattr(conv_choice, "shared_memory", lambda device: SMALL_CARD)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some Card")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return seen


def test_the_fastest_is_chosen_once_and_remembered(measured, tmp_path: Path, monkeypatch) -> None:
    def choose(may_measure: bool = True) -> list[str | None]:
        choose_tiles(CUDA, torch.float32, (384, 96, 8), tmp_path, may_measure=may_measure)
        return [chosen_tile(CUDA, width, torch.float32) for width in (96, 192, 384)]

    assert choose(may_measure=False) == [None, None, None]
    assert choose() == choose() == [SMALL, None, "64x(128+0)"]
    assert measured == [("128x(64+32)", SMALL), ("128x(128+64)", SMALL, "64x(128+0)")]
    assert chosen_tile(CUDA, 96, torch.bfloat16) is None
    measured.clear()
    conv_choice.CHOSEN.clear()  # the next process
    assert choose(may_measure=False) == [SMALL, None, "64x(128+0)"]
    for change in (
        lambda: monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Another Card"),
        lambda: monkeypatch.setattr(measurements, "machine_state", lambda: "another driver"),
        lambda: (tmp_path / CHOICES_FILE).write_text('{"damaged": '),
    ):
        change()
        conv_choice.CHOSEN.clear()
        assert choose() == [SMALL, None, "64x(128+0)"]
        assert len(measured) == 2
        measured.clear()


def test_precisions_are_measured_apart(measured, tmp_path: Path) -> None:
    for tf32 in (True, False):
        choose_tiles(CUDA, torch.float32, (96,), tmp_path, tf32)
    assert len(measured) == 2


@pytest.mark.parametrize("where", ["a CPU", "Hopper", "the interpreter"])
def test_nothing_is_measured_where_nothing_is_to_be_chosen(measured, tmp_path: Path, monkeypatch, where: str) -> None:
    if where == "Hopper":
        monkeypatch.setattr(conv_choice, "shared_memory", lambda device: HOPPER)
    if where == "the interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    device = CPU if where == "a CPU" else CUDA
    choose_tiles(device, torch.float32, (384, 192, 96), tmp_path)
    assert measured == []
    assert chosen_tile(device, 96, torch.float32) is None
    assert not (tmp_path / CHOICES_FILE).exists()


@pytest.mark.parametrize("has_norm", [False, True])
def test_a_choice_is_what_is_compiled_and_launched(convolutions, measured, tmp_path, monkeypatch, has_norm) -> None:
    """But for a norm of 192 channels, for which a tile must have all of them."""
    launched: list[str] = []

    def launch(*args, PIXELS, FIRST, SECOND, **options):
        launched.append(f"{PIXELS}x({FIRST}+{SECOND})")

    monkeypatch.setattr(convolutions, "launch", launch)
    monkeypatch.setattr(convolutions, "shared_memory", lambda device: SMALL_CARD)

    def convolve(compile_for: torch.device | None) -> list[str]:
        launched.clear()
        for width in (96, 192):
            x, weight = torch.empty(1, width, 1, 8, 8), torch.empty(width, width, 1, 3, 3)
            x, weight = (one.to(memory_format=torch.channels_last_3d) for one in (x, weight))
            gamma = torch.empty(width, 1, 1, 1) if has_norm else None
            out = torch.empty_like(x)
            filter = Filter(weight, x[0, :, 0, 0, 0], (1, 1))
            convolutions.convolve(x, None, filter, Epilogue(out, None, gamma), compile_for=compile_for)
        return list(launched)

    all_of_them = ["128x(64+32)", SMALL, "128x(128+64)", *([] if has_norm else [SMALL])]
    assert convolve(CUDA) == all_of_them
    assert convolve(None) == ["128x(64+32)", "128x(128+64)"]
    choose_tiles(CUDA, torch.float32, (96, 192), tmp_path)
    chosen = [SMALL, "128x(128+64)" if has_norm else SMALL]
    assert convolve(CUDA) == chosen
    monkeypatch.setattr(convolutions, "chosen_tile", lambda device, *key: chosen_tile(CUDA, *key))
    assert convolve(None) == chosen
