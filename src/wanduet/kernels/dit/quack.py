"""Linear layers with quack-kernels' matrix product for Hopper GPUs, whose epilogue overlaps the next tile's product.

In cuBLAS the matrix units wait for the epilogue, above all for GELU. Relative to cuBLAS, the feed-forward's first
product takes 0.89 of the time, those of 1536 by 1536 0.90, the others 0.96 to 0.97
(benchmarks/results/transformer_forward.json). Results equal cuBLAS's to the last bit without GELU. Imported lazily,
only if quack-kernels is installed.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from wanduet.kernels.device import on_device_of
from wanduet.kernels.dit import plain
from wanduet.kernels.dit.weight import Weight

ALIGNMENT = 16  # bytes; required of all tensors that the copy engine reads and writes


def linear(x: Tensor, weight: Weight, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """See `plain.linear`."""
    return _product(x, weight, bias, out, None, plain.linear)


def linear_gelu(x: Tensor, weight: Weight, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """See `plain.linear_gelu`."""
    return _product(x, weight, bias, out, "gelu_tanh_approx", plain.linear_gelu)


def _product(
    x: Tensor, weight: Weight, bias: Tensor, out: Tensor | None, activation: str | None, fallback: plain.LinearFn
) -> Tensor:
    """Return `activation(x @ weight.T + bias)`, written into `out` if passed.

    Calls `fallback` with gradients enabled, or if a tensor is not aligned for the copy engine.
    """
    if torch.is_grad_enabled():
        return fallback(x, weight, bias, out)
    result = x.new_empty(*x.shape[:-1], weight.shape[0]) if out is None else out
    matrix = weight.dense(x.dtype)
    if not all(map(_is_aligned, (x, matrix, bias, result))):
        return fallback(x, Weight(matrix), bias, out)
    multiply = _gemm()
    with on_device_of(x):
        for x_LC, result_LO in zip(x, result, strict=True):
            multiply(x_LC, matrix.t(), bias=bias, activation=activation, postact_out=result_LO)
    return result


def _is_aligned(x: Tensor) -> bool:
    """Return True if the last dimension is contiguous and every row is aligned for the copy engine."""
    rows = (stride * x.itemsize % ALIGNMENT == 0 for stride in x.stride()[:-1])
    return (
        x.stride(-1) == 1 and x.shape[-1] * x.itemsize % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0 and all(rows)
    )


@cache
def _gemm() -> Callable[..., Any]:
    """Return quack's product with two alternating groups of warps: one multiplies while the other runs its epilogue."""
    from quack.gemm_config import GemmConfig
    from quack.gemm_interface import gemm_act

    config = GemmConfig(tile_m=128, tile_n=192, pingpong=True, cluster_m=2, cluster_n=1, is_dynamic_persistent=False)
    return partial(gemm_act, store_preact=False, config=config)
