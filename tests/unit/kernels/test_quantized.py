"""Operands in 8 bits and their products: the plain forms, Triton's in its interpreter, and which product is chosen."""

import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from wanduet.kernels import select, verdicts
from wanduet.kernels.check import largest_quantized_error
from wanduet.kernels.dit import plain
from wanduet.kernels.dit.plain import Norm
from wanduet.kernels.dit.quantized import DTYPES, LARGEST, TORCH_QUANTIZED, QuantizedRows

FORMATS = tuple(DTYPES)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WIDTHS = (2, 24, 96)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    verdicts.forget()
    with torch.no_grad():
        yield
    verdicts.forget()


def empty(like: torch.Tensor, format: str) -> QuantizedRows:
    return QuantizedRows.empty(like.shape, DTYPES[format], CPU)


def quantized(x: torch.Tensor, format: str) -> QuantizedRows:
    out = empty(x, format)
    TORCH_QUANTIZED.quantize(x, out)
    return out


def weight(format: str, outputs: int, inputs: int) -> QuantizedRows:
    rows = quantized(torch.randn(1, outputs, inputs), format)
    return QuantizedRows(rows.data[0], rows.scale[0])


@pytest.mark.parametrize("format", FORMATS)
def test_each_row_is_rounded_by_its_own_scale(format: str) -> None:
    x = torch.randn(2, 5, 64) * torch.logspace(-6, 6, 5)[:, None]
    x[0, 0] = 0.0
    got = quantized(x, format)
    most = x.abs().amax(-1, keepdim=True)
    assert torch.allclose(got.scale * LARGEST[DTYPES[format]], most.clamp_min(1e-20), rtol=1e-6)
    error = (got.dense(torch.float32) - x).abs()
    # int8: half a step; e4m3: half of the last of 3 bits, and half a step of the smallest values.
    bound = got.scale / 2 if format == "int8" else torch.maximum(x.abs() / 16, got.scale * 2.0**-10)
    assert (error <= bound * 1.001).all()
    assert got.dense(torch.float32)[0, 0].eq(0).all()


@pytest.mark.parametrize("format", FORMATS)
def test_long_sequences_are_rounded_alike(format: str) -> None:
    x = torch.randn(1, plain.CHUNK_TOKENS + 3, 32)
    got, last = quantized(x, format), quantized(x[:, -5:], format)
    assert torch.equal(got.tokens(slice(-5, None)).dense(torch.float32), last.dense(torch.float32))


@pytest.mark.parametrize("format", FORMATS)
def test_the_norm_before_a_product_is_the_exact_one_rounded(format: str) -> None:
    x, y, gate = torch.randn(2, 7, 64), torch.randn(2, 7, 64).bfloat16(), torch.randn(2, 64)
    norm = Norm(torch.randn(2, 64), torch.randn(1, 64), 1e-6)
    expected_x, expected = plain.residual_norm(x.clone(), y, gate, norm, torch.empty_like(x))
    got = empty(x, format)
    TORCH_QUANTIZED.quantize_norm(x, y, gate, norm, got)
    assert torch.equal(x, expected_x)
    assert torch.equal(got.data.float(), quantized(expected, format).data.float())


@pytest.mark.parametrize(("format", "bound"), [("fp8", 0.06), ("int8", 0.02)])
def test_a_product_is_that_of_the_rounded_operands(format: str, bound: float) -> None:
    x, matrix = torch.randn(2, 9, 64), torch.randn(1, 48, 64)
    rows, bias, out = quantized(matrix, format), torch.randn(48), torch.empty(2, 9, 48)
    TORCH_QUANTIZED.quantized_linear(quantized(x, format), QuantizedRows(rows.data[0], rows.scale[0]), bias, out)
    exact = x @ matrix[0].t() + bias
    assert 0 < (out - exact).norm() / exact.norm() < bound
    rounded = quantized(x, format).dense(torch.float32) @ rows.dense(torch.float32)[0].t() + bias
    torch.testing.assert_close(out, rounded)


@pytest.fixture(scope="module")
def kernels(interpreted) -> ModuleType:
    return interpreted("wanduet.kernels.dit.gpu_quantized")


