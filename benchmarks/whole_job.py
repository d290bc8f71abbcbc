"""A whole job in the 1.3B model's true shapes (random weights) beside diffusers', in one run: seconds and peaks by phase.

    PYTHONPATH=src python benchmarks/whole_job.py [--steps 50] [--diffusers-steps 50] [--size 480p] [section ...]

A job includes a new prompt of 80 tokens, encoded by a UMT5 in its true shape: random weights on disk (11 GB, in the page
cache), the negative prompt cached after the first job. `--text none` leaves it out.

Sections: ours smallest decode forms diffusers decode_diffusers (the last is part of diffusers).
Random weights: time and memory do not depend on their values.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _common import DEVICE, ON_GPU, TINY, Report, clear_memory, peak_memory, random_vae, synchronize
from text_encoder import EVERY_UMT5
from text_encoder import write as write_encoder

from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.family.wan21 import WAN_1_3B
from wanduet.footprint.vae import decode_bytes
from wanduet.kernels.select import planned_vae_kernels
from wanduet.kernels.vae.gpu import VAE_TRITON_KERNELS
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS
from wanduet.models.text.tokenizer import Tokenizer
from wanduet.models.vae.arena_size import DecodeShape
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import Tiling
from wanduet.models.vae.stream import decode_stream
from wanduet.planning.plan import TextPlan
from wanduet.request import GenerationRequest
from wanduet.runtime.prompt_host import PromptHost
from wanduet.runtime.text_host import CachedPromptEncoder
from wanduet.sampling.denoise import StepInfo
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.hub import open_model

SIZES = {"480p": (480, 832, 81), "720p": (720, 1280, 81), "1080p": (1080, 1920, 81)}
MODEL = "random:1.3b"
WORDS = ["a", "cat", "walks", "over", "a", "frozen", "lake", "at", "sunset,", "snow", "flies", "from", "its", "paws"]
TOKENS = 80
MODES = [Tiling(o, n) for o, n in (("frame", 1), ("frame", 2), ("strip", 2), ("strip", 3), ("strip", 4), ("strip", 8))]
# Bytes that the whole job may take on a card in its smallest form (the goals of the memory plan).
SMALLEST = {"480p": int(2.5 * 2**30), "720p": 4 * 2**30, "1080p": 8 * 2**30}


class Text:
    """A model folder with only a text encoder and a tokenizer, for an engine whose other models are random."""

    def __init__(self, path: Path) -> None:
        spec = WAN_1_3B.text_encoder
        if TINY:  # the transformer's text width stays
            spec = replace(spec, vocab_size=700, d_ff=64, num_layers=2)
        miniature = open_model("miniature").path
        for name in ("transformer", "vae"):
            (path / name).mkdir(parents=True)
            (path / name / "config.json").write_text("{}")  # as published
        shutil.copytree(miniature / "tokenizer", path / "tokenizer")
        (path / "text_encoder").mkdir()
        (path / "text_encoder" / "config.json").write_text(json.dumps(asdict(spec) | EVERY_UMT5))
        write_encoder(path / "text_encoder", torch.bfloat16, spec)
        self.folder = ModelFolder(path, "random text encoder")
        self._tokenizer = Tokenizer(self.folder.tokenizer)
        self._made = 0

    def prompt(self) -> str:
        """A prompt of 80 tokens that no job had before."""
        self._made += 1
        words = [str(self._made)]
        while len(self._tokenizer(" ".join([*words, WORDS[len(words) % len(WORDS)]])).ids) <= TOKENS:
            words.append(WORDS[len(words) % len(WORDS)])
        return " ".join(words)

    def install(self, host: PromptHost, cache: Path) -> None:
        """Let a host of random models encode with it."""

        def make(plan: TextPlan) -> CachedPromptEncoder:
            use = partial(host._use, plan.device)
            return CachedPromptEncoder(self.folder, plan.dtype, plan.residency, cache, plan.device, use)

        host._make = make  # type: ignore[method-assign]


def ours(report: Report, options: argparse.Namespace) -> None:
    """Prompt to MP4 as it comes: the first job of an engine, and one when models and kernels are there."""
    jobs(report, "ours", options, None, {"first": 2, "whole": options.steps})


def smallest(report: Report, options: argparse.Namespace) -> None:
    """The same in the least memory: on a card that is made small, the allocator itself refuses more."""
    if ON_GPU:
        jobs(report, "smallest", options, SMALLEST[options.size], {"first": 2, "again": min(4, options.steps)})
        torch.cuda.set_per_process_memory_fraction(1.0)


def jobs(report: Report, section: str, options: argparse.Namespace, limit: int | None, runs: dict[str, int]) -> None:
    """Jobs of so many steps each, one after the other on one engine."""
    height, width, frames = SIZES[options.size]
    peaks: dict[str, dict[str, float]] = {}

    def on_step(info: StepInfo) -> None:
        if info.step == info.num_steps - 1:
            synchronize()
            peaks["denoise"] = peak_memory()
            if ON_GPU:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()

    data = Path(tempfile.mkdtemp())
    clear_memory()
    config = EngineConfig(model=options.model, data_dir=data, vram_limit=limit)
    text = None if options.text == "none" else options.made_text
    if text is not None:
        where, hold = ("cpu", "streamed") if limit else (options.text, options.text_hold)
        config = replace(config, text_encoder_device=where, text_encoder_hold=hold)
    with Engine(config) as engine:
        if text is not None:
            text.install(engine.models.prompts, data / "embeddings")
        for name, steps in runs.items():
            clear_memory()
            request = GenerationRequest(
                prompt=" ".join(WORDS) if text is None else text.prompt(), height=height, width=width, num_frames=frames, num_inference_steps=steps,
                guidance_scale=6.0, seed=1,
            )  # fmt: skip
            job = engine.submit(request, OutputOptions(data / f"{name}.mp4"), on_step)
            result = job.result()
            peaks["decode"] = peak_memory()
            predicted = {p: round(b / 2**30, 3) for d in job.plan.prediction.devices for p, b in d.phases.items()}
            timings = {k: round(v, 3) for k, v in result.timings.items()}
            step_s = round(result.timings["denoise_s"] / steps, 4)
            report.add(section, run=name, size=options.size, steps=steps, step_s=step_s, **timings,
                       attention=job.attention, text=options.text if text is None else
                       f"{TOKENS} tokens, {job.plan.text.device} {job.plan.text.residency} {job.plan.text.dtype}")  # fmt: skip
            report.add(f"{section} memory", run=name, limit_gib=limit and limit / 2**30, predicted=predicted, **peaks,
                       host_gib=round(result.peak_memory_bytes["cpu"] / 2**30, 2), rungs=job.notes,
                       resident_blocks=job.plan.transformer.resident_blocks, decode_mode=asdict(job.plan.vae.tiling),
                       keep_both=job.plan.both_resident)  # fmt: skip


@torch.no_grad()
def decode(report: Report, options: argparse.Namespace) -> None:
    """Each way to cut a decode: seconds, and the peak beside its prediction; weights included."""
    spec = WAN_1_3B.vae
    height, width, frames = SIZES[options.size]
    height = -(-height // 16) * 16
    latents = torch.randn(WAN_1_3B.latent_shape(height, width, frames))
    for dtype in (torch.float32, torch.bfloat16):
        vae = None  # before there is another
        clear_memory()
        vae = random_vae(spec, dtype)
        weights = sum(p.nbytes for part in vae.decoding_parts for p in part.parameters())
        for mode in MODES:
            kernels, kind = planned_vae_kernels(str(DEVICE)), str(dtype)[6:]
            predicted = weights + decode_bytes(DecodeShape(spec, height, width, frames, mode, dtype, kernels))
            for _ in range(2):
                clear_memory()
                began = time.perf_counter()
                count = sum(len(chunk) for chunk in decode_stream(vae, latents, mode))
                synchronize()
                seconds = time.perf_counter() - began
            report.add("decode", size=options.size, dtype=kind, mode=f"{mode.order}-{mode.num_tiles}",
                       seconds=round(seconds, 3), frames=count, predicted_gib=round(predicted / 2**30, 3),
                       **peak_memory())  # fmt: skip


def forms(report: Report, options: argparse.Namespace) -> None:
    """Ways to run the same decode: memory layout, kernels between convolutions, cuDNN's search, precision."""
    height, width, frames = SIZES[options.size]
    latents = torch.randn(WAN_1_3B.latent_shape(height, width, frames))
    sets = {
        "contiguous": (VAE_TORCH_KERNELS,),
        "channels_last": (VAE_TORCH_KERNELS, VAE_TRITON_KERNELS),
    }
    if not ON_GPU:
        sets = dict.fromkeys(sets, (VAE_TORCH_KERNELS,))
    for dtype in (torch.float32, torch.bfloat16):
        vae = WanVAE(WAN_1_3B.vae).to(DEVICE, dtype).eval().requires_grad_(False)
        for layout, kernel_sets in sets.items():
            if layout == "channels_last":
                vae.channels_last()
            for kernels, search in product(kernel_sets, (False, True)):
                if search and kernels is VAE_TRITON_KERNELS:
                    continue
                vae.use_kernels(kernels)
                torch.backends.cudnn.benchmark = search
                for _ in range(2):
                    clear_memory()
                    began = time.perf_counter()
                    for _ in decode_stream(vae, latents, Tiling("frame", options.strips)):
                        pass
                    synchronize()
                    seconds = time.perf_counter() - began
                report.add("forms", size=options.size, dtype=str(dtype)[6:], layout=layout, kernels=kernels.name,
                           search=search, strips=options.strips, seconds=round(seconds, 3), **peak_memory())  # fmt: skip
    torch.backends.cudnn.benchmark = False


