"""How far bfloat16 is from float32, ours and diffusers', on the same weights (exact in bf16), inputs and sampler.

    PYTHONPATH=src python benchmarks/precision.py [--steps 50] [--frames 5] [section ...]

Sections: forward denoise. 480p with a few latent frames, because float32 attention is slow. The reference is our
transformer in float32 with plain kernels; a denoise has guidance, and one sampler (UniPC) serves all.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from _common import DEVICE, TINY, Report, clear_memory, relative_error
from transformer_forward import BF16, Job, diffusers_model, our_model, tuned_model

from wanduet.kernels.attention.backends import sdpa
from wanduet.kernels.dit.plain import TORCH_KERNELS
from wanduet.sampling.denoise import denoise
from wanduet.sampling.guidance import Combination, SequentialGuidance
from wanduet.sampling.samplers import Schedule, make_sampler

Predict = Callable[[torch.Tensor, float, int], torch.Tensor]  # latents, timestep, which of two prompts
SIZE, SCALE, SHIFT = "480p", 6.0, 8.0


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 in matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def reference(frames: int) -> tuple[Predict, Job]:
    """Our transformer in float32."""
    model = our_model(torch.float32, TORCH_KERNELS)
    return ours(model, frames)


def ours(model: Any, frames: int) -> tuple[Predict, Job]:
    """Our transformer as a prediction, and its inputs."""
    job = Job(model, SIZE, frames)
    return lambda x, t, prompt: model(x, torch.full((1,), t, device=DEVICE), job.texts[prompt], job.rope), job


def bf16_models(frames: int) -> Iterator[tuple[str, Predict]]:
    """Every bf16 form, one at a time on the device."""
    model = tuned_model()
    yield "wanduet bf16", ours(model, frames)[0]
    plain = {"kernels": TORCH_KERNELS, "attention": sdpa}
    model.runtime = dataclasses.replace(model.runtime, **plain)
    job_embeds = Job(model, SIZE, frames).embeds
    yield "wanduet bf16, plain forms", ours(model, frames)[0]
    del model
    clear_memory()
    if (theirs := diffusers_model()) is not None:

        def predict(x: torch.Tensor, t: float, prompt: int) -> torch.Tensor:
            # As diffusers' pipeline calls it: latents in the transformer's dtype, an integer-valued timestep.
            step = torch.full((1,), t, device=DEVICE)
            return theirs(x.to(BF16), step, job_embeds[prompt][None], return_dict=False)[0].float()

        yield "diffusers bf16", predict


def forward(report: Report, options: argparse.Namespace) -> None:
    """One forward."""
    with full_float32():
        predict, job = reference(options.frames)
        expected = predict(job.latents, 500.0, 0)
        start = job.latents
    del predict, job
    clear_memory()
    for name, predict in bf16_models(options.frames):
        got = predict(start, 500.0, 0)
        report.add("forward", impl=name, frames=options.frames, relative_error=relative_error(got, expected))


def denoised(predict: Predict, latents: torch.Tensor, steps: int) -> torch.Tensor:
    """Latents after a whole denoise with guidance."""
    sampler = make_sampler(Schedule("unipc", SHIFT, steps), 0, DEVICE)
    both = SequentialGuidance(
        lambda x, step, prompts: [predict(x, step.timestep, prompt) for prompt in prompts], 0, 1, Combination(SCALE)
    )
    return denoise(both, latents, sampler)


def whole_denoise(report: Report, options: argparse.Namespace) -> None:
    """The latents after all steps: errors add up."""
    with full_float32():
        predict, job = reference(options.frames)
        start = job.latents
        expected = denoised(predict, start, options.steps)
    del predict, job
    clear_memory()
    for name, predict in bf16_models(options.frames):
        error = relative_error(denoised(predict, start, options.steps), expected)
        report.add("denoise", impl=name, frames=options.frames, steps=options.steps, relative_error=error)


SECTIONS = {"forward": forward, "denoise": whole_denoise}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4 if TINY else 50)
    parser.add_argument("--frames", type=int, default=3 if TINY else 5)
    parser.add_argument("sections", nargs="*", default=[], choices=(*SECTIONS, []))
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    report = Report("precision")
    chosen = {name: partial(section, options=options) for name, section in SECTIONS.items()}
    report.run(chosen, options.sections or list(SECTIONS))
    report.print()


if __name__ == "__main__":
    main()
