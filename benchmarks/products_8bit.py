"""Products of the 1.3B transformer in 8 bits: each product, quantizing, the feed-forward, a whole forward; beside bf16.

    PYTHONPATH=src python benchmarks/products_8bit.py [section ...]

Sections: products quantizing feed_forward forward, and by name only miniature (on the CPU, some minutes). About a minute on an H100, most of it for compiling; `TINY=1` runs it on a
CPU. Errors are relative, against the same product in float64 (of a few thousand rows), or against the forward in bf16.
"""

import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from _common import (
    DEVICE,
    LATENT_SIZES,
    ON_GPU,
    TINY,
    Report,
    clear_memory,
    peak_memory,
    relative_error,
    timed,
    timed_in_a_row,
)
from transformer_forward import BF16, SPEC, Job, tuned_model

from wanduet.kernels.dit.plain import TORCH_KERNELS, Norm
from wanduet.kernels.dit.quantized import DTYPES, TORCH_QUANTIZED, EightBits, QuantizedKernels, QuantizedRows
from wanduet.kernels.dit.weight import Weight
from wanduet.kernels.select import kernels_for, quantized_kernels_for
from wanduet.models.dit.block import FeedForward
from wanduet.models.dit.quantizer import LAYERS_OF_A_BLOCK, QuantizedFeedForward, Quantizer
from wanduet.models.dit.workspace import Workspace
from wanduet.planning.cost import attention_flop, product_flop

ROWS = LATENT_SIZES["480p"][0] * LATENT_SIZES["480p"][1] * LATENT_SIZES["480p"][2] // 4
SHAPES = {
    "qkv": (SPEC.dim, 3 * SPEC.dim), "out": (SPEC.dim, SPEC.dim),
    "up": (SPEC.dim, SPEC.ffn_dim), "down": (SPEC.ffn_dim, SPEC.dim),
}  # fmt: skip
CHECKED = 2048  # rows whose error is computed
WIDTHS = (SPEC.num_attention_heads, SPEC.attention_head_dim, SPEC.ffn_dim)


def formats() -> Iterator[EightBits]:
    """Those that this GPU has."""
    for format in DTYPES:
        if not ON_GPU or torch.cuda.get_device_capability(DEVICE) >= {"fp8": (8, 9), "int8": (8, 0)}[format]:
            yield format


@cache
def quantized_form(format: EightBits) -> QuantizedKernels:
    return quantized_kernels_for(DEVICE, BF16, format, WIDTHS, None)


def candidates(format: EightBits) -> dict[str, Callable[..., None]]:
    """Each product, PyTorch's with fast sums too."""
    if not ON_GPU:
        return {"torch": TORCH_QUANTIZED.quantized_linear}
    from wanduet.kernels.dit.gpu_quantized import multiply_by_scaled_mm, products

    found: dict[str, Callable[..., None]] = dict(products(DTYPES[format]))
    if format == "fp8":
        found["torch._scaled_mm, fast sums"] = partial(multiply_by_scaled_mm, fast=True)
    return found


def quantized(x: torch.Tensor, format: EightBits, kernels: QuantizedKernels = TORCH_QUANTIZED) -> QuantizedRows:
    out = QuantizedRows.empty(x.shape, DTYPES[format], x.device)
    kernels.quantize(x, out)
    return out


def attempt(report: Report, section: str, measure: Callable[[], dict[str, Any]], /, **about: Any) -> None:
    """Add a row, of the problem if there is one: the others are measured all the same."""
    try:
        report.add(section, **about, **measure())
    except Exception as problem:
        traceback.print_exc()
        report.add(section, **about, problem=f"{type(problem).__name__}: {problem}"[:200])


