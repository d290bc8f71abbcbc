"""Formats of matrices in memory: their errors, their bytes, and products of them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from wanduet.kernels.dit import plain, weight
from wanduet.kernels.dit.weight import FORMATS, Weight, format_of


def stored(matrix: torch.Tensor, name: str = "q8") -> Weight:
    made = FORMATS[name]
    data = torch.empty(matrix.shape, dtype=made.dtype)
    target = Weight(data, torch.empty(len(matrix), 1) if made.scaled else None)
    target.copy_(matrix)
    return target


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("q8", 0.007, 0.009), ("fp8", 0.025, 0.028), ("bf16", 0.0015, 0.0018)]
)
def test_the_error_on_normal_weights(name: str, least: float, most: float) -> None:
    matrix = normal(1024, 1536)
    assert least < (stored(matrix, name).dense(torch.float32) - matrix).norm() / matrix.norm() < most


def test_no_value_is_off_by_more_than_half_a_step_of_its_row() -> None:
    matrix = normal(64, 96) * torch.logspace(-30, 30, 64)[:, None]
    step = matrix.abs().amax(1, keepdim=True) / 127
    assert ((stored(matrix).dense(torch.float32) - matrix).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("scale", [1.0, 0.0123, "rows"])
def test_fp8_keeps_the_numbers_of_weights_that_were_fp8(scale: float | str) -> None:
    """Whatever the largest number of a row, and whether one scale is a matrix's or a row's."""
    rows = normal(64, 1).exp() if scale == "rows" else torch.tensor(scale)
    numbers = (normal(64, 300) * 50 * torch.logspace(0, 2, 64)[:, None]).to(torch.float8_e4m3fn).float()
    matrix = numbers * rows
    target = stored(matrix, "fp8")
    assert torch.allclose(target.dense(torch.float32), matrix, rtol=1e-6, atol=0)
    assert torch.equal(target.dense(torch.bfloat16), matrix.bfloat16())
    again = stored(target.dense(torch.float32), "fp8")
    assert torch.equal(again.data.float(), target.data.float())


def test_q8_keeps_the_numbers_of_weights_that_were_int8_with_a_scale_for_each_row() -> None:
    before = stored(normal(64, 300) * normal(64, 1).exp())
    again = stored(before.dense(torch.float32))
    assert torch.equal(again.data, before.data)
    assert torch.allclose(again.scale, before.scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["q8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dense_matrix_is_rounded_once(dtype: torch.dtype, name: str) -> None:
    target = stored(normal(24, 32), name)
    assert torch.equal(target.dense(dtype), (target.data.float() * target.scale).to(dtype))


@pytest.mark.parametrize("name", ["q8", "fp8"])
def test_rows_of_zeros_stay_and_rows_that_are_not_finite_do_not_pass_for_numbers(name: str) -> None:
    """The check of loaded weights is to meet NaN, not plausible numbers."""
    matrix = normal(4, 16)
    matrix[0], matrix[1, 3], matrix[2, 5] = 0.0, float("nan"), float("inf")
    dense = stored(matrix, name).dense(torch.float32)
    assert (dense[0] == 0).all()
    assert dense[1:3].isnan().any(dim=1).all()
    assert dense[3].isfinite().all()


@pytest.mark.parametrize("name", ["q8", "fp8"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16])
def test_it_is_converted_in_chunks_of_rows_with_the_same_result(monkeypatch, source: torch.dtype, name: str) -> None:
    class Largest(TorchDispatchMode):
        """The largest floating tensor that is made, in elements."""

        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            is_new = isinstance(made, torch.Tensor) and not made._is_view() and made.is_floating_point()
            self.size = max(self.size, made.numel() if is_new else 0)
            return made

    matrix = normal(37, 24, dtype=source)
    before = matrix.clone()
    whole = stored(matrix, name)
    dense = whole.dense(torch.bfloat16)
    monkeypatch.setattr(weight, "CHUNK_ELEMENTS", 5 * 24 + 1)
    target = Weight(torch.empty_like(whole.data), torch.empty_like(whole.scale))
    with Largest() as largest:
        target.copy_(matrix)
    assert torch.equal(matrix, before)
    assert 0 < largest.size <= 5 * 24
    assert torch.equal(target.data.float(), whole.data.float())
    assert torch.equal(target.scale, whole.scale)
    assert torch.equal(target.dense(torch.bfloat16), dense)


def test_bytes_are_those_of_the_tensors() -> None:
    matrix = normal(24, 32)
    for name, made in FORMATS.items():
        assert stored(matrix, name).nbytes == made.num_bytes((24, 32))
    assert FORMATS["q8"].num_bytes((24, 32)) == FORMATS["fp8"].num_bytes((24, 32)) == 24 * 32 + 24 * 4


def test_a_matrix_in_the_dtype_of_the_product_is_used_as_it_is() -> None:
    matrix = normal(8, 8)
    assert Weight(matrix).dense(torch.float32) is matrix


def test_a_format_that_is_no_smaller_is_not_used() -> None:
    assert format_of("auto", torch.float32) is None
    assert format_of("bf16", torch.bfloat16) is format_of("bf16", torch.float16) is None
    assert format_of("bf16", torch.float32) is FORMATS["bf16"]
    assert format_of("q8", torch.float16) is format_of("q8", torch.float32) is FORMATS["q8"]


@torch.no_grad()
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("product", [plain.linear, plain.linear_gelu])
def test_a_product_is_that_of_the_dense_matrix(name: str, product: plain.LinearFn) -> None:
    x, bias, target = normal(2, 5, 32), normal(24), stored(normal(24, 32), name)
    expected = product(x, Weight(target.dense(torch.float32)), bias, None)
    assert torch.equal(product(x, target, bias, None), expected)
    into, dense = torch.empty_like(expected), torch.empty_like(expected)
    assert product(x, target, bias, into) is into
    assert torch.equal(into, product(x, Weight(target.dense(torch.float32)), bias, dense))


@pytest.mark.parametrize("name", ["q8", "fp8"])
def test_adjacent_matrices_are_one_with_their_scales(name: str) -> None:
    whole = stored(normal(9, 8), name)
    thirds = [Weight(whole.data[i : i + 3], whole.scale[i : i + 3]) for i in (0, 3, 6)]
    joined = Weight.adjacent(*thirds)
    assert torch.equal(joined.dense(torch.float32), whole.dense(torch.float32))
    apart = Weight(thirds[1].data, thirds[1].scale.clone())
    assert Weight.adjacent(thirds[0], apart, thirds[2]) is None
