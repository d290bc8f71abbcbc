"""How the allocator is set up, told by what it is told."""

import sys
from types import SimpleNamespace

import pytest
import torch

from wanduet.kernels import device as devices

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


class Owner:
    """Who computes on a device."""


@pytest.fixture
def fraction(monkeypatch) -> dict[str, float]:
    """The allocator's share of a device of 100 bytes."""
    now = {"share": 1.0}
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: now["share"])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: now.update(share=share))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100))
    return now


@pytest.mark.parametrize("theirs", [1.0, 0.75])
def test_a_limit_of_memory_lasts_as_long_as_who_asked_for_it(fraction, theirs) -> None:
    limits, first, second, free = devices.MemoryLimits(), Owner(), Owner(), Owner()
    fraction["share"] = theirs
    limits.register(GPU, first, 20)
    assert fraction["share"] == 0.2
    limits.register(GPU, second, 30)  # both run in one process, which needs both
    assert fraction["share"] == 0.5
    limits.register(GPU, second, 40)  # another device plan of the same engine
    assert fraction["share"] == 0.6
    limits.register(GPU, free, None)  # one engine's limit is no other's
    assert fraction["share"] == theirs
    limits.unregister(free)
    assert fraction["share"] == 0.6
    limits.unregister(first)
    assert fraction["share"] == 0.4
    limits.unregister(second)
    assert fraction["share"] == theirs
    limits.unregister(second)


def test_a_limit_is_never_above_the_program_s_own_and_dies_with_its_owner(fraction) -> None:
    limits, owner = devices.MemoryLimits(), Owner()
    fraction["share"] = 0.5
    limits.register(GPU, owner, 80)
    assert fraction["share"] == 0.5
    del owner
    limits.register(GPU, other := Owner(), 30)
    assert fraction["share"] == 0.3
    limits.unregister(other)
    assert fraction["share"] == 0.5