def section_products(report: Report) -> None:
    """Each product with its bias at 32,760 rows, alone and with the quantizing of its activations."""
    for shape, (inner, outer) in SHAPES.items():
        flop = 2 * ROWS * inner * outer
        x = torch.randn(1, ROWS, inner, device=DEVICE, dtype=BF16)
        matrix = torch.randn(outer, inner, device=DEVICE, dtype=BF16) / inner**0.5
        bias = torch.randn(outer, device=DEVICE, dtype=BF16)
        out = torch.empty(1, ROWS, outer, device=DEVICE, dtype=BF16)
        exact = x[0, :CHECKED].double() @ matrix.double().t() + bias.double()

        def row(
            run: Callable[[], object], first: Callable[[], object] | None = None,
            out: torch.Tensor = out, exact: torch.Tensor = exact, flop: int = flop,
        ) -> dict[str, Any]:  # fmt: skip
            seconds = timed_in_a_row(run)
            found = {"ms": round(seconds * 1e3, 4), "tflops": round(flop / seconds / 1e12, 1)}
            if first is not None:
                found["with_quantizing_ms"] = round(timed_in_a_row(lambda: (first(), run())) * 1e3, 4)
            return found | {"error": relative_error(out[0, :CHECKED], exact)}

        for kernels in dict.fromkeys((TORCH_KERNELS, kernels_for(DEVICE, BF16))):
            exactly = partial(kernels.linear, x, Weight(matrix), bias, out)
            attempt(report, "products", partial(row, exactly), shape=shape, format="bf16", product=kernels.name)
        for format in formats():
            kernels_8 = quantized_form(format)
            x_8, weight_8 = quantized(x, format), quantized(matrix[None], format)
            weight_8 = QuantizedRows(weight_8.data[0], weight_8.scale[0])
            for name, product in candidates(format).items():
                run = partial(product, x_8, weight_8, bias, out)
                first = partial(kernels_8.quantize, x, x_8)
                attempt(report, "products", partial(row, run, first), shape=shape, format=format, product=name)


def section_quantizing(report: Report) -> None:
    """What quantizing costs where it is done: norms and GELU beside their exact forms, attention's output, a block's weights."""
    x = torch.randn(1, ROWS, SPEC.dim, device=DEVICE)
    y, hidden = (torch.randn(1, ROWS, width, device=DEVICE, dtype=BF16) for width in (SPEC.dim, SPEC.ffn_dim))
    norm = Norm(*torch.randn(2, 1, SPEC.dim, device=DEVICE), 1e-6)
    gate, exact = torch.randn(1, SPEC.dim, device=DEVICE), kernels_for(DEVICE, BF16)
    matrices = [torch.randn(1, *size, device=DEVICE, dtype=BF16) for size in SHAPES.values()]

    def measured(run: Callable[[], object]) -> dict[str, Any]:
        return {"ms": round(timed_in_a_row(run) * 1e3, 4)}

    out = torch.empty_like(y)
    cases: dict[str, Callable[[], object]] = {
        "norm after a residual": lambda: exact.residual_norm(x, y, gate, norm, out),
        "GELU alone": lambda: torch.ops.aten.gelu_(hidden, approximate="tanh"),
    }
    for name, run in cases.items():
        attempt(report, "quantizing", partial(measured, run), format="bf16", what=name)
    for format in formats():
        kernels = quantized_form(format)
        y_8, hidden_8 = quantized(y, format), quantized(hidden, format)
        weights_8 = [quantized(matrix, format) for matrix in matrices]
        cases = {
            "norm after a residual": partial(kernels.quantize_norm, x, y, gate, norm, y_8),
            "attention's output": partial(kernels.quantize, y, y_8),
            "GELU": partial(kernels.quantize_gelu, hidden, hidden_8),
            "a block's weights": lambda k=kernels, w=weights_8: [k.quantize(*p) for p in zip(matrices, w, strict=True)],
        }
        for name, run in cases.items():
            attempt(report, "quantizing", partial(measured, run), format=format, what=name)


def section_feed_forward(report: Report) -> None:
    """The feed-forward with GELU, quantizing and its weights' quantizing, by the tokens that are computed at a time."""
    x = torch.randn(1, ROWS, SPEC.dim, device=DEVICE, dtype=BF16)
    ffn = FeedForward(SPEC.dim, SPEC.ffn_dim).to(DEVICE, BF16).requires_grad_(False)
    up, down = ffn.net[0].proj, ffn.net[2]
    workspace, exact, out = Workspace.allocate_for(x, BF16), kernels_for(DEVICE, BF16), torch.empty_like(x)
    flop = 4 * ROWS * SPEC.dim * SPEC.ffn_dim

    def measured(run: Callable[[], object]) -> dict[str, Any]:
        seconds = timed_in_a_row(run)
        return {"ms": round(seconds * 1e3, 4), "tflops": round(flop / seconds / 1e12, 1)}

    def exactly(chunk: int) -> None:
        for start in range(0, ROWS, chunk):
            rows = slice(start, start + chunk)
            hidden = workspace.part(x[:, rows], SPEC.ffn_dim)
            hidden = exact.linear_gelu(x[:, rows], up.stored, up.bias, hidden)
            exact.linear(hidden, down.stored, down.bias, out[:, rows])

    def in_8_bits(quantizer: Quantizer, x_8: QuantizedRows, chunk: int | None) -> None:
        run = QuantizedFeedForward(quantizer, up, down, workspace)
        chunk = chunk or run.chunk
        for start in range(0, ROWS, chunk):
            rows = slice(start, start + chunk)
            run(x_8.tokens(rows), out[:, rows])

    chunk = workspace.chunk_tokens(SPEC.ffn_dim)
    attempt(report, "feed_forward", partial(measured, partial(exactly, chunk)), format="bf16", chunk=chunk)
    for format in formats():
        quantizer = Quantizer(format, quantized_form(format))
        x_8 = quantized(x, format)
        most = QuantizedFeedForward(quantizer, up, down, workspace).chunk
        for chunk in (most, *(size for size in (8192, 4096, 2048, 1024) if size < most)):
            run = partial(in_8_bits, quantizer, x_8, chunk)
            attempt(report, "feed_forward", partial(measured, run), format=format, chunk=chunk)


