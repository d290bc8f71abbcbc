"""VSA and SLA against their formulas with dense masks, in the transformer: order of tokens, gate, projection, ranks' parts."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.packed import pack_blocks
from tests.trained_references import heads_first, reference_sla, reference_vsa
from wanduet.accelerate.formats import set_format
from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.offload import stream_blocks
from wanduet.accelerate.packing import allocate_packed
from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.attention.backends import sdpa
from wanduet.kernels.attention.trained import TrainedSparse
from wanduet.kernels.dit.quantized import TORCH_QUANTIZED
from wanduet.kernels.dit.weight import FORMATS
from wanduet.meta.init import meta_init
from wanduet.models.dit.block import Runtime
from wanduet.models.dit.model import WanTransformer
from wanduet.models.dit.quantizer import Quantizer

DENSE = replace(
    WAN_1_3B.transformer,
    num_attention_heads=2,
    attention_head_dim=24,
    ffn_dim=96,
    num_layers=3,
    text_dim=32,
    freq_dim=32,
)
KINDS = {"vsa": replace(DENSE, attention="vsa", key_share=0.3), "sla": replace(DENSE, attention="sla", key_share=0.4)}
# Tiles of VSA that are cut on one, two and all sides; one tile; and whole ones only.
GRIDS = [(5, 6, 10), (1, 3, 4), (4, 8, 8)]


@pytest.fixture(scope="module", params=KINDS)
def model(request) -> WanTransformer:
    torch.manual_seed(0)
    return WanTransformer(KINDS[request.param]).eval().requires_grad_(False)


def latents_of(grid: tuple[int, int, int]) -> Tensor:
    frames, rows, columns = grid
    return torch.randn(1, 16, frames, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(2))


def forward(model: WanTransformer, grid: tuple[int, int, int] = GRIDS[0]) -> Tensor:
    text = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(latents_of(grid), torch.tensor([400.0]), text)


def by_formulas(model: WanTransformer, grid: tuple[int, int, int], share: float | None = None) -> Tensor:
    """The velocity of a dense transformer with the model's weights, whose attention is the reference."""
    dense = WanTransformer(DENSE).eval().requires_grad_(False)
    dense.load_state_dict(model.state_dict(), strict=False)
    spec, gates = model.spec, []
    if spec.attention == "vsa":
        for block, own in zip(dense.blocks, model.blocks, strict=True):

            def project(n, run, workspace, plain=block.attn1.project_qkv, gate=own.to_gate_compress):
                gates.append(gate(n).unflatten(-1, (2, -1)))
                return plain(n, run, workspace)

            block.attn1.project_qkv = project

    def attend(q, k, v, call):
        given = heads_first(q, k, v)
        if spec.attention == "vsa":
            out = reference_vsa(*given, *heads_first(gates[-1]), call.grid, share or spec.key_share)
        else:
            own = model.blocks[call.block].attn1.proj_l
            out = reference_sla(*given, own.weight.double(), own.bias.double(), share or spec.key_share)
        return out.transpose(0, 1)[None].to(q.dtype)

    dense.runtime = Runtime(attention=attend)
    return forward(dense, grid)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_velocity_is_that_of_the_formulas(model: WanTransformer, grid: tuple[int, int, int]) -> None:
    model.runtime = Runtime()
    torch.testing.assert_close(forward(model, grid), by_formulas(model, grid), rtol=1e-4, atol=1e-5)


def test_another_share_replaces_the_weights_own(model: WanTransformer) -> None:
    for share in (0.6, 1.0):
        model.runtime = Runtime(trained=TrainedSparse(share=share))
        torch.testing.assert_close(forward(model), by_formulas(model, GRIDS[0], share), rtol=1e-4, atol=1e-5)
    model.runtime = Runtime()
    assert (forward(model) - by_formulas(model, GRIDS[0], 0.6)).abs().max() > 1e-3


def test_with_all_keys_the_chosen_attention_runs(model: WanTransformer) -> None:
    calls = []

    def attend(*given):
        calls.append(given[3].block)
        return sdpa(*given)

    model.runtime = Runtime(attention=attend, trained=TrainedSparse(share=1.0))
    forward(model)
    assert calls == [0, 1, 2]
    model.runtime = Runtime(attention=attend)
    forward(model)
    assert calls == [0, 1, 2]


def test_gradients_reach_the_module(model: WanTransformer) -> None:
    model.runtime = Runtime()
    module = model.blocks[1].to_gate_compress if model.spec.attention == "vsa" else model.blocks[1].attn1.proj_l
    module.requires_grad_(True)
    velocity = model(latents_of(GRIDS[0]), torch.tensor([400.0]), torch.zeros(1, 9, 32))
    torch.testing.assert_close(velocity, model(latents_of(GRIDS[0]), torch.tensor([400.0]), torch.zeros(1, 9, 32)))
    velocity.square().sum().backward()
    assert module.weight.grad.abs().sum() > 0
    module.requires_grad_(False)
    module.weight.grad = module.bias.grad = None


def test_packed_and_streamed_blocks_give_the_same_bits(model: WanTransformer) -> None:
    model.runtime = Runtime()
    other = WanTransformer(model.spec).eval().requires_grad_(False)
    other.load_state_dict(model.state_dict())
    pack_blocks(other)
    expected = forward(other)
    torch.testing.assert_close(expected, forward(model), rtol=1e-5, atol=1e-6)
    with_none = stream_blocks(other, torch.device("cpu"), 0, HostMemory("plain"))
    assert torch.equal(forward(other), expected)
    with_none.close()


def test_eight_bits_hold_the_gate_and_leave_the_projection(model: WanTransformer) -> None:
    """Matrices in a smaller format, and products in 8 bits, which must count the gates."""
    model.runtime = Runtime()
    expected = forward(model)
    model.runtime = Runtime(quantizer=Quantizer("int8", TORCH_QUANTIZED))
    assert (forward(model) - expected).norm() < 0.1 * expected.norm()
    model.runtime = Runtime()
    for name, format in FORMATS.items():
        with meta_init():
            small = WanTransformer(model.spec).eval().requires_grad_(False)
        set_format(small, format)
        allocate_packed(small, torch.device("cpu"), torch.float32)
        assert small.blocks[0].attn2.to_q.weight.dtype == format.dtype, name
        if model.spec.attention == "vsa":
            assert small.blocks[0].to_gate_compress.weight.dtype == format.dtype
        else:
            assert small.blocks[0].attn1.proj_l.weight.dtype == torch.float32