def diffusers_models(device: torch.device, layers: int = 30) -> tuple[Any, Any]:
    """Transformer as `from_pretrained(torch_dtype=bfloat16)` leaves it, and VAE in float32; random weights."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        transformer = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=layers, text_dim=4096)
    torch.set_default_dtype(default)
    for name, parameter in transformer.named_parameters():
        if any(part in name for part in transformer._keep_in_fp32_modules):
            parameter.data = parameter.data.float()
    with torch.device(device):
        vae = AutoencoderKLWan().eval()
    return transformer.eval().requires_grad_(False), vae.requires_grad_(False)


def diffusers_denoise(transformer: Any, size: tuple[int, int, int], steps: int) -> float:
    """Seconds of a denoise with guidance, after one forward to warm up."""
    from diffusers import UniPCMultistepScheduler

    device = transformer.device
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
    scheduler.set_timesteps(steps, device=device)
    latents = torch.randn(1, *WAN_1_3B.latent_shape(*size), device=device)
    texts = [torch.randn(1, 512, 4096, device=device, dtype=torch.bfloat16) for _ in range(2)]

    def forward(t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return transformer(latents.bfloat16(), t.expand(1), text, return_dict=False)[0]

    forward(scheduler.timesteps[0], texts[0])
    synchronize(device)
    clear_memory()
    began = time.perf_counter()
    for t in scheduler.timesteps:
        conditional, unconditional = (forward(t, text) for text in texts)
        velocity = unconditional + 6.0 * (conditional - unconditional)
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    synchronize(device)
    return time.perf_counter() - began


@torch.no_grad()
def diffusers(report: Report, options: argparse.Namespace) -> None:
    size, steps = SIZES[options.size], min(options.steps, options.diffusers_steps)
    transformer, vae = diffusers_models(DEVICE, layers=1 if TINY else 30)
    seconds = diffusers_denoise(transformer, size, steps)
    report.add("diffusers", phase="denoise", size=options.size, steps=steps, seconds=round(seconds, 3),
               step_s=round(seconds / steps, 4), **peak_memory())  # fmt: skip
    del transformer
    diffusers_decodes(report, options.size, vae)


@torch.no_grad()
def diffusers_decodes(report: Report, name: str, vae: Any) -> None:
    size = SIZES[name]
    z = torch.randn(1, *WAN_1_3B.latent_shape(*size), device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        vae.to(dtype)
        for _ in range(2):
            clear_memory()
            began = time.perf_counter()
            video = vae.decode(z.to(dtype), return_dict=False)[0]
            pixels = (video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).float().cpu().numpy()
            (pixels * 255).round().astype("uint8")
            seconds = time.perf_counter() - began
            del video, pixels
        report.add("diffusers", phase=f"decode {str(dtype)[6:]}", size=name, seconds=round(seconds, 3),
                   **peak_memory())  # fmt: skip


def decode_diffusers(report: Report, options: argparse.Namespace) -> None:
    diffusers_decodes(report, options.size, diffusers_models(DEVICE, layers=1)[1])


SECTIONS = {
    "ours": ours, "smallest": smallest, "decode": decode, "forms": forms, "diffusers": diffusers, "decode_diffusers": decode_diffusers,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--diffusers-steps", type=int, default=50, help="fewer save time: all steps take the same")
    parser.add_argument("--size", choices=tuple(SIZES), default="480p")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--strips", type=int, default=1)
    parser.add_argument("--text", choices=("none", "cpu", "cuda"), default="cuda" if ON_GPU else "cpu")
    parser.add_argument("--text-hold", choices=("resident", "streamed"), default="resident")
    parser.add_argument("sections", nargs="*", default=[], choices=(*SECTIONS, []))
    options = parser.parse_args()
    if TINY:
        SIZES[options.size] = (64, 64, 5)
        options.steps = min(options.steps, 2)
    os.environ.setdefault("WANDUET_DATA_DIR", tempfile.mkdtemp())
    report = Report(f"whole_job_{options.size}")
    chosen = {name: lambda r, f=SECTIONS[name]: f(r, options) for name in SECTIONS}
    sections = options.sections or [name for name in SECTIONS if name != "decode_diffusers"]
    with tempfile.TemporaryDirectory() as folder:
        if options.text != "none" and {"ours", "smallest"} & set(sections):
            began = time.perf_counter()
            options.made_text = Text(Path(folder) / "text")
            report.add("text encoder", written_s=round(time.perf_counter() - began, 1))
        report.run(chosen, sections)
    report.print()


if __name__ == "__main__":
    main()
