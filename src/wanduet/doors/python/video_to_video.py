"""`from wanduet import WanVideoToVideoPipeline`: diffusers' video-to-video call, run by this engine."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor

from wanduet.doors.python.arguments import GUIDANCE_SCALE, CallArguments, fraction
from wanduet.doors.python.base import PipelineBase
from wanduet.doors.python.generate import generate
from wanduet.doors.python.loop import Callback, Progress
from wanduet.doors.python.schedule import Schedule
from wanduet.doors.python.videos import read_videos
from wanduet.family.attention import QuantizeAttention
from wanduet.family.guidance import GuidanceMode
from wanduet.family.speeds import SpeedName
from wanduet.kernels.dit.quantized import Quantize


class WanVideoToVideoPipeline(PipelineBase):
    """Video to video with diffusers' `WanVideoToVideoPipeline` call. Construct it with `from_pretrained` or `from_pipe`.

    See `PipelineBase`.
    """

    _encodes_video = True

    def __init__(self, tokenizer: Any, text_encoder: Any, transformer: Any, vae: Any, scheduler: Any) -> None:
        """Construct it from modules of diffusers' and transformers', or from another pipeline's `components`.

        It runs on all GPUs until `to` is called. Raises TypeError or ValueError for a module that cannot be used.
        """
        given = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "transformer": transformer}
        self._construct(given, scheduler)

    @torch.no_grad()
    def __call__(  # diffusers' parameters, and our own keywords
        self,
        video: Any = None,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_inference_steps: int = 50,
        timesteps: list[int] | None = None,
        guidance_scale: float = GUIDANCE_SCALE,
        strength: float = 0.8,
        num_videos_per_prompt: int | None = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str | None = "np",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        *,
        progress: Progress | None = None,
        speed: SpeedName | None = None,
        loss_budget: float | None = None,
        step_cache: str | None = None,
        guidance_gate: float | None = None,
        sparse: float | None = None,
        quantize: Quantize | None = None,
        guidance_interval: str | None = None,
        guidance_mode: GuidanceMode | None = None,
        quantize_attention: QuantizeAttention | None = None,
        low_res_first: bool = False,
    ) -> WanPipelineOutput | tuple[Any]:
        """Generate videos from videos as diffusers 0.42's call does.

        Not in diffusers: `progress`, `speed`, `loss_budget`, `step_cache`, `guidance_gate`, `guidance_interval`,
        `guidance_mode`, `sparse`, `quantize`, `quantize_attention`, `low_res_first`; see `WanPipeline`, also for `attention_kwargs`.

        `video`: a list of PIL images, an array `[F, H, W, 3]` or a tensor `[F, 3, H, W]` of floats in 0..1, a list of
        such frames, or several such videos; they are resized to `height` and `width`. One video serves all prompts, and
        one prompt all videos. `latents` `[B, 16, T, h, w]`, noisy ones of the first timestep that is kept, may be
        given instead of it. `strength`: 0 to 1, the share of the steps that is kept, the last ones; without any step
        the result is the input. Unlike diffusers, it makes `num_videos_per_prompt` videos of each prompt.

        Raises ValueError for arguments that are not supported.
        """
        call = CallArguments.of(locals())
        schedule = Schedule(call.num_inference_steps, timesteps, fraction("strength", strength))
        schedule.check(self.scheduler)
        if video is not None and latents is not None:
            raise ValueError("Give either video or latents, not both.")
        if latents is not None:
            return generate(self, call, schedule, num_frames=1)  # the latents' shape sets it
        videos = read_videos(self.video_processor, video, call)
        return generate(self, call, schedule, videos.shape[2], videos)