def assert_alike(got: QuantizedRows, expected: QuantizedRows) -> None:
    """The same scales, and the same values but for a few between two that can be rounded to either.

    Triton's interpreter loses the carry when it rounds to fp8, which some hundredths of the values need.
    """
    torch.testing.assert_close(got.scale, expected.scale, rtol=1e-6, atol=0)
    share = (got.data.view(torch.uint8) != expected.data.view(torch.uint8)).float().mean()
    assert share <= (2e-3 if got.data.dtype == torch.int8 else 0.06)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("width", [96, 1536, 2100])  # a row at once, twice, and in parts of which the last is not full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_the_interpreter(kernels, format: str, width: int, dtype: torch.dtype) -> None:
    x = (2 * torch.randn(2, 12, width)).to(dtype)[:, 2:9]
    x[0, 1] = -x[0, 1].abs()  # rows whose largest GELU is not that of the largest x
    x[1, 2] *= 0.01
    x[1, 3] = 0.0
    for operation in ("quantize", "quantize_gelu"):
        got, expected = empty(torch.empty(2, 9, width), format), empty(x, format)
        getattr(kernels, operation)(x, got.tokens(slice(1, 8)))
        getattr(TORCH_QUANTIZED, operation)(x, expected)
        assert_alike(got.tokens(slice(1, 8)), expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("added", ["nothing", "y", "gated y"])
def test_the_norm_in_the_interpreter(kernels, format: str, added: str) -> None:
    x, norm = torch.randn(2, 7, 96), Norm(torch.randn(2, 96), torch.randn(1, 96), 1e-6)
    y = None if added == "nothing" else torch.randn(2, 7, 96).bfloat16()
    gate = torch.randn(2, 96) if added == "gated y" else None
    got, expected, sums = empty(x, format), empty(x, format), x.clone()
    TORCH_QUANTIZED.quantize_norm(sums, y, gate, norm, expected)
    kernels.quantize_norm(x, y, gate, norm, got)
    torch.testing.assert_close(x, sums, rtol=1e-6, atol=1e-6)
    assert_alike(got, expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("inputs", [96, 256])  # part of a program's channels, and a multiple of them
def test_every_product_in_the_interpreter(kernels, format: str, inputs: int) -> None:
    x, matrix = quantized(torch.randn(2, 70, inputs), format), weight(format, 160, inputs)
    bias, expected = torch.randn(160), torch.empty(2, 70, 160)
    TORCH_QUANTIZED.quantized_linear(x, matrix, bias, expected)
    products = kernels.products(DTYPES[format])
    assert len(products) > 2
    for product in products.values():
        wide = torch.full((2, 75, 160), torch.nan)
        product(x, matrix, bias, wide[:, 3:73])
        torch.testing.assert_close(wide[:, 3:73], expected, rtol=1e-4, atol=1e-4)
        assert wide[:, :3].isnan().all()
        assert wide[:, 73:].isnan().all()


@pytest.mark.parametrize("tokens", [5, 16, 24, 37])
def test_any_number_of_rows_has_a_product_in_fp8(kernels, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    multiply, asked = torch._scaled_mm, []

    def cublas(rows: torch.Tensor, *others: object, **options: object) -> torch.Tensor:
        asked.append(len(rows))
        assert len(rows) % 8 == 0
        assert others[1].data_ptr() % 16 == 0
        if len(rows) not in (16, 32):
            raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`")
        return multiply(rows, *others, **options)

    monkeypatch.setattr(torch, "_scaled_mm", cublas)
    monkeypatch.setattr(kernels, "_LACKING", set())
    x, matrix = quantized(torch.randn(2, 1 + tokens, 96), "fp8").tokens(slice(1, None)), weight("fp8", 160, 96)
    bias, out, expected = torch.randn(160), torch.empty(2, tokens, 160), torch.empty(2, tokens, 160)
    TORCH_QUANTIZED.quantized_linear(x, matrix, bias, expected)
    for _ in range(2):
        out.fill_(torch.nan)
        kernels.multiply_by_scaled_mm(x, matrix, bias, out)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert asked == {5: [], 16: 4 * [16], 24: [24], 37: 4 * [32]}[tokens]  # once for what it lacks


def test_an_error_of_cublas_that_is_no_lack_is_raised(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*operands: object, **options: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "_scaled_mm", broken)
    x, matrix = quantized(torch.randn(1, 16, 96), "fp8"), weight("fp8", 160, 96)
    with pytest.raises(RuntimeError, match="illegal"):
        kernels.multiply_by_scaled_mm(x, matrix, torch.randn(160), torch.empty(1, 16, 160))


def test_a_product_of_operands_with_gaps_is_refused(kernels) -> None:
    x, matrix = quantized(torch.randn(1, 8, 96), "int8"), weight("int8", 32, 96)
    gaps = QuantizedRows(x.data[:, ::2], x.scale[:, ::2])
    with pytest.raises(ValueError, match="contiguous"):
        kernels.TRITON_QUANTIZED.quantized_linear(gaps, matrix, torch.randn(32), torch.empty(1, 4, 32))


def test_tiles_fit_the_shared_memory_of_every_card(kernels) -> None:
    assert all((tile.rows + tile.columns) * tile.channels * tile.stages <= 101_376 for tile in kernels.TILES)


def test_the_fastest_right_product_is_measured(interpreted, monkeypatch: pytest.MonkeyPatch) -> None:
    choose = interpreted("wanduet.kernels.choose_product")
    seconds = {"slow": 2.0, "fast": 1.0, "wrong": 0.1}

    def wrong(x: QuantizedRows, weight: QuantizedRows, bias: torch.Tensor, out: torch.Tensor) -> None:
        out.fill_(1.0)

    def broken(*operands: object) -> None:
        raise RuntimeError("no such instruction")

    def short(x: QuantizedRows, weight: QuantizedRows, bias: torch.Tensor, out: torch.Tensor) -> None:
        right = named("short")
        right(x.tokens(slice(31)), weight, bias, out[:, :31])

    def named(name: str):
        def right(*operands: object) -> None:
            TORCH_QUANTIZED.quantized_linear(*operands)

        right.__name__ = name
        return right

    monkeypatch.setattr(choose, "TIMED_TOKENS", 32)
    monkeypatch.setattr(choose, "milliseconds", lambda run, device: [seconds[run.func.__name__]])
    offered = {"slow": named("slow"), "wrong": wrong, "broken": broken, "short": short, "fast": named("fast")}
    table = {row.name: row for row in choose.measure(offered, CPU, torch.float32, "int8", (32, 48))}
    assert {name: row.milliseconds for name, row in table.items() if row.usable} == {"slow": 2.0, "fast": 1.0}
    assert table["broken"].problem == "RuntimeError"
    assert "wrong" in table["wrong"].problem
    assert "wrong" in table["short"].problem  # it leaves a row out


def offered(monkeypatch: pytest.MonkeyPatch, kernel_set: object) -> None:
    """Let `kernel_set` be what is chosen on a GPU, and check it on the CPU."""
    module = types.SimpleNamespace(choose_product=lambda *_: kernel_set)
    monkeypatch.setitem(sys.modules, "wanduet.kernels.choose_product", module)
    check = largest_quantized_error
    monkeypatch.setattr(select, "largest_quantized_error", lambda k, _, *rest: check(k, CPU, *rest))


def test_a_cpu_gets_the_plain_forms() -> None:
    assert select.quantized_kernels_for(CPU, torch.float32, "int8", WIDTHS, None) is TORCH_QUANTIZED


@pytest.mark.parametrize("format", FORMATS)
def test_a_wrong_operation_is_replaced_alone(monkeypatch, caplog, format: str) -> None:
    def wrong(x: torch.Tensor, out: QuantizedRows) -> None:
        TORCH_QUANTIZED.quantize_gelu(1.1 * x, out)

    def right(x: torch.Tensor, out: QuantizedRows) -> None:
        TORCH_QUANTIZED.quantize(x, out)

    offered(monkeypatch, replace(TORCH_QUANTIZED, name="triton", quantize=right, quantize_gelu=wrong))
    got = select.quantized_kernels_for(CUDA, torch.bfloat16, format, WIDTHS, None)
    assert got.quantize is right
    assert got.quantize_gelu is TORCH_QUANTIZED.quantize_gelu
    assert got.name == "triton without quantize_gelu"
    assert "quantize_gelu" in caplog.text
    assert verdicts.plain_operations(select.QUANTIZED, CUDA) == ("quantize_gelu",)
