"""Block streaming with real copies and streams. `pytest -m gpu`."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.packed import pack_blocks
from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.offload import allocate_streamed, stream_blocks
from wanduet.accelerate.packing import allocate_packed, packed_buffer
from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.dit.model import WanTransformer

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
SPEC = replace(WAN_1_3B.transformer, num_attention_heads=4, ffn_dim=2048, num_layers=6, text_dim=64)


def fresh() -> WanTransformer:
    with torch.device("meta"):
        return WanTransformer(SPEC).eval().requires_grad_(False)


@pytest.fixture
def model() -> WanTransformer:
    model = fresh()
    allocate_packed(model, DEVICE, torch.bfloat16)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    return model


@torch.no_grad()
def output(model: WanTransformer, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    latents, embeds = torch.randn(1, 16, 3, 20, 20), torch.randn(1, 30, 64)
    return model(latents.to(DEVICE), torch.tensor([400], device=DEVICE), embeds.to(DEVICE))


@pytest.mark.parametrize("kind", ["pinned", "mapped", "plain"])
@pytest.mark.parametrize(("num_resident", "num_buffers"), [(0, 1), (0, 2), (0, 3), (3, 2), (5, 2)])
def test_bit_equal_to_resident(model, tmp_path: Path, kind, num_resident: int, num_buffers: int) -> None:
    expected = [output(model, seed) for seed in range(6)]
    assert expected[0].isfinite().all()
    memory = HostMemory(kind, tmp_path)
    streamed = fresh()
    allocate_streamed(streamed, DEVICE, torch.bfloat16, num_resident, memory)
    for name, parameter in streamed.named_parameters():
        parameter.data.copy_(model.get_parameter(name).data)
    stream = stream_blocks(streamed, DEVICE, num_resident, memory, num_buffers)
    # Queued without waiting in between: a copy that overtook a block would show.
    got = [output(streamed, seed) for seed in range(6)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    stream.close()
    assert packed_buffer(streamed.blocks[-1]).is_pinned() == (kind == "pinned")


def test_a_resident_model_gives_its_memory_back(model) -> None:
    expected = output(model, 0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    stream = stream_blocks(model, DEVICE, 0)
    block = packed_buffer(model.blocks[0]).nbytes
    assert torch.cuda.memory_allocated() <= before - 4 * block + 2**20
    assert torch.equal(output(model, 0), expected)
    stream.close()
    assert torch.cuda.memory_allocated() <= before - 6 * block + 2**20
    pack_blocks(model, DEVICE)
    assert all(packed_buffer(b).is_cuda for b in model.blocks)
    assert torch.equal(output(model, 0), expected)


def test_a_swapped_out_transformer_is_swapped_in_and_out_without_copying_back(model) -> None:
    expected = output(model, 0)
    memory = HostMemory("pinned")
    memory.retain_copies(True)
    stream_blocks(model, DEVICE, 0, memory, num_buffers=0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    where = [packed_buffer(block).data_ptr() for block in model.blocks]
    for num_resident in (5, 2):
        stream_blocks(model, DEVICE, num_resident, memory)
        assert sum(packed_buffer(block).is_cuda for block in model.blocks) == num_resident == len(memory.copies)
        assert torch.equal(output(model, 0), expected)
        stream_blocks(model, DEVICE, 0, memory, num_buffers=0)
        assert [packed_buffer(block).data_ptr() for block in model.blocks] == where
        assert torch.cuda.memory_allocated() == before
        assert not memory.copies
    stream_blocks(model, DEVICE, 5, memory)
    memory.retain_copies(False)
    assert not memory.copies
    assert torch.equal(output(model, 0), expected)
