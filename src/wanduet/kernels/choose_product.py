"""Chooses the product of 8-bit operands on a GPU: measures once on a machine and stores the result.

`gpu_quantized.products` lists the candidates. All round operands alike and add up in at least 32 bits, so that videos differ
by rounding only. Needs Triton.
"""

import logging
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from wanduet.kernels.check import relative
from wanduet.kernels.dit.gpu_quantized import TRITON_QUANTIZED, Product, products
from wanduet.kernels.dit.quantized import DTYPES, TORCH_QUANTIZED, EightBits, QuantizedKernels, QuantizedRows
from wanduet.kernels.measurements import Table, Timing, free_bytes, is_valid, read_table, stamped, write_table
from wanduet.kernels.timing import milliseconds

log = logging.getLogger(__name__)

CHOICES_FILE = "products.json"
TIMED_TOKENS = 4096
TIMED_ROUNDS = 5
COMPARED = 16  # of so many rows one
TOLERANCE = 1e-2  # both round once to 16 bits; fp8 sums may be rounded on the way


def choose_product(
    device: torch.device, dtype: torch.dtype, format: EightBits, widths: tuple[int, int], folder: Path | None
) -> QuantizedKernels:
    """Return Triton's kernels with the fastest product on a GPU, for a transformer that computes in `dtype`.

    `widths`: channels of the tokens, and of the feed-forward. Measurements are stored in `folder`.
    """
    offered = products(DTYPES[format])
    names = ", ".join(offered)
    key = f"{torch.cuda.get_device_name(device)}|{format}|{dtype}|{widths}|{names}"
    table = read_table(folder, key, CHOICES_FILE)
    if table is None or not is_valid(table, device):
        table = stamped(measure(offered, device, dtype, format, widths), device)
        log.info("products for %s: %s", key, {row.name: row.problem or row.milliseconds for row in table})
        write_table(folder, key, table, CHOICES_FILE)
    usable = [row for row in table if row.milliseconds is not None]
    if not usable:
        return TRITON_QUANTIZED  # whose check fails too, and says why
    best = min(usable, key=lambda row: row.milliseconds or 0.0).name
    return replace(TRITON_QUANTIZED, name=f"triton, {best}", quantized_linear=offered[best])


@torch.no_grad()
def measure(
    offered: dict[str, Product], device: torch.device, dtype: torch.dtype, format: EightBits, widths: tuple[int, int]
) -> Table:
    """Check each product on a feed-forward's first matrix; time alternately those that are right."""
    generator = torch.Generator(device).manual_seed(0)
    times: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    dropped: list[Timing] = []

    def quantized(*shape: int) -> QuantizedRows:
        drawn = torch.randn(1, *shape, device=device, generator=generator)
        out = QuantizedRows.empty((1, *shape), DTYPES[format], device)
        TORCH_QUANTIZED.quantize(drawn, out)
        return out

    x, weight = quantized(TIMED_TOKENS, widths[0]), quantized(widths[1], widths[0])
    weight = QuantizedRows(weight.data[0], weight.scale[0])
    bias = torch.randn(widths[1], device=device, generator=generator).to(dtype)
    expected, out = torch.empty(2, 1, TIMED_TOKENS, widths[1], dtype=dtype, device=device)
    TORCH_QUANTIZED.quantized_linear(x, weight, bias, expected)
    for name, product in offered.items():
        try:
            out.fill_(torch.nan)
            product(x, weight, bias, out)
            # Compared in float64, which would take a gigabyte for all rows; one that is not written is NaN.
            some = slice(None, None, COMPARED)
            errors[name] = relative(out[:, some], expected[:, some]) if out.isfinite().all() else float("nan")
        except Exception as problem:  # a compiler can raise any exception
            log.info("Product %s failed.", name, exc_info=problem)
            free = free_bytes(device) if isinstance(problem, torch.OutOfMemoryError) else None
            dropped.append(Timing(name, None, None, type(problem).__name__, free_bytes=free))
            continue
        if errors[name] <= TOLERANCE:
            times[name] = []
        else:
            dropped.append(Timing(name, None, errors[name], f"wrong, error {errors[name]:.1e}"))
    for name in TIMED_ROUNDS * list(times):
        times[name] += milliseconds(partial(offered[name], x, weight, bias, out), device)
    return (*(Timing(name, statistics.median(seen), errors[name]) for name, seen in times.items()), *dropped)
