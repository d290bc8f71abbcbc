"""Products with weights by quack-kernels' matrix product for Hopper GPUs, whose epilogue overlaps the next tile's product.

cuBLAS computes the epilogue, GELU above all, while the matrix units wait: beside it the feed-forward's first product takes
0.89 of the time, those of 1536 by 1536 0.90, the others 0.96 to 0.97 (benchmarks/results/transformer_forward.json). Sums
are as cuBLAS's, to the last bit without GELU. Imported lazily, only where quack-kernels is there.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from wanduet.kernels.device import on_device_of
from wanduet.kernels.dit import plain

ALIGNMENT = 16  # bytes, of what the copy engine reads and writes


def linear(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """See `plain.linear`."""
    return _product(x, weight, bias, out, None, plain.linear)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """See `plain.linear_gelu`."""
    return _product(x, weight, bias, out, "gelu_tanh_approx", plain.linear_gelu)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None, activation: str | None, fallback: plain.LinearFn
) -> Tensor:
    """`activation(x @ weight.T + bias)`, in `out` if it is given; `fallback` where gradients are wanted, or the copy engine
    cannot reach what is to be read or written."""
    if torch.is_grad_enabled():
        return fallback(x, weight, bias, out)
    result = x.new_empty(*x.shape[:-1], len(weight)) if out is None else out
    if not all(map(_is_aligned, (x, weight, bias, result))):
        return fallback(x, weight, bias, out)
    multiply = _gemm()
    with on_device_of(x):
        for x_LC, result_LO in zip(x, result, strict=True):
            multiply(x_LC, weight.t(), bias=bias, activation=activation, postact_out=result_LO)
    return result


def _is_aligned(x: Tensor) -> bool:
    """Rows side by side in memory, each of which, and the first, begins where the copy engine can."""
    rows = (stride * x.itemsize % ALIGNMENT == 0 for stride in x.stride()[:-1])
    return (
        x.stride(-1) == 1 and x.shape[-1] * x.itemsize % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0 and all(rows)
    )


@cache
def _gemm() -> Callable[..., Any]:
    """quack's product with two groups of warps in turns: one multiplies while the other is in its epilogue."""
    from quack.gemm_config import GemmConfig
    from quack.gemm_interface import gemm_act

    config = GemmConfig(tile_m=128, tile_n=192, pingpong=True, cluster_m=2, cluster_n=1, is_dynamic_persistent=False)
    return partial(gemm_act, store_preact=False, config=config)
