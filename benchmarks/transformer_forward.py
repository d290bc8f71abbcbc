"""One forward of the 1.3B transformer in its true shapes, random weights: time, peak memory, where it goes.

    PYTHONPATH=src python benchmarks/transformer_forward.py [section ...]

Sections: kernels attention forward variants profile stream diffusers compiled.
Compute does not depend on the values of the weights. Peaks include the weights and both text contexts.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
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
    synchronize,
    timed,
)

from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.offload import allocate_streamed, stream_blocks
from wanduet.accelerate.packing import allocate_packed
from wanduet.engine.roofline import measure_peaks
from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.attention.backends import sdpa
from wanduet.kernels.attention.choose import Choice, Shape, choose_attention
from wanduet.kernels.dit.plain import TORCH_KERNELS, Kernels, Norm, QKNorm, text_attention
from wanduet.kernels.dit.rope import Rope
from wanduet.kernels.dit.weight import Weight
from wanduet.kernels.select import kernels_for
from wanduet.models.dit.model import TextContext, WanTransformer
from wanduet.planning.cost import attention_flop, product_flop

BF16 = torch.bfloat16
SPEC = WAN_1_3B.transformer
TEXT_LEN, TRUE_TOKENS = 512, (80, 126)  # of a prompt, and of the default negative prompt
if TINY:
    SPEC = replace(
        WAN_1_3B.transformer, num_attention_heads=2, attention_head_dim=24, ffn_dim=96, num_layers=3, text_dim=32
    )
    TEXT_LEN, TRUE_TOKENS = 9, (3, 5)
ROWS_OF_PROFILE = 16


def draw_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Values of a plausible size, exact in bf16, so that every model of the same spec gets the same ones."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, device=DEVICE)
        if name.endswith("scale_shift_table"):
            noise /= SPEC.dim**0.5
        elif "norm" in name and name.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif name.endswith("bias"):
            noise *= 0.02
        else:
            noise /= parameter[0].numel() ** 0.5
        parameter.data.copy_(noise.to(BF16))


def our_model(dtype: torch.dtype = BF16, kernels: Kernels | None = None) -> WanTransformer:
    with torch.device("meta"):
        model = WanTransformer(SPEC).eval().requires_grad_(False)
    allocate_packed(model, DEVICE, dtype)
    draw_weights(model)
    kernels = kernels or kernels_for(DEVICE, dtype)
    model.runtime = dataclasses.replace(model.runtime, kernels=kernels)
    return model


def choices(size: str) -> Choice:
    frames, rows, columns = LATENT_SIZES[size]
    tokens = frames * rows * columns // 4
    shape = Shape(tokens, tokens, SPEC.num_attention_heads, SPEC.attention_head_dim)
    return choose_attention(DEVICE, shape, BF16, cache_folder=Path(".cache") if ON_GPU else None)


def tuned_model(size: str = "480p") -> WanTransformer:
    model = our_model()
    model.runtime = dataclasses.replace(model.runtime, attention=choices(size).fn)
    return model


def random_embeds(generator: torch.Generator) -> torch.Tensor:
    """`[2, text_len, text_dim]`: of a prompt and a negative prompt of usual length, padded with zeros."""
    embeds = torch.randn(2, TEXT_LEN, SPEC.text_dim, generator=generator).to(BF16)
    for prompt, length in zip(embeds, TRUE_TOKENS, strict=True):
        prompt[length:] = 0
    return embeds.to(DEVICE)


class Job:
    """Inputs of a forward at a size, with everything prepared that a denoise prepares once."""

    def __init__(self, model: WanTransformer, size: str, frames: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        shape = LATENT_SIZES[size] if frames is None else (frames, *LATENT_SIZES[size][1:])
        self.model = model
        self.latents = torch.randn(1, SPEC.in_channels, *shape, generator=generator).to(BF16).float().to(DEVICE)
        self.embeds = random_embeds(generator)
        self.timestep = torch.tensor([500], device=DEVICE)
        self.texts: list[TextContext] = [model.prepare_text(e[None]) for e in self.embeds]
        self.rope: Rope = model.prepare_rope(self.latents.shape, DEVICE)

    def __call__(self) -> torch.Tensor:
        return self.model(self.latents, self.timestep, self.texts[0], self.rope)


def measure(model: WanTransformer, size: str, runs: int = 3, warmup: int = 1) -> dict[str, Any]:
    clear_memory()
    job = Job(model, size)
    seconds = timed(job, runs, warmup)
    return {"size": size, "seconds": round(seconds, 4), **peak_memory()}


def section_kernels(report: Report) -> None:
    """Each fused operation and each product at the 480p shapes; bandwidth counts each tensor read and written once."""
    frames, rows, columns = LATENT_SIZES["480p"]
    length, width, ffn = frames * rows * columns // 4, SPEC.dim, SPEC.ffn_dim
    x = torch.randn(1, length, width, device=DEVICE)
    y, qkv = (torch.randn(1, length, n * width, device=DEVICE, dtype=BF16) for n in (1, 3))
    row = torch.randn(1, width, device=DEVICE)
    half = SPEC.attention_head_dim // 2
    rope = Rope(*(torch.randn(length, half, device=DEVICE) for _ in range(2)))
    q, k, _ = qkv.chunk(3, dim=-1)
    heads, unit = SPEC.num_attention_heads, y.nbytes
    norm, qk_norm = Norm(row, row, 1e-6), QKNorm(1e-6, heads, rope)
    text = [torch.randn(1, TRUE_TOKENS[0] + 1, heads, 2 * half, device=DEVICE, dtype=BF16) for _ in range(2)]
    for kernels in dict.fromkeys((TORCH_KERNELS, kernels_for(DEVICE, BF16))):
        cases: dict[str, tuple[int, Callable[[], object]]] = {
            "norm": (3, lambda k_=kernels: k_.norm(x, norm, BF16)),
            "residual_norm": (6, lambda k_=kernels: k_.residual_norm(x, y, row, norm)),
            "qk_norm_rope_pair": (4, lambda k_=kernels: k_.qk_norm_rope_pair(q, k, row[0], row[0], qk_norm)),
            "text_attention": (
                2,
                lambda k_=kernels: k_.text_attention(y, row[0], 1e-6, *text, TEXT_LEN - TRUE_TOKENS[0]),
            ),
        }
        for name, (units, fn) in cases.items():
            ms = timed(fn, 10, 3) * 1e3
            report.add("kernels", op=name, form=kernels.name, ms=round(ms, 4), tb_per_s=units * unit / ms / 1e9)
        up = torch.randn(ffn, width, device=DEVICE, dtype=BF16) / width**0.5
        bias = torch.randn(ffn, device=DEVICE, dtype=BF16)
        ms = timed(partial(kernels.linear_gelu, y, Weight(up), bias), 10, 3) * 1e3
        report.add(
            "kernels", op="linear_gelu", form=kernels.name, ms=round(ms, 4), tflops=2 * length * width * ffn / ms / 1e9
        )
    for name, inner, outer in (("qkv", width, 3 * width), ("out", width, width), ("down", ffn, width)):
        a = torch.randn(length, inner, device=DEVICE, dtype=BF16)
        w = torch.randn(outer, inner, device=DEVICE, dtype=BF16) / inner**0.5
        b = torch.randn(outer, device=DEVICE, dtype=BF16)
        for kernels in dict.fromkeys((TORCH_KERNELS, kernels_for(DEVICE, BF16))):
            ms = timed(partial(kernels.linear, a[None], Weight(w), b, None), 10, 3) * 1e3
            tflops = 2 * length * inner * outer / ms / 1e9
            report.add("kernels", op=f"product {name}", form=kernels.name, ms=round(ms, 4), tflops=tflops)


def section_attention(report: Report) -> None:
    """Every back end that works here, at the shape of self-attention."""
    choice = choices("480p")
    for row in choice.table:
        report.add("attention", chosen=choice.name, **dataclasses.asdict(row))


def section_forward(report: Report) -> None:
    """The model as it is used, at each size."""
    model = tuned_model()
    for size, runs in (("480p", 5), ("720p", 3), ("1080p", 1)):
        report.add("forward", impl="wanduet", **measure(model, size, runs, warmup=0 if size == "1080p" else 1))


def section_variants(report: Report) -> None:
    """What each part brings, at 480p: one thing taken away at a time."""
    model = tuned_model()
    best = model.runtime
    changes: dict[str, dict[str, Any]] = {
        "all": {},
        "plain kernels": {"kernels": TORCH_KERNELS},
        "SDPA attention": {"attention": sdpa},
        "plain attention to the text": {"kernels": dataclasses.replace(best.kernels, text_attention=text_attention)},
    }
    for name, change in changes.items():
        model.runtime = dataclasses.replace(best, **change)
        report.add("variants", variant=name, **measure(model, "480p"))
    model.runtime = best
    for block in model.blocks:
        block.attn1.to_k.weight.data = block.attn1.to_k.weight.data.clone()
    report.add("variants", variant="q, k, v as three products", **measure(model, "480p"))


def section_profile(report: Report) -> None:
    """Where one forward goes: kernels by kind, beside the least that their operations take at the rate of a large matrix
    product on this device, and the longest ones."""
    peak = measure_peaks(str(DEVICE), "bfloat16").flop
    report.add("peak", of="a large product in bfloat16", tflops=round(peak / 1e12, 1))
    for size in LATENT_SIZES:
        kind_ms, rows = profiled(Job(tuned_model(size), size))
        tokens = math.prod(n // p for n, p in zip(LATENT_SIZES[size], SPEC.patch_size, strict=True))
        flop = {
            "attention": attention_flop(SPEC, tokens, TRUE_TOKENS[0]), "matrix products": product_flop(SPEC, tokens),
        }  # fmt: skip
        for kind, ms in sorted(kind_ms.items(), key=lambda item: -item[1]):
            row = {"size": size, "kind": kind, "ms": round(ms, 2)}
            if kind in flop:
                floor = flop[kind] / peak * 1e3
                row |= {
                    "tflop": round(flop[kind] / 1e12, 3),
                    "floor_ms": round(floor, 2),
                    "of_floor": round(floor / ms, 3),
                }
            report.add("profile", **row)
        for row in sorted(rows, key=lambda row: -row["ms"])[:ROWS_OF_PROFILE]:
            report.add("longest kernels", size=size, **row)


def profiled(job: "Job") -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Milliseconds by kind of kernel, and each kernel's, of one forward after one to warm up."""
    job()
    synchronize()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        job()
        synchronize()
    kind_ms: dict[str, float] = {}
    rows = []
    for event in profile.key_averages():
        ms = (event.self_device_time_total if ON_GPU else event.self_cpu_time_total) / 1e3
        if ms <= 0 or (ON_GPU and event.device_type != torch.autograd.DeviceType.CUDA):
            continue
        kind = kind_of(event.key)
        kind_ms[kind] = kind_ms.get(kind, 0.0) + ms
        rows.append({"kind": kind, "ms": round(ms, 3), "calls": event.count, "kernel": event.key[:90]})
    return kind_ms, rows


