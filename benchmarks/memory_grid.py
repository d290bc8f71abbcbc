"""Predicted against measured peak memory, 1.3B in its true shapes: every size, length, and way to run.

    PYTHONPATH=src python benchmarks/memory_grid.py [section ...]

Sections: denoise decode limited. The last makes whole videos on cards of 24 and 4 GiB, as which this one is made to
behave. Measured is what the allocator reserved (`torch.cuda.max_memory_reserved`), outside the
CUDA context. `ratio` is predicted / measured: never below 1, at most 1.08, is the promise.
"""

import sys
import tempfile
from pathlib import Path

import torch
from _common import DEVICE, ON_GPU, TINY, Report, clear_memory, random_vae, synchronize, timed

from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.offload import allocate_streamed, stream_blocks
from wanduet.accelerate.packing import allocate_packed
from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.footprint.phases import DenoiseShape
from wanduet.kernels.attention.choose import Shape, choose_attention
from wanduet.kernels.select import kernels_for
from wanduet.models.dit.block import Runtime
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.rows import Tiling
from wanduet.models.vae.stream import decode_stream
from wanduet.request import GenerationRequest
from wanduet.runtime.models import Models

SIZES = {"480p": (480, 832), "720p": (720, 1280), "1080p": (1088, 1920), "576x1024": (576, 1024)}
FRAMES = (17, 81, 161)
RESIDENT = (30, 10, 0)
MODES = [
    Tiling(o, n)
    for o, n in (("frame", 1), ("frame", 2), ("frame", 4), ("strip", 2), ("strip", 4), ("strip", 8), ("strip", 16))
]
if TINY:
    SIZES, FRAMES, RESIDENT, MODES = {"480p": (32, 48)}, (5,), (30,), MODES[:1]
TEXTS = (81, 127)  # of a prompt, and of the default negative prompt
# Height, width, frames, GiB of the card, steps.
LIMITED = ((480, 832, 81, 4, 4), (720, 1280, 161, 24, 2), (1080, 1920, 81, 24, 2))
if TINY:
    LIMITED = ((32, 48, 5, 4, 2),)
MODELS = Models(EngineConfig(model="random:1.3b"))
GIB = 2**30


def reserved() -> float:
    synchronize()
    return torch.cuda.max_memory_reserved() / GIB if ON_GPU else 0.0


def row(report: Report, section: str, predicted: int, **facts: object) -> None:
    measured = reserved()
    ratio = predicted / GIB / measured if measured else 0.0
    report.add(
        section,
        **facts,
        predicted_gib=round(predicted / GIB, 3),
        measured_gib=round(measured, 3),
        ratio=round(ratio, 3),
    )


def denoise(report: Report) -> None:
    for resident in RESIDENT:
        for name, (height, width) in SIZES.items():
            for frames in FRAMES:
                usual = name == "480p" or (frames <= 81 and resident in (0, RESIDENT[0]))
                slow = (name == "1080p" and resident != RESIDENT[0]) or (frames != 81 and resident == 10)
                if not usual or slow:
                    continue  # what there is to see, without the minutes these take
                clear_memory()
                seconds = one_step((height, width, frames), resident)
                shape = DenoiseShape((height, width, frames), "bfloat16", TEXTS)
                memory = MODELS.memory.transformer(shape, resident, str(DEVICE))
                row(
                    report,
                    "denoise",
                    memory.peak,
                    size=name,
                    frames=frames,
                    resident=resident,
                    step_s=round(seconds, 3),
                )


