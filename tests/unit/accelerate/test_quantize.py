"""A transformer whose large products are in 8 bits: which they are, how far off the result is, with what it composes."""

from dataclasses import replace

import pytest
import torch

from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.passes import LoadContext, run_passes
from wanduet.family.wan21 import WAN_1_3B
from wanduet.footprint.dit import ForwardShape, forward_bytes
from wanduet.kernels.dit import plain
from wanduet.kernels.dit.plain import TORCH_KERNELS
from wanduet.kernels.dit.quantized import DTYPES, TORCH_QUANTIZED, QuantizedRows
from wanduet.kernels.dit.weight import Weight, format_of
from wanduet.meta.init import meta_init
from wanduet.models.dit.block import Runtime
from wanduet.models.dit.model import WanTransformer
from wanduet.models.dit.quantizer import Quantizer

FORMATS = tuple(DTYPES)
SMALL = {"num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 96, "num_layers": 5, "text_dim": 32}
SPEC = replace(WAN_1_3B.transformer, freq_dim=32, **SMALL)
CPU = torch.device("cpu")


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return WanTransformer(SPEC).state_dict()


def loaded(name: str, dtype: torch.dtype, resident: int = 5) -> WanTransformer:
    """A transformer that is loaded as an engine loads it, with matrices in the format `name`."""
    with meta_init():
        model = WanTransformer(SPEC).eval().requires_grad_(False)
    values = weights()

    def fill(targets: dict) -> None:
        for tensor, target in targets.items():
            target.copy_(values[tensor])

    run_passes(model, LoadContext(CPU, dtype, resident, HostMemory("plain"), fill, format_of(name, dtype)))
    return model


@torch.no_grad()
def output(model: WanTransformer) -> torch.Tensor:
    torch.manual_seed(1)
    return model(torch.randn(1, 16, 3, 6, 8), torch.tensor([400]), torch.randn(1, 9, 32))


def quantized(format: str, name: str = "auto", dtype: torch.dtype = torch.float32, resident: int = 5) -> WanTransformer:
    model = loaded(name, dtype, resident)
    model.runtime = replace(model.runtime, quantizer=Quantizer(format, TORCH_QUANTIZED))
    return model


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got - exact).norm() / exact.norm())


@pytest.mark.parametrize(("format", "bound"), [("fp8", 0.03), ("int8", 0.01)])
def test_the_result_is_close(format: str, bound: float) -> None:
    assert 0 < error(output(quantized(format)), output(loaded("auto", torch.float32))) < bound


@pytest.mark.parametrize("format", FORMATS)
def test_six_layers_of_each_block_are_quantized_and_no_others(format: str) -> None:
    model, exact = quantized(format), []

    def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        exact.append(weight.data.data_ptr())
        return plain.linear(x, weight, bias, out)

    model.runtime = replace(model.runtime, kernels=replace(TORCH_KERNELS, linear=linear, linear_gelu=linear))
    output(model)
    names = {module: name for name, module in model.named_modules()}
    parts = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2")
    found = {names[layer] for layer in model.runtime.quantizer.layers}
    assert found == {f"blocks.{index}.{part}" for index in range(SPEC.num_layers) for part in parts}
    cross = [(block.attn2.to_q.weight.data_ptr(), block.attn2.to_out[0].weight.data_ptr()) for block in model.blocks]
    assert exact == [address for pair in cross for address in pair]


def test_a_layer_that_is_left_out_is_noticed(monkeypatch) -> None:
    model = quantized("int8")
    monkeypatch.setattr(Runtime, "operand", lambda self, x: x)  # attention's output stays exact
    with pytest.raises(RuntimeError, match="25 of 30 layers"):
        output(model)


@pytest.mark.parametrize("format", FORMATS)
def test_the_head_s_norm_is_exact(format: str, monkeypatch) -> None:
    seen, head = [], WanTransformer.head

    def spy(self: WanTransformer, n: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(n)
        return head(self, n, *rest)

    monkeypatch.setattr(WanTransformer, "head", spy)
    output(quantized(format))
    rows = QuantizedRows.empty(seen[0].shape, DTYPES[format], seen[0].device)
    TORCH_QUANTIZED.quantize(seen[0], rows)
    assert error(rows.dense(torch.float32), seen[0]) > 1e-3  # it is no result of rounding to 8 bits


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["auto", "q8"])
def test_offloaded_blocks_give_the_same_bits(format: str, name: str) -> None:
    expected = output(quantized(format, name, torch.bfloat16))
    for resident in (0, 3):
        assert torch.equal(output(quantized(format, name, torch.bfloat16, resident)), expected)


def test_weights_that_are_stored_in_int8_are_not_rounded_again(monkeypatch) -> None:
    model, seen = quantized("int8", "q8"), []

    def product(x: QuantizedRows, weight: QuantizedRows, bias: torch.Tensor, out: torch.Tensor) -> None:
        seen.append(weight.data.data_ptr())
        TORCH_QUANTIZED.quantized_linear(x, weight, bias, out)

    kernels = replace(TORCH_QUANTIZED, quantized_linear=product)
    model.runtime = replace(model.runtime, quantizer=Quantizer("int8", kernels))
    output(model)
    stored = [block.attn1.to_q.weight.data_ptr() for block in model.blocks]  # q, k and v are one product
    stored += [block.ffn.net[2].weight.data_ptr() for block in model.blocks]
    assert set(stored) <= set(seen)


def test_the_weights_stay_as_they_are() -> None:
    model, before = quantized("fp8"), weights()
    output(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_memory_for_8_bits_is_planned() -> None:
    """Beside an exact forward's: one operand `[L, C]` of 8 bits, and the matrices of one feed-forward."""
    shape = ForwardShape(SPEC, (16, 3, 60, 104), 512, "bfloat16", True)
    exact, got = forward_bytes(shape), forward_bytes(replace(shape, quantize="fp8"))
    operand = shape.tokens * (SPEC.dim + 4)
    assert 0 < got - exact <= operand + 2 * SPEC.dim * SPEC.ffn_dim + 2**20
    assert forward_bytes(replace(shape, quantize="fp8", fused_quantized=False)) > got
