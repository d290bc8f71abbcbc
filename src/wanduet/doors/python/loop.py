"""One call's denoise loop, as in diffusers.

It steps the pipeline's own scheduler object, and calls a callback between steps that may change latents and embeddings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from wanduet.accelerate.step_cache import Run, Stateless, StepCache, rule_of
from wanduet.doors.python.schedule import Schedule, with_noise
from wanduet.errors import CancelledError
from wanduet.family.step_caches import StepCacheSetting
from wanduet.kernels.attention.call import Step
from wanduet.models.dit.model import TextContext
from wanduet.request import ResolvedRequest
from wanduet.runtime.context import NO_JOB
from wanduet.runtime.loaded import SWAPPED_OUT, LoadedTransformer
from wanduet.sampling.denoise import StepInfo, denoise
from wanduet.sampling.guidance import Combination
from wanduet.sampling.predictor import Predictor
from wanduet.sampling.samplers import SchedulerSampler
from wanduet.stages.fallback import DenoiseFallback
from wanduet.stages.predict import time_embedding

Text = TextContext | Tensor
Callback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any] | None]  # the first argument is the pipeline
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class CallbackSettings:
    """Functions to call after each step.

    `on_step_end` is diffusers' callback, and gets the named tensors. `progress(done, total)` is not in diffusers.
    """

    on_step_end: Callback | None
    tensors: Sequence[str]
    progress: Progress | None


@dataclass(frozen=True, slots=True)
class _Known:
    """One prompt's cross-attention keys and values, and a copy of the embeddings that they were computed from."""

    embeds: Tensor
    context: TextContext


class CalledPipeline(Protocol):
    """What the loop reads of the pipeline that is called, and writes for callbacks that read it."""

    _num_timesteps: int
    _current_timestep: Tensor | None

    @property
    def scheduler(self) -> Any:
        """diffusers' scheduler, which a callback may replace."""

    @property
    def guidance_scale(self) -> float:
        """The call's."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the negative prompt is predicted, too; a callback may change it."""

    @property
    def interrupt(self) -> bool:
        """Whether to stop after the current step."""

    def progress_bar(self, *, total: int | None) -> Any:
        """A context manager of tqdm's kind."""


class _PipelineSampler(SchedulerSampler):
    """Steps the pipeline's current scheduler, which a callback may replace between steps."""

    def __init__(self, pipe: CalledPipeline, device: torch.device, first: int) -> None:
        """`first`: index of the timestep to begin with."""
        self._pipe = pipe
        super().__init__(pipe.scheduler, device)
        self.begin_at(first)
        self._steps, self.timesteps, self.sigmas = (x[first:] for x in (self._steps, self.timesteps, self.sigmas))

    def step(self, velocity: Tensor, index: int, latents: Tensor) -> Tensor:
        """See Sampler."""
        self._scheduler = self._pipe.scheduler
        return super().step(velocity, index, latents)


class _Forward(Stateless):
    """Predictor of one video by a transformer, one prompt after the other; without state.

    `rope`: of the latents' size. `step_of`: returns the request's step, by which attention may be sparse, of a call's.
    """

    def __init__(
        self, denoiser: LoadedTransformer, fallback: DenoiseFallback, rope: Any, step_of: Callable[[Step], Step]
    ) -> None:
        self._denoiser, self._fallback, self._rope, self._step_of = denoiser, fallback, rope, step_of

    def __call__(self, latents: Tensor, step: Step, conditions: Sequence[Text]) -> list[Tensor]:
        """See Predictor."""
        step = self._step_of(step)
        times = torch.full((1,), step.timestep, dtype=torch.float32, device=latents.device)
        transformer, rope = self._denoiser.transformer, self._rope
        return [self._fallback(partial(transformer, latents, times, text, rope, step)) for text in conditions]


