"""How the allocator is set up, told by what it is told."""

import sys

import pytest
import torch

from wanduet.ops import devices

GPU = torch.device("cuda", 0)


@pytest.fixture
def told(monkeypatch) -> list[str]:
    settings: list[str] = []
    monkeypatch.setattr(devices, "_set_allocator", settings.append)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    devices.prepare_allocator.cache_clear()
    yield settings
    devices.prepare_allocator.cache_clear()


def allocating(monkeypatch, error: Exception | None) -> None:
    def empty(*_: object, **__: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch, "empty", empty)


def test_blocks_may_grow(monkeypatch, told) -> None:
    allocating(monkeypatch, None)
    devices.prepare_allocator(GPU)
    devices.prepare_allocator(GPU)
    assert told == ["expandable_segments:True"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("operation not supported"), ["expandable_segments:True", "expandable_segments:False"]),
        (torch.OutOfMemoryError("full"), ["expandable_segments:True"]),
    ],
)
def test_a_driver_that_cannot_is_taken_as_it_is(monkeypatch, told, error, expected) -> None:
    allocating(monkeypatch, error)
    devices.prepare_allocator(GPU)
    assert told == expected


def test_what_somebody_chose_stays(monkeypatch, told) -> None:
    allocating(monkeypatch, None)
    devices.prepare_allocator(torch.device("cpu"))
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    devices.prepare_allocator(GPU)
    devices.prepare_allocator.cache_clear()
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(sys, "platform", "win32")
    devices.prepare_allocator(GPU)
    assert told == []
