import copy
from dataclasses import replace

import pytest
import torch

from tests.packed import pack_blocks
from wanduet.accelerate import packing
from wanduet.accelerate.packing import BlockLayout, allocate_packed, packed_buffer
from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.dit.plain import TORCH_KERNELS, linear
from wanduet.kernels.views import side_by_side
from wanduet.models.dit.model import WanTransformer

SPEC = replace(
    WAN_1_3B.transformer,
    num_attention_heads=2,
    attention_head_dim=24,
    ffn_dim=96,
    num_layers=2,
    text_dim=32,
    freq_dim=32,
)
CPU = torch.device("cpu")


@pytest.fixture
def model() -> WanTransformer:
    torch.manual_seed(0)
    return WanTransformer(SPEC).eval().requires_grad_(False)


def output(model: WanTransformer) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(1, 16, 3, 6, 8), torch.tensor([400]), torch.randn(1, 9, 32))


def test_packed_blocks_are_views_of_one_buffer_with_the_same_values(model) -> None:
    before = copy.deepcopy(model.state_dict())
    expected = output(model)
    assert packed_buffer(model.blocks[0]) is None
    pack_blocks(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    for block in model.blocks:
        flat = packed_buffer(block)
        large = [p for name, p in block.named_parameters() if packing.is_large(name)]
        assert len(large) == 20
        assert {p.untyped_storage().data_ptr() for p in large} == {flat.data_ptr()}
        assert sum(p.nbytes for p in large) <= flat.nbytes < sum(p.nbytes for p in large) + 20 * packing.ALIGNMENT
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-6)


def test_q_k_and_v_are_one_product_only_while_they_lie_side_by_side(model) -> None:
    shapes = []

    def seen(x, weight, bias, out):
        shapes.append(tuple(weight.shape))
        return linear(x, weight, bias, out)

    model.runtime = replace(model.runtime, kernels=replace(TORCH_KERNELS, linear=seen))
    pack_blocks(model)
    expected = output(model)
    assert shapes.count((144, 48)) == 2
    shapes.clear()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-6)
    assert (144, 48) not in shapes


def test_a_block_whose_parameter_was_replaced_is_not_packed(model) -> None:
    pack_blocks(model)
    weight = model.blocks[1].ffn.net[2].weight
    weight.data = weight.data.clone()
    assert packed_buffer(model.blocks[0]) is not None
    assert packed_buffer(model.blocks[1]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocated_on_meta_and_filled_by_a_loader(model, dtype) -> None:
    with torch.device("meta"):
        fresh = WanTransformer(SPEC).eval().requires_grad_(False)
    names = list(fresh.state_dict())
    allocate_packed(fresh, CPU, dtype)
    assert list(fresh.state_dict()) == names
    weights = model.state_dict()
    for name, parameter in fresh.named_parameters():
        assert parameter.dtype == WanTransformer.parameter_dtype(name, dtype)
        assert not parameter.requires_grad
        parameter.data.copy_(weights[name])
    assert all(packed_buffer(block) is not None for block in fresh.blocks)
    bound = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(output(fresh), output(model), rtol=bound, atol=bound)


def test_blocks_are_allocated_where_the_caller_says(model) -> None:
    with torch.device("meta"):
        fresh = WanTransformer(SPEC)
    given = {}

    def allocate(index: int, size: int) -> torch.Tensor:
        given[index] = torch.full((size // 4,), float(index)).view(torch.uint8)
        return given[index]

    allocate_packed(fresh, CPU, torch.float32, allocate)
    assert given.keys() == {0, 1}
    assert given[0].numel() == BlockLayout.of(model.blocks[0]).size
    assert fresh.blocks[1].attn2.to_k.weight.unique().tolist() == [1.0]


def test_training_a_packed_model_gives_gradients(model) -> None:
    pack_blocks(model)
    model.requires_grad_(True)
    model(torch.randn(1, 16, 1, 4, 4), torch.tensor([3]), torch.randn(1, 9, 32)).sum().backward()
    assert model.blocks[0].attn1.to_k.weight.grad.abs().sum() > 0


def test_side_by_side() -> None:
    flat = torch.arange(24.0)
    a, b, c = flat[:8].view(4, 2), flat[8:12].view(2, 2), flat[12:].view(6, 2)
    assert torch.equal(side_by_side(a, b, c), flat.view(12, 2))
    assert side_by_side(a, c) is None
    assert side_by_side(a, b.clone()) is None
    assert side_by_side(b, a) is None
    assert side_by_side(a, flat[8:12]) is None
    assert side_by_side(*(torch.empty(2, 2, device="meta") for _ in range(2))) is None
