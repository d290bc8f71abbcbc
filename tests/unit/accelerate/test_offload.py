import copy
import gc
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.packed import pack_blocks
from wanduet.accelerate import host_memory
from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.offload import BlockStream, allocate_streamed, stream_blocks, streamed_indices
from wanduet.accelerate.packing import packed_buffer
from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.dit.model import WanTransformer

SPEC = replace(
    WAN_1_3B.transformer,
    num_attention_heads=2,
    attention_head_dim=24,
    ffn_dim=96,
    num_layers=5,
    text_dim=32,
    freq_dim=32,
)
CPU = torch.device("cpu")


@pytest.fixture
def model() -> WanTransformer:
    torch.manual_seed(0)
    model = WanTransformer(SPEC).eval().requires_grad_(False)
    pack_blocks(model)
    return model


@torch.no_grad()
def output(model: WanTransformer, seed: int = 1) -> torch.Tensor:
    torch.manual_seed(seed)
    return model(torch.randn(1, 16, 3, 6, 8), torch.tensor([400]), torch.randn(1, 9, 32))


class Copies(list):
    """Which blocks were copied to a buffer, in order."""

    def __init__(self, stream: BlockStream) -> None:
        super().__init__()
        fill = stream._copy
        of = {block.flat.data_ptr(): index for index, block in stream._offloaded.items()}

        def copy_and_note(buffer, source) -> None:
            self.append(of[source.data_ptr()])
            fill(buffer, source)

        stream._copy = copy_and_note


@pytest.mark.parametrize("num_resident", range(6))
@pytest.mark.parametrize("num_buffers", [1, 2, 3])
def test_bit_equal_to_resident_over_several_passes(model, num_resident: int, num_buffers: int) -> None:
    expected = [output(model, seed) for seed in range(3)]
    stream = stream_blocks(model, CPU, num_resident, num_buffers=num_buffers)
    assert all(torch.equal(output(model, seed), expected[seed]) for seed in range(3))
    stream.close()
    assert torch.equal(output(model, 0), expected[0])


def test_weights_are_read_from_the_buffers(model) -> None:
    """Guards the test above: a stream that yielded the host's weights would also give the right result."""
    stream = stream_blocks(model, CPU, 2)
    host = {w.flat.data_ptr() for w in stream._offloaded.values()}
    buffers = {b.flat.data_ptr() for b in stream._idle}
    for index, block in enumerate(model.fetch_blocks()):
        where = packed_buffer(block).data_ptr()
        assert where in buffers if index in stream._offloaded else where not in host | buffers
    assert len(buffers) == 2


def test_each_block_is_copied_once_a_pass_and_ahead_of_its_use(model) -> None:
    stream = stream_blocks(model, CPU, 0)
    copies = Copies(stream)
    output(model)  # two passes: text, then blocks
    assert copies == [0, 1, 2, 3, 4] * 2 + [0, 1]
    for used, _ in enumerate(model.fetch_blocks()):
        assert copies[10:] == [(i % 5) for i in range(2 + used)]


def test_few_enough_streamed_blocks_stay_in_their_buffers(model) -> None:
    stream = stream_blocks(model, CPU, 3)
    copies = Copies(stream)
    output(model)
    assert sorted(copies) == list(stream._order)


def test_state_dict_is_whole_before_between_and_after(model) -> None:
    before = copy.deepcopy(model.state_dict())

    def same() -> bool:
        now = model.state_dict()
        return list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in before)

    stream = stream_blocks(model, CPU, 1)
    assert same()
    output(model)
    assert same()
    stream.close()
    assert same()


@pytest.mark.parametrize("broken_at", [0, 2, 4])
def test_a_pass_that_is_broken_off_harms_no_later_one(model, broken_at: int) -> None:
    expected = output(model)
    stream_blocks(model, CPU, 1)
    kept = []  # as a traceback would keep the generator alive
    for _ in range(2):
        blocks = model.fetch_blocks()
        for index, _ in enumerate(blocks):
            if index == broken_at:
                break
        kept.append(blocks)
        assert torch.equal(output(model), expected)
    kept.clear()
    gc.collect()
    assert torch.equal(output(model), expected)


def test_the_number_of_resident_blocks_can_be_changed(model) -> None:
    expected = output(model)
    first = stream_blocks(model, CPU, 4)
    second = stream_blocks(model, CPU, 1)
    assert second.memory is first.memory
    assert torch.equal(output(model), expected)
    second.close()
    assert not isinstance(model.fetch_blocks, BlockStream)
    assert torch.equal(output(model), expected)


