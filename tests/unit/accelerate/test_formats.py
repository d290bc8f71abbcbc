"""A transformer whose matrices are in another format: what is converted, its bytes, and the passes after it."""

from dataclasses import replace

import pytest
import torch

from wanduet.accelerate.formats import set_format
from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.packing import BlockLayout, packed_buffer
from wanduet.accelerate.passes import LoadContext, run_passes
from wanduet.family.spec import TransformerSpec
from wanduet.family.wan21 import WAN_1_3B
from wanduet.footprint import dit
from wanduet.footprint.phases import DenoiseShape, ModelMemory
from wanduet.kernels.dit.plain import TORCH_KERNELS, linear
from wanduet.kernels.dit.weight import FORMATS, Weight, format_of
from wanduet.meta.init import meta_init
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


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return WanTransformer(SPEC).state_dict()


def loaded(name: str, dtype: torch.dtype = torch.bfloat16, resident: int = 5, seen: list | None = None):
    """A transformer that is loaded as an engine loads it."""
    with meta_init():
        model = WanTransformer(SPEC).eval().requires_grad_(False)
    values = weights()

    def fill(targets: dict) -> None:
        assert targets.keys() == values.keys()
        if seen is not None:
            seen.extend(p.nbytes for p in model.parameters())
        for tensor, target in targets.items():
            assert target.shape == values[tensor].shape
            target.copy_(values[tensor])

    memory = HostMemory("plain")
    run_passes(model, LoadContext(CPU, dtype, resident, memory, fill, format_of(name, dtype)))
    return model


@torch.no_grad()
def output(model: WanTransformer) -> torch.Tensor:
    torch.manual_seed(1)
    return model(torch.randn(1, 16, 3, 6, 8), torch.tensor([400]), torch.randn(1, 9, 32))


@pytest.fixture
def memory() -> ModelMemory:
    with meta_init():
        shapes = {name: tuple(p.shape) for name, p in WanTransformer(SPEC).named_parameters()}
    return ModelMemory(replace(WAN_1_3B, name="small", transformer=SPEC), shapes, {})


@pytest.mark.parametrize("format", ["q8", "fp8"])
def test_only_the_blocks_matrices_are_in_8_bits(format: str) -> None:
    dtype = FORMATS[format].dtype
    for name, parameter in loaded(format).named_parameters():
        if parameter.dtype == dtype:
            assert WanTransformer.is_block_matrix(name)
            assert parameter.ndim == 2
        else:
            assert not WanTransformer.is_block_matrix(name)
            assert parameter.dtype == WanTransformer.parameter_dtype(name, torch.bfloat16)
    count = sum(p.dtype == dtype for p in loaded(format).parameters())
    assert count == SPEC.num_layers * 10  # q, k, v and out, twice; up and down


@pytest.mark.parametrize("name", ["auto", *FORMATS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_planned_as_they_are_allocated_before_any_weight_is_read(memory, name: str, dtype: str) -> None:
    seen: list[int] = []
    model = loaded(name, getattr(torch, dtype), seen=seen)
    planned = replace(memory, weights=name)
    assert sum(seen) == sum(p.nbytes for p in model.parameters()) == planned.transformer_weights(dtype)
    block = model.blocks[0]
    large = sum(part.num_bytes for part in BlockLayout.of(block).parts)
    gaps = packed_buffer(block).nbytes - large
    assert 0 <= gaps < 30 * 256
    resident, none = (
        planned.transformer(DenoiseShape((16, 16, 1), dtype, [9]), blocks, "cpu").weights
        for blocks in (SPEC.num_layers, 0)
    )
    assert resident - none == (SPEC.num_layers - 2) * large  # all but those in the two buffers


@pytest.mark.parametrize("format", ["q8", "fp8"])
def test_8_bits_halve_what_an_offloaded_block_moves(format: str) -> None:
    full, small = (packed_buffer(loaded(name, resident=0).blocks[0]).nbytes for name in ("auto", format))
    assert small < 0.62 * full  # at widths this small, scales, biases and gaps count


@pytest.mark.parametrize(("name", "bound"), [("bf16", 0.01), ("q8", 0.03), ("fp8", 0.1)])
def test_the_result_is_close(name: str, bound: float) -> None:
    exact, got = output(loaded("auto", torch.float32)), output(loaded(name, torch.float32))
    assert 0 < (got - exact).norm() / exact.norm() < bound


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offloaded_blocks_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    expected = output(loaded(name, dtype))
    for resident in (0, 3):
        assert torch.equal(output(loaded(name, dtype, resident)), expected)


@pytest.mark.parametrize("format", ["q8", "fp8"])
def test_q_k_and_v_are_one_product_of_their_8_bits(format: str) -> None:
    model, seen, dtype = loaded(format), [], FORMATS[format].dtype

    def product(x: torch.Tensor, weight: Weight, bias: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        seen.append((tuple(weight.shape), weight.data.dtype))
        return linear(x, weight, bias, out)

    model.runtime = replace(model.runtime, kernels=replace(TORCH_KERNELS, linear=product))
    output(model)
    assert seen.count(((144, 48), dtype)) == SPEC.num_layers
    assert {one for _, one in seen} == {dtype}


@pytest.mark.parametrize("frames", [1, 21])
@pytest.mark.parametrize("fused", [True, False])
def test_a_forward_takes_what_is_planned(memory, monkeypatch, frames: int, fused: bool) -> None:
    """The forward itself is traced with 8-bit weights, q, k and v as one matrix; the plan adds its largest matrix."""
    monkeypatch.setattr("wanduet.footprint.phases.plans_triton", lambda *_: fused)
    shape = dit.ForwardShape(SPEC, (16, frames, 60, 104), 512, "bfloat16", fused)
    denoised = DenoiseShape((480, 832, 4 * frames - 3), "bfloat16", [9])
    planned, dense = (
        replace(memory, weights=name).transformer(denoised, 5, "cuda:0").activations for name in ("q8", "auto")
    )
    assert planned - dense == 3 * SPEC.dim * SPEC.dim * 2

    class Small(WanTransformer):
        def __init__(self, spec: TransformerSpec) -> None:
            super().__init__(spec)
            set_format(self, FORMATS["q8"])

        @staticmethod
        def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
            return torch.int8 if WanTransformer.is_block_matrix(name) else WanTransformer.parameter_dtype(name, dtype)

    def joined(*weights: Weight) -> Weight:
        data, scale = (torch.cat(tensors) for tensors in zip(*((w.data, w.scale) for w in weights), strict=True))
        return Weight(data, scale)

    monkeypatch.setattr(dit, "WanTransformer", Small)
    monkeypatch.setattr(Weight, "adjacent", staticmethod(joined))
    traced = dit._traced.__wrapped__(shape)
    assert dense <= traced <= planned + 4 * SPEC.dim * (3 * SPEC.dim + 12)  # `joined` copies what is adjacent in memory