@torch.no_grad()
def one_step(size: tuple[int, int, int], resident: int) -> float:
    """Seconds of one step with guidance (the first, of a cold model), with all that a denoise holds."""
    spec = MODELS.spec
    with torch.device("meta"):
        model = WanTransformer(spec.transformer).eval().requires_grad_(False)
    if resident == spec.transformer.num_layers:
        allocate_packed(model, DEVICE, torch.bfloat16)
    else:
        allocate_streamed(model, DEVICE, torch.bfloat16, resident, HostMemory("pinned"))
        stream_blocks(model, DEVICE, resident)
    shape, tokens = (1, *spec.latent_shape(*size)), spec.num_tokens(*size)
    heads = (spec.transformer.num_attention_heads, spec.transformer.attention_head_dim)
    cache = Path(".cache") if ON_GPU else None
    choice = choose_attention(DEVICE, Shape(tokens, tokens, *heads), torch.bfloat16, cache_folder=cache)
    model.runtime = Runtime(kernels_for(DEVICE, torch.bfloat16), choice.fn)
    clear_memory()
    text = torch.zeros(1, spec.text_len, spec.transformer.text_dim, device=DEVICE)
    contexts = []
    for positions in TEXTS:
        text[:, : positions - 1] = 1
        contexts.append(model.prepare_text(text))
    rope = model.prepare_rope(shape, DEVICE)
    history = [torch.zeros(shape, device=DEVICE) for _ in range(6)]  # what UniPC remembers
    step = torch.full((1,), 500.0, device=DEVICE)
    return timed(lambda: model.forward_cfg(history[0], step, contexts, rope), runs=1, warmup=0)


def decode(report: Report) -> None:
    spec = MODELS.spec
    for dtype in ("float32", "bfloat16"):
        vae = None  # before there is another
        clear_memory()
        vae = random_vae(spec.vae, getattr(torch, dtype))
        weights = MODELS.memory.vae_weights(dtype)
        for name, (height, width) in SIZES.items():
            for mode in MODES:
                # A few latent frames show the peak of frame-major; strip-major keeps the middle of all.
                for frames in FRAMES[:2] if mode.order == "strip" and name == "480p" else FRAMES[:1]:
                    latents = torch.randn(spec.latent_shape(height, width, frames))
                    predicted = weights + MODELS.memory.decode((height, width, frames), mode, dtype, str(DEVICE))
                    if predicted > 70 * GIB:
                        continue
                    clear_memory()
                    seconds = timed(lambda: [None for _ in decode_stream(vae, latents, mode)], runs=1, warmup=0)
                    row(report, "decode", predicted, dtype=dtype, size=name, frames=frames,
                        mode=f"{mode.order}-{mode.num_tiles}", seconds=round(seconds, 3))  # fmt: skip


def limited(report: Report) -> None:
    """Whole jobs, with guidance, on a card that is made small: the allocator itself refuses more."""
    folder = Path(tempfile.mkdtemp())
    for height, width, frames, gib, steps in LIMITED:
        clear_memory()
        config = EngineConfig(model="random:1.3b" if ON_GPU else "miniature", data_dir=folder, vram_limit=gib * GIB)
        request = GenerationRequest(
            prompt="a cat on a frozen lake", height=height, width=width, num_frames=frames, num_inference_steps=steps,
            guidance_scale=6.0, seed=1,
        )  # fmt: skip
        with Engine(config) as engine:
            job = engine.submit(request, OutputOptions(folder / "limited.mp4"))
            result = job.result()
            found = {name: round(size / GIB, 3) for name, size in result.peak_memory_bytes.items()}
            predicted = {d.name: round(d.peak / GIB, 3) for d in job.plan.prediction.devices}
            report.add(
                "limited", size=f"{width}x{height}x{frames}", card_gib=gib, steps=steps, predicted=predicted, measured=found,
                resident_blocks=job.plan.transformer.resident_blocks, decode=f"{job.plan.vae.tiling.order}-{job.plan.vae.tiling.num_tiles}",
                rungs=job.notes, **{name: round(value, 2) for name, value in result.timings.items()},
            )  # fmt: skip
    if ON_GPU:
        torch.cuda.set_per_process_memory_fraction(1.0)


def main() -> None:
    report = Report("memory_grid")
    sections = {"denoise": denoise, "decode": decode, "limited": limited}
    report.run(sections, sys.argv[1:] or list(sections))
    report.print()


if __name__ == "__main__":
    main()