def section_forward(report: Report) -> None:
    """A whole forward: seconds, TFLOP/s, error against bf16, layers that were quantized. The first row shows how far
    other kernels in bf16 differ."""
    for size, runs in (("480p", 5), ("720p", 2)):
        model = tuned_model(size)
        best = model.runtime
        frames, rows, columns = LATENT_SIZES[size]
        tokens = frames * rows * columns // 4
        flop = product_flop(SPEC, tokens) + attention_flop(SPEC, tokens, 100)
        job = Job(model, size)
        expected = job()
        model.runtime = replace(best, kernels=TORCH_KERNELS)
        attempt(
            report,
            "forward",
            lambda j=job, e=expected: {"error": relative_error(j(), e)},
            size=size,
            format="plain bf16",
        )

        def measured(
            job: Job = job, expected: torch.Tensor = expected, flop: float = flop, runs: int = runs
        ) -> dict[str, Any]:
            error = relative_error(job(), expected)
            clear_memory()
            seconds = timed(job, runs, 1)
            quantizer = job.model.runtime.quantizer
            layers = None if quantizer is None else f"{len(quantizer.layers)} of {LAYERS_OF_A_BLOCK * SPEC.num_layers}"
            found = {"seconds": round(seconds, 4), "tflops": round(flop / seconds / 1e12, 1), "error": error}
            return found | {"quantized_layers": layers} | peak_memory()

        model.runtime = best
        attempt(report, "forward", measured, size=size, format="bf16", kernels=best.kernels.name)
        for format in formats():
            kernels = quantized_form(format)
            model.runtime = replace(best, quantizer=Quantizer(format, kernels))
            attempt(report, "forward", measured, size=size, format=format, kernels=kernels.name)


def section_miniature(report: Report) -> None:
    """Videos of the miniature on the CPU, 50 guided steps, against its own exact ones; as `step_caches.py` measures."""
    from step_caches import PROMPTS, make, psnr

    from wanduet import Engine, EngineConfig

    steps, prompts = (4, PROMPTS[:1]) if TINY else (50, PROMPTS[:3])
    with tempfile.TemporaryDirectory() as folder, Engine(EngineConfig(model="miniature", devices="cpu")) as engine:
        exact = [make(engine, folder, prompt=prompt, num_inference_steps=steps) for prompt in prompts]
        for format in ("fp8", "int8"):
            made = [make(engine, folder, prompt=p, num_inference_steps=steps, quantize=format) for p in prompts]
            errors = [relative_error(one.latents, other.latents) for one, other in zip(made, exact, strict=True)]
            ratios = [psnr(one.frames, other.frames) for one, other in zip(made, exact, strict=True)]
            row = {"latents_error_median": statistics.median(errors), "latents_error_worst": max(errors)}
            row |= {"psnr_median": statistics.median(ratios), "psnr_worst": min(ratios)}
            report.add("miniature", quantize=format, **{name: round(value, 4) for name, value in row.items()})


SECTIONS = {
    "products": section_products,
    "quantizing": section_quantizing,
    "feed_forward": section_feed_forward,
    "forward": section_forward,
    "miniature": section_miniature,
}


@torch.no_grad()
def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    chosen = sys.argv[1:] or [name for name in SECTIONS if name != "miniature"]
    report = Report("products_8bit_miniature" if chosen == ["miniature"] else "products_8bit")
    report.run(SECTIONS, chosen)
    report.print()


if __name__ == "__main__":
    main()
