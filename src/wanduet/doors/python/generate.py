"""Runs a pipeline's call, from its checked arguments to the frames."""

from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor

from wanduet.doors.python.arguments import CallArguments, initial_latents, rounded_frames
from wanduet.doors.python.base import PipelineBase
from wanduet.doors.python.loop import PipelineLoop
from wanduet.doors.python.parts import PipelineParts
from wanduet.doors.python.schedule import Schedule
from wanduet.doors.python.text import encode, repeated
from wanduet.doors.python.videos import as_output, decode_videos, encode_videos
from wanduet.planning.plan import Plan
from wanduet.runtime.context import NO_JOB
from wanduet.runtime.leases import VAE


def generate(
    pipe: PipelineBase, call: CallArguments, schedule: Schedule, num_frames: int, videos: Tensor | None = None
) -> WanPipelineOutput | tuple[Any]:
    """Generate the videos of a call; `videos` `[V, 3, num_frames, H, W]`, pixels in -1..1, are what they begin from.

    Raises ValueError for a size, an approximation or LoRAs that are not supported, DoesNotFitError, OutOfMemoryError, PipelineBusyError.
    """
    parts, height, width = pipe._parts, call.height, call.width
    with parts.at_work():
        parts.refresh()
        spec = parts.spec
        call.settle_guidance(spec)
        if call.latents is not None:  # their shape sets the size, as in diffusers
            height, width = (side * spec.vae.spatial_stride for side in call.latents.shape[-2:])
            num_frames = (call.latents.shape[-3] - 1) * spec.vae.temporal_stride + 1
        num_frames = rounded_frames(num_frames, spec.vae.temporal_stride)
        size = (height, width, num_frames)
        fields = call.approximations.fields(schedule, videos is not None) | parts.loras.fields(call.lora_scale)
        request, plan = parts.plan_video(size, call.is_guided, videos is not None, fields)
        call.approximations.check(request, call.after, pipe.scheduler)
        pipe._guidance_scale, pipe._interrupt = call.guidance_scale, False
        pipe._attention_kwargs = call.attention_kwargs

        embeds = _embeddings(parts, plan, call)
        shape = (call.count * call.copies, *spec.latent_shape(height, width, num_frames))
        # As in diffusers: without a generator, noise is drawn on the device that denoises.
        noise = initial_latents(shape, call.generator, call.latents, torch.device(plan.transformer.device))
        source = None if videos is None else encode_videos(parts, videos[:, :, :num_frames], plan)
        if source is not None:
            source = source.expand(shape) if len(source) == 1 else source.repeat_interleave(call.copies, dim=0)
        models = parts.models
        # Take the VAE's lock first, in lock order: a callback may decode.
        with models.locks.take(VAE), models.transformer.use(plan, request, NO_JOB) as denoiser:
            latents = PipelineLoop(pipe, denoiser, embeds, call.after, request)(noise, schedule, source)
        output_type = call.output_type or "np"
        decodes = output_type != "latent"
        frames: Any = as_output(decode_videos(parts, latents, plan), output_type) if decodes else latents
    return WanPipelineOutput(frames) if call.return_dict else (frames,)


def _embeddings(parts: PipelineParts, plan: Plan, call: CallArguments) -> tuple[Tensor, Tensor | None]:
    """Return the embeddings `[B, tokens, text_dim]` of the prompts and of the negative prompts."""

    def embeds(texts: list[str] | None, given: Tensor | None) -> Tensor | None:
        if texts is not None:
            return encode(parts.text(plan), texts, call.max_sequence_length, call.copies)
        dim = parts.spec.transformer.text_dim
        return None if given is None else repeated(given, call.count, dim, call.copies)

    positive = embeds(call.prompts, call.prompt_embeds)
    assert positive is not None
    return positive, embeds(call.negatives, call.negative_prompt_embeds)