class PipelineLoop:
    """Runs the steps of one call."""

    def __init__(
        self,
        pipe: CalledPipeline,
        denoiser: LoadedTransformer,
        embeds: tuple[Tensor, Tensor | None],
        after: CallbackSettings,
        request: ResolvedRequest,
    ) -> None:
        """`embeds`: embeddings of the prompt and of the negative prompt, `[B, tokens, text_dim]`. `request`: its
        approximations apply."""
        self.pipe, self.denoiser, self.after = pipe, denoiser, after
        # Move the embeddings to the device first: the next step then reads what a callback changes in place.
        there = [None if one is None else one.to(denoiser.device, denoiser.dtype) for one in embeds]
        self.embeds: dict[str, Tensor | None] = dict(
            zip(("prompt_embeds", "negative_prompt_embeds"), there, strict=True)
        )
        self.fallback = DenoiseFallback(NO_JOB, denoiser)
        # The scale is fixed for the call: a callback can switch guidance off, not change its scale.
        self._combination = Combination(pipe.guidance_scale, request.guidance_mode)
        self._known: dict[str, _Known] = {}
        self._request = request
        self._predictors: list[Predictor[Text]] = []  # of each video

    def __call__(self, noise: Tensor, schedule: Schedule, source: Tensor | None = None) -> Tensor:
        """Return latents `[B, 16, T, h, w]` float32 after the last step.

        `noise`: the latents to begin with; with `source`, latents of videos `[B, 16, T, h, w]`, the noise that is added
        to them. If a callback sets `pipe._interrupt`, return the latents of that step.
        """
        pipe = self.pipe
        device = self.denoiser.device
        num_steps, first = schedule.set(pipe.scheduler, device)
        self.timesteps = pipe.scheduler.timesteps[first:]
        pipe._num_timesteps = len(self.timesteps)
        sampler = _PipelineSampler(pipe, device, first)
        latents = noise.to(device)
        if source is not None:
            source = source.to(device)
            times = self.timesteps[:1].repeat(len(latents))
            latents = with_noise(pipe.scheduler, source, latents, times) if num_steps else source
        rope = self.denoiser.transformer.prepare_rope(latents.shape, device)
        order = getattr(pipe.scheduler, "order", 1)
        self._predictors = [self._predictor(sampler, rope) for _ in latents]
        request, every = self._request, range(len(self.timesteps))
        begin, end = (
            (step - request.first_step) * order for step in (request.guided_steps.start, request.guided_steps.stop)
        )
        self._guided = range(begin, end) if request.ends_guidance else every
        self._num_zero = request.num_zero_steps * order
        last = [latents]
        with pipe.progress_bar(total=num_steps) as bar:

            def on_step(info: StepInfo) -> Tensor | None:
                changed = self._call_back(info)
                last[0] = info.latents if changed is None else changed
                if self.after.progress is not None:
                    self.after.progress(info.step + 1, info.num_steps)
                if (info.step + 1) % order == 0 or info.step + 1 == info.num_steps:
                    bar.update()
                return changed

            try:
                return denoise(self._velocity, latents, sampler, on_step=on_step, should_cancel=lambda: pipe.interrupt)
            except CancelledError:
                return last[0]
            finally:
                pipe._current_timestep = None

    def _velocity(self, x: Tensor, step: Step) -> Tensor:
        pipe = self.pipe
        pipe._current_timestep = self.timesteps[step.index]
        if step.index < self._num_zero and pipe.do_classifier_free_guidance:
            return torch.zeros_like(x)
        is_guided = pipe.do_classifier_free_guidance and step.index in self._guided
        given = (self._text(name) for name in ("prompt_embeds", "negative_prompt_embeds")[: 1 + is_guided])
        texts = [text for text in given if text is not None]
        # One video at a time: the plan's memory is for one, and batching long sequences is no faster.
        videos = [
            self._predictors[index](one, step, [_of_video(text, index) for text in texts])
            for index, one in enumerate(x.split(1))
        ]
        positive, *negative = (torch.cat(parts) for parts in zip(*videos, strict=True))
        return self._combination(positive, negative[0]) if negative else positive

    def _predictor(self, sampler: _PipelineSampler, rope: Any) -> Predictor[Text]:
        """Return a new predictor of one video, which skips the steps that its step cache skips."""
        denoiser, spec = self.denoiser, self.denoiser.spec
        order, first = getattr(self.pipe.scheduler, "order", 1), self._request.first_step
        forward = _Forward(denoiser, self.fallback, rope, lambda step: Step(first + step.index // order, step.timestep))
        setting = StepCacheSetting.parse(self._request.step_cache, spec.transformer)
        if setting is None or not sampler.timesteps:
            return forward
        run = Run(sampler.sigmas[: len(sampler.timesteps)], sampler.timesteps)
        return StepCache(forward, rule_of(setting, spec, run, time_embedding(denoiser)), bool, denoiser.device)

    def _text(self, name: str) -> Text | None:
        """Return one prompt's keys and values, computed again if its embeddings have changed.

        For several prompts, return only the embeddings: their keys and values need far more memory.
        """
        embeds = self.embeds[name]
        if embeds is None or len(embeds) > 1:
            return embeds
        known = self._known.get(name)
        if known is None or (self.after.on_step_end is not None and not torch.equal(known.embeds, embeds)):
            known = _Known(embeds.clone(), self.fallback(lambda: self.denoiser.transformer.prepare_text(embeds)))
            self._known[name] = known
        return known.context

    def _call_back(self, info: StepInfo) -> Tensor | None:
        """Call the callback; return the latents to continue with, or None if it did not replace them."""
        callback = self.after.on_step_end
        if callback is None:
            return None
        available = self.embeds | {"latents": info.latents}
        timestep = self.timesteps[info.step]  # in the scheduler's dtype, as in diffusers
        resident = self.denoiser.resident_blocks
        outputs = callback(self.pipe, info.step, timestep, {name: available[name] for name in self.after.tensors}) or {}
        if self.denoiser.resident_blocks == SWAPPED_OUT != resident:  # the callback's decode swapped it out
            self.denoiser.restream(resident)
        for name in self.embeds:
            if (given := outputs.get(name)) is not None:
                self.embeds[name] = given.to(self.denoiser.device, self.denoiser.dtype)
        latents: Tensor | None = outputs.get("latents")
        return None if latents is info.latents else latents


def _of_video(text: Text, index: int) -> Text:
    """Return the prompt of one video: the only one, or its row of the embeddings."""
    return text if isinstance(text, TextContext) else text[index : index + 1]
