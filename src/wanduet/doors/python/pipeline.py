"""`from wanduet import WanPipeline`: diffusers' text-to-video call, run by this engine."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from torch import Tensor

from wanduet.doors.python.arguments import GUIDANCE_SCALE, CallArguments, whole_number
from wanduet.doors.python.base import PipelineBase
from wanduet.doors.python.calls import refuse
from wanduet.doors.python.generate import generate
from wanduet.doors.python.loop import Callback, Progress
from wanduet.doors.python.schedule import Schedule
from wanduet.family.attention import QuantizeAttention
from wanduet.family.guidance import GuidanceMode
from wanduet.family.speeds import SpeedName
from wanduet.kernels.dit.quantized import Quantize

__all__ = ["WanPipeline", "WanPipelineOutput"]


class WanPipeline(PipelineBase):
    """Text to video with diffusers' `WanPipeline` call. Construct it with `from_pretrained`. See `PipelineBase`."""

    _optional_components = ("transformer_2",)

    def __init__(  # diffusers' parameters
        self,
        tokenizer: Any,
        text_encoder: Any,
        vae: Any,
        scheduler: Any,
        transformer: Any,
        transformer_2: None = None,
        boundary_ratio: None = None,
        expand_timesteps: bool = False,
    ) -> None:
        """Construct it from modules of diffusers' and transformers', or from another pipeline's `components`.

        It runs on all GPUs until `to` is called. Raises TypeError or ValueError for a module that cannot be used.
        """
        if transformer_2 is not None or boundary_ratio is not None or expand_timesteps:
            refuse(type(self), "boundary_ratio")
        given = {"tokenizer": tokenizer, "text_encoder": text_encoder, "vae": vae, "transformer": transformer}
        self._construct(given, scheduler)

    @property
    def transformer_2(self) -> None:
        """None: a second transformer is Wan2.2's."""
        return None

    @transformer_2.setter
    def transformer_2(self, module: Any) -> None:
        if module is not None:
            raise ValueError("pipe.transformer_2 is Wan2.2's; this runs Wan2.1: set pipe.transformer.")

    @property
    def config(self) -> Any:
        """The pipeline's own config, as in diffusers."""
        return type(super().config)(super().config | {"boundary_ratio": None, "expand_timesteps": False})

    @torch.no_grad()
    def __call__(  # diffusers' parameters, and our own keywords
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int = 50,
        guidance_scale: float = GUIDANCE_SCALE,
        guidance_scale_2: float | None = None,
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
        """Generate videos as diffusers 0.42's call does.

        Not in diffusers: `progress(done, total)`, and what saves work at a loss, as on the command line: `speed`
        ("exact", "near", "fine", "fast" or "draft"), or `loss_budget` (PSNR in dB) instead of it; `step_cache`,
        `guidance_gate` (0..1) or `guidance_interval` ("0.1-0.8"), `sparse` (0..1), `quantize` ("off", "fp8" or "int8")
        and `quantize_attention` ("off", "int8" or "int8-fast").
        A step cache, which most speeds set, does not go together with `callback_on_step_end`. `guidance_mode` ("cfg",
        "cfg-zero" or "apg") is how guidance combines both prompts, as diffusers' guiders do. `low_res_first=True` is
        refused, with `Engine` instead.

        `attention_kwargs={"scale": 0.5}` multiplies the strengths of the active LoRAs, unless they are fused; nothing else
        is taken there.

        Weights that are distilled to run without guidance have none unless it is asked for, which is refused.

        Raises ValueError for arguments that are not supported.
        """
        if guidance_scale_2 is not None:
            raise ValueError("guidance_scale_2 is for Wan2.2's two transformers; this is Wan2.1.")
        call = CallArguments.of(locals())
        return generate(self, call, Schedule(call.num_inference_steps), whole_number("num_frames", num_frames))