def kind_of(kernel: str) -> str:
    """The kind of work a kernel does, by its name."""
    name = kernel.lower()
    if any(part in name for part in ("flash", "fmha", "sdpa", "attention")):
        return "attention"
    if any(part in name for part in ("gemm", "nvjet", "cutlass", "cublas", "xmma", "addmm", "::mm")):
        return "matrix products"
    if "memcpy" in name or "memset" in name:
        return "copies"
    return "element-wise"


def section_stream(report: Report) -> None:
    """Blocks streamed from page-locked host memory: bit-equal to resident, and how much slower."""
    model = tuned_model()
    expected = Job(model, "480p")()
    resident = measure(model, "480p")
    memory = HostMemory("pinned")
    layers = SPEC.num_layers
    for kept in (layers, layers * 2 // 3, layers // 3, 0):
        stream = stream_blocks(model, DEVICE, kept, memory)
        equal = torch.equal(Job(model, "480p")(), expected)
        row = measure(model, "480p") | {"bit_equal": equal}
        slower = row["seconds"] / resident["seconds"] - 1
        report.add("stream", resident_blocks=kept, **row, slower_percent=round(100 * slower, 2))
    stream.close()
    mapped_streaming(report, model, expected, resident["seconds"])


def mapped_streaming(report: Report, model: WanTransformer, expected: torch.Tensor, seconds: float) -> None:
    with torch.device("meta"):
        fresh = WanTransformer(SPEC).eval().requires_grad_(False)
    memory = HostMemory("mapped")
    allocate_streamed(fresh, DEVICE, BF16, 0, memory)
    for name, parameter in fresh.named_parameters():
        parameter.data.copy_(model.get_parameter(name).data)
    fresh.runtime = model.runtime
    stream = stream_blocks(fresh, DEVICE, 0, memory)
    row = measure(fresh, "480p") | {"bit_equal": torch.equal(Job(fresh, "480p")(), expected)}
    report.add(
        "stream", resident_blocks=0, hold="mapped", **row, slower_percent=round(100 * (row["seconds"] / seconds - 1), 2)
    )
    stream.close()


def diffusers_model() -> Any:
    """As `from_pretrained(torch_dtype=bfloat16)` leaves it; None where diffusers is not installed."""
    try:
        from diffusers import WanTransformer3DModel
    except ImportError as problem:
        print(f"# no diffusers: {problem}")
        return None
    config = dataclasses.asdict(SPEC)
    config.update(cross_attn_norm=True, qk_norm="rms_norm_across_heads")
    with DEVICE:
        model = WanTransformer3DModel(**config)
    for name, parameter in model.named_parameters():
        keep = any(part in name for part in model._keep_in_fp32_modules)
        parameter.data = parameter.data.to(torch.float32 if keep else BF16)
    draw_weights(model)
    return model.eval().requires_grad_(False)


def diffusers_call(model: Any, size: str, frames: int | None = None) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = LATENT_SIZES[size] if frames is None else (frames, *LATENT_SIZES[size][1:])
    latents = torch.randn(1, SPEC.in_channels, *shape, generator=generator).to(BF16).to(DEVICE)
    embeds = random_embeds(generator)[:1]
    timestep = torch.tensor([500], device=DEVICE)
    return lambda: model(hidden_states=latents, timestep=timestep, encoder_hidden_states=embeds, return_dict=False)[0]


def section_diffusers(report: Report) -> None:
    """diffusers in the same process, eager."""
    if (model := diffusers_model()) is None:
        return
    for size, runs, warmup in (("480p", 3, 1), ("720p", 1, 1), ("1080p", 1, 0)):
        clear_memory()
        seconds = timed(diffusers_call(model, size), runs, warmup)
        report.add("forward", impl="diffusers eager", size=size, seconds=round(seconds, 4), **peak_memory())


def section_compiled(report: Report) -> None:
    """diffusers compiled by its own way for many alike blocks, at 480p."""
    if (model := diffusers_model()) is None:
        return
    model.compile_repeated_blocks()
    call = diffusers_call(model, "480p")
    first = timed(call, 1, 0)
    clear_memory()
    seconds = timed(call, 3, 1)
    row = {"size": "480p", "seconds": round(seconds, 4), **peak_memory(), "first_call_s": round(first, 1)}
    report.add("forward", impl="diffusers compiled", **row)


SECTIONS = {
    "kernels": section_kernels,
    "attention": section_attention,
    "forward": section_forward,
    "variants": section_variants,
    "profile": section_profile,
    "stream": section_stream,
    "diffusers": section_diffusers,
    "compiled": section_compiled,
}


@torch.no_grad()
def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    report = Report("transformer_forward")
    report.run(SECTIONS, sys.argv[1:] or list(SECTIONS))
    report.print()


if __name__ == "__main__":
    main()