def test_allocated_for_streaming_and_filled_by_a_loader(model) -> None:
    with torch.device("meta"):
        fresh = WanTransformer(SPEC).eval().requires_grad_(False)
    memory = HostMemory("plain")
    allocate_streamed(fresh, CPU, torch.float32, 2, memory)
    for name, parameter in fresh.named_parameters():
        parameter.data.copy_(model.get_parameter(name).data)
    where = [packed_buffer(block).data_ptr() for block in fresh.blocks]
    stream = stream_blocks(fresh, CPU, 2, memory)
    assert [packed_buffer(block).data_ptr() for block in fresh.blocks] == where, "nothing had to move"
    assert torch.equal(output(fresh), output(model))
    stream.close()


def test_memory_mapped_blocks(model, tmp_path: Path) -> None:
    expected = output(model)
    with torch.device("meta"):
        fresh = WanTransformer(SPEC).eval().requires_grad_(False)
    memory = HostMemory("mapped", tmp_path / "scratch")
    allocate_streamed(fresh, CPU, torch.float32, 0, memory)
    for name, parameter in fresh.named_parameters():
        parameter.data.copy_(model.get_parameter(name).data)
    stream_blocks(fresh, CPU, 0, memory)
    assert torch.equal(output(fresh), expected)
    assert not list((tmp_path / "scratch").iterdir()), "the scratch files have no name"


def test_mapped_memory_where_an_open_file_can_neither_be_opened_again_nor_removed(tmp_path, monkeypatch) -> None:
    """Windows' rules: torch may map what nobody else has open, and it cannot be removed until it is unmapped."""
    mapped: set[str] = set()
    from_file, unlink = torch.from_file, os.unlink

    def map_alone(name: str, **keywords) -> torch.Tensor:
        handles = Path("/proc/self/fd")
        if handles.exists() and any(os.path.realpath(handle) == name for handle in handles.iterdir()):
            raise RuntimeError(f"could not open file <{name}> in read-write mode; error code: <32>")
        mapped.add(name)
        return from_file(name, **keywords)

    def remove_unmapped(path, **keywords) -> None:
        if os.fspath(path) in mapped:
            raise PermissionError(13, "The process cannot access the file", os.fspath(path))
        unlink(path, **keywords)

    monkeypatch.setattr(torch, "from_file", map_alone)
    monkeypatch.setattr(os, "unlink", remove_unmapped)
    memory = HostMemory("mapped", tmp_path)
    first, second = (memory.allocate(10, torch.float32) for _ in range(2))
    assert (first.fill_(1).sum(), second.fill_(2).sum()) == (10, 20)
    assert len(list(tmp_path.iterdir())) == 2
    mapped.remove(min(mapped))  # one is not used any more
    memory.close()
    assert [str(path) for path in tmp_path.iterdir()] == [*mapped]
    mapped.clear()  # the process has ended
    HostMemory("pinned", tmp_path)  # another one, which may keep its blocks elsewhere
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_file_that_cannot_be_mapped_is_removed(tmp_path, monkeypatch) -> None:
    def refuse(name: str, **_) -> torch.Tensor:
        raise RuntimeError("no address space")

    monkeypatch.setattr(torch, "from_file", refuse)
    with pytest.raises(RuntimeError, match="address space"):
        HostMemory("mapped", tmp_path).allocate(10, torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_streamed_blocks_are_spread_evenly() -> None:
    assert streamed_indices(30, 30) == ()
    assert streamed_indices(30, 0) == tuple(range(30))
    assert streamed_indices(30, 20) == (2, 5, 8, 11, 14, 17, 20, 23, 26, 29)
    for resident in range(31):
        indices = streamed_indices(30, resident)
        assert len(set(indices)) == len(indices) == 30 - resident
        if indices:
            gaps = [(b - a) % 30 or 30 for a, b in zip(indices, (*indices[1:], indices[0]), strict=True)]
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("count", [-1, 31])
def test_impossible_numbers_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_resident={count}"):
        streamed_indices(30, count)


def test_page_locked_memory_is_unlocked_before_it_is_freed(monkeypatch) -> None:
    calls = []

    class Cudart:
        def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:  # noqa: N802
            calls.append(("lock", pointer, size))
            return 0 if size == 40 else 2

        def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
            calls.append(("unlock", pointer))
            return 0

    monkeypatch.setattr(host_memory.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(host_memory.torch.cuda, "cudart", Cudart)
    memory = HostMemory("pinned")
    pointer = memory.allocate(10, torch.float32).data_ptr()
    unlocked = memory.allocate(11, torch.float32)  # cannot be locked: used as it is
    memory.release(unlocked)
    released = memory.allocate(10, torch.float32)
    assert [call[0] for call in calls] == ["lock"] * 3
    memory.release(released)
    assert calls[3:] == [("unlock", released.data_ptr())]
    del memory
    gc.collect()
    assert calls[4:] == [("unlock", pointer)]
