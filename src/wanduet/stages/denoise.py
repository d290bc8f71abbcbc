"""Denoise one video on a loaded transformer, in the engine's own process or in each rank of a group."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from torch import Tensor

from wanduet.accelerate.low_res import LowRes
from wanduet.distributed.collectives import broadcast_
from wanduet.errors import CancelledError, NonFiniteLatentsError
from wanduet.planning.cost import step_flops
from wanduet.runtime.context import Event, RunContext
from wanduet.runtime.loaded import LoadedTransformer
from wanduet.sampling.checkpoint import Checkpoints
from wanduet.sampling.denoise import StepInfo
from wanduet.sampling.denoise import denoise as run_steps
from wanduet.sampling.enlarge import EnlargingSampler, shrink
from wanduet.sampling.noise import initial_noise
from wanduet.sampling.samplers import Sampler, Schedule, make_sampler
from wanduet.stages.cancel import BlockCancel, mark_on
from wanduet.stages.predict import GuidanceBySteps, forward_of, make_guidance, make_predictor, observed, skipped_steps
from wanduet.stages.record import VideoRecord
from wanduet.stages.resume import CheckpointKeeper
from wanduet.stages.task import DenoiseTask, StepHooks

log = logging.getLogger(__name__)


def denoise(
    task: DenoiseTask,
    denoiser: LoadedTransformer,
    checkpoints: Checkpoints | None,
    hooks: StepHooks,
    record: VideoRecord,
    context: RunContext,
) -> Tensor:
    """Return latents `[16, T, h, w]` float32 on the host, denoised from noise, from an input video with noise, or from
    the last checkpoint. If the result is NaN, denoise again with PyTorch kernels.

    `checkpoints`: None neither loads nor saves any. Ranks of a group (`denoiser.mesh`) all call this, with the same
    task. `record` receives how the video was made.

    Raises CancelledError (after saving a checkpoint), OutOfMemoryError, or NonFiniteLatentsError if PyTorch kernels give
    NaN too.
    """
    run = _Denoise(task, denoiser, checkpoints, hooks, record, context)
    try:
        return run()
    except NonFiniteLatentsError as error:
        if not denoiser.use_plain_kernels():
            raise
        problem = error
    # Outside the except block: the traceback there keeps the failed run's tensors alive.
    log.warning("%s Retrying with plain kernels.", problem.message)
    record.note(f"denoise: plain kernels after NaN at step {problem.step + 1}")
    return run()


class _Denoise:
    """One denoise, prepared: noise, predictor and text. Each call runs the loop."""

    def __init__(
        self,
        task: DenoiseTask,
        denoiser: LoadedTransformer,
        checkpoints: Checkpoints | None,
        hooks: StepHooks,
        record: VideoRecord,
        context: RunContext,
    ) -> None:
        self.task, self.denoiser, self.hooks, self.record, self.context = task, denoiser, hooks, record, context
        request = task.request
        self.low_res = LowRes.of(request, denoiser.spec)
        shape = denoiser.spec.latent_shape(request.generated_height, request.generated_width, request.num_frames)
        first = shape if self.low_res is None else (*shape[:2], *self.low_res.enlargement.small)
        with ThreadPoolExecutor(1, "wanduet-noise") as drawing:
            # In a thread: it takes about as long as launching the text's key projections, and releases the GIL.
            noise = drawing.submit(self._noise, (1, *shape), request.seed + task.index)
            forward = forward_of(denoiser, context)
            self.predictor = make_predictor(denoiser, (1, *first), forward, request)
            seen = observed(self.predictor, hooks.on_predict)
            guidance = partial(make_guidance, seen, task.conditions, request, denoiser, forward)
            self.guidance = (
                GuidanceBySteps(guidance, partial(_adapt, denoiser, context)) if request.loras else guidance()
            )
            self.noise = noise.result()
        self.work = step_flops(request, denoiser.spec)
        self.kept = CheckpointKeeper(task, denoiser, checkpoints, record, context)
        self.cancel = BlockCancel(context, mark_on(denoiser.device))

    def __call__(self) -> Tensor:
        """Resume from the last checkpoint, if a usable one exists."""
        self._before_blocks(self.cancel)
        try:
            return self._run()
        finally:
            self._before_blocks(None)

    def _before_blocks(self, call: BlockCancel | None) -> None:
        transformer = self.denoiser.transformer
        transformer.runtime = replace(transformer.runtime, before_block=call)

    def _run(self) -> Tensor:
        request, device = self.task.request, self.denoiser.device
        sampler = self._sampler()
        start, latents = self.task.first_step, self._start(sampler).to(device)
        sampler.begin_at(start)
        self.guidance.restore({})
        if (saved := self.kept.find()) is not None:
            start, latents = saved.step, saved.latents.to(device)
            sampler.restore(saved.sampler_state)
            self.guidance.restore(saved.predictor_state)
            log.info("Going on after step %d of %d.", start, request.num_inference_steps)
        self.kept.begin(sampler, self.guidance)
        self._emit(start)
        try:
            latents = run_steps(
                self.guidance,
                latents,
                sampler,
                on_step=lambda info: self._on_step(info, start),
                should_cancel=self.context.should_cancel,
                start_step=start,
            )
        except CancelledError:
            self.kept.save_last(within_step=self.cancel.within_step)
            raise
        self.record.skipped_steps = skipped_steps(self.predictor)
        self.record.quantized_layers = self.denoiser.quantized_layers
        return latents[0].float().cpu()

    def _noise(self, shape: tuple[int, ...], seed: int) -> Tensor:
        noise = initial_noise(shape, seed)
        return noise if self.low_res is None else shrink(noise, self.low_res.enlargement.small)

    def _sampler(self) -> Sampler:
        request, device = self.task.request, self.denoiser.device
        schedule, seed = Schedule.of(request), request.seed + self.task.index
        if self.low_res is None:
            return make_sampler(schedule, seed, device)
        return EnlargingSampler(schedule, seed, device, self.low_res.enlargement)

    def _start(self, sampler: Sampler) -> Tensor:
        """Return the latents `[1, 16, T, h, w]` before the first step, on the host: noise, or the input video's latents
        with noise of that step's level (rectified flow: `(1 - sigma) * video + sigma * noise`)."""
        video = self.task.conditions.video
        if video is None:
            return self.noise * sampler.init_noise_sigma
        sigma = sampler.sigmas[self.task.first_step]
        return self.noise * sigma + video[None] * (1.0 - sigma)

    def _on_step(self, info: StepInfo, start: int) -> Tensor | None:
        if self.denoiser.mesh is not None:
            # Every rank computes the same step. Different GPU models may differ in the last bit: keep them from
            # drifting.
            broadcast_(info.latents)
        self.cancel.step_ended()
        done = info.step + 1
        worked, left = sum(self.work[start:done]), sum(self.work[done:])
        self._emit(done, info.seconds / worked * left if worked else None)
        if self.hooks.watch is not None:
            self.hooks.watch(info)
        replaced = self._call_back(info)
        # After the callback: a run that resumes here does not call it again for this step.
        self.kept.step(done, info.num_steps, info.latents if replaced is None else replaced)
        return replaced

    def _emit(self, done: int, seconds_left: float | None = None) -> None:
        task = self.task
        steps = (done - task.first_step, task.request.num_denoising_steps)
        self.context.emit(Event("denoise", *steps, task.index, seconds_left=seconds_left))

    def _call_back(self, info: StepInfo) -> Tensor | None:
        """Call `on_step`. Return the latents if it replaced them or changed them in place, else None."""
        if self.hooks.on_step is None:
            return None
        before = info.latents._version
        replaced = self.hooks.on_step(info)
        if replaced is None and info.latents._version != before:
            replaced = info.latents
        if replaced is not None:
            self.record.changed = True
        return replaced


def _adapt(denoiser: LoadedTransformer, context: RunContext, step: int) -> bool:
    """Merge the LoRAs of a step. Not a method: the guidance that calls it would refer to its owner, and what is in such a circle
    stays on the GPU until Python looks for garbage."""
    if denoiser.mesh is not None:  # ranks agree on a cancel only between steps: they must all run the same forwards
        context = replace(context, should_cancel=lambda: False)
    return denoiser.adapt(step, replace(context, emit=lambda _: None))
