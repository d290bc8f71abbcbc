"""Denoise one video on a loaded transformer, in the engine's own process or in each rank of a group.

`Surroundings` carries everything that differs between the two: the progress callback, the cancellation check, the
wrapper around each forward, and the mesh of ranks, if any.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from wanduet.distributed.collectives import all_gather_object, broadcast_
from wanduet.distributed.mesh import Mesh
from wanduet.errors import CancelledError, NonFiniteLatentsError, OutputError
from wanduet.family.specs import ModelSpec
from wanduet.kernels.attention.backends import sdpa
from wanduet.kernels.attention.call import Step
from wanduet.kernels.dit.plain import TORCH_KERNELS
from wanduet.media.embeddings import PromptEmbeds
from wanduet.models.dit.model import TextContext
from wanduet.models.text.umt5 import pad_embeddings
from wanduet.request import ResolvedRequest
from wanduet.runtime.context import Event, RunContext
from wanduet.runtime.loaded import LoadedTransformer
from wanduet.sampling.checkpoint import Checkpoints, DenoiseCheckpoint
from wanduet.sampling.denoise import OnStep, StepInfo, Watch, denoise
from wanduet.sampling.guidance import NoGuidance, ParallelGuidance, SequentialGuidance, Velocity
from wanduet.sampling.noise import initial_noise
from wanduet.sampling.predictor import Predictor
from wanduet.sampling.samplers import Sampler, State, make_sampler
from wanduet.stages.record import VideoRecord

log = logging.getLogger(__name__)

Forward = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Embeddings of the prompt, and of the negative prompt if guidance is on (else None)."""

    prompt: PromptEmbeds
    negative: PromptEmbeds | None


@dataclass(frozen=True, slots=True)
class DenoiseTask:
    """The input of one denoise: video `index` of a request.

    `digest` is the key of its checkpoints; `about` is stored in them. `writer` is the job's id: the denoise always
    resumes from that job's own checkpoints, and from another job's only if `resume` is True. It saves a checkpoint
    every `checkpoint_seconds`. `watched` makes rank 0 of a group send each step to the engine's process.
    """

    request: ResolvedRequest
    index: int
    conditioning: Conditioning
    digest: str
    about: dict[str, Any]
    writer: str
    resume: bool
    checkpoint_seconds: float
    watched: bool = False


TextPredictor = Predictor[TextContext]


class TransformerPredictor:
    """Predictor of one transformer, without state. `forward` runs each forward, and may rerun it with less memory."""

    def __init__(
        self, denoiser: LoadedTransformer, latent_shape: tuple[int, ...], forward: Callable[[Forward], Any]
    ) -> None:
        """`latent_shape`: `(B, 16, T, h, w)`."""
        self._denoiser, self._forward = denoiser, forward
        self._rope = denoiser.transformer.prepare_rope(latent_shape, denoiser.device)

    def __call__(self, latents: Tensor, step: Step, conditions: Sequence[TextContext]) -> Sequence[Tensor]:
        """See Predictor."""
        timestep = torch.full((1,), step.timestep, dtype=torch.float32, device=latents.device)
        transformer, rope = self._denoiser.transformer, self._rope
        velocities: list[Tensor] = self._forward(
            lambda: transformer.forward_cfg(latents, timestep, conditions, rope, step)
        )
        return velocities

    def state(self) -> State:
        """See Predictor."""
        return {}

    def restore(self, state: State) -> None:
        """See Predictor."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The environment of a denoise.

    `record` receives how the video was made. `on_step` may replace the latents after each step; `watch` only sees them.
    `forward` runs each forward, and may rerun it with less memory. `mesh` is set in a rank of a group. Without
    `keeps_checkpoints`, the denoise neither loads nor saves checkpoints. `wrap` may wrap the predictor, for example in
    one that skips work.
    """

    record: VideoRecord
    context: RunContext
    on_step: OnStep | None = None
    watch: Watch | None = None
    forward: Callable[[Forward], Any] = field(default=lambda run: run())
    mesh: Mesh | None = None
    keeps_checkpoints: bool = True
    wrap: Callable[[TextPredictor], TextPredictor] = field(default=lambda predictor: predictor)


class Denoising:
    """One denoise. The constructor prepares noise, predictor and text; calling it runs the loop, with PyTorch kernels
    again if it gives NaN."""

    def __init__(
        self,
        task: DenoiseTask,
        spec: ModelSpec,
        denoiser: LoadedTransformer,
        checkpoints: Checkpoints,
        around: Surroundings,
    ) -> None:
        self.task, self.denoiser, self.checkpoints, self.around = task, denoiser, checkpoints, around
        request = task.request
        shape = spec.latent_shape(request.generated_height, request.generated_width, request.num_frames)
        with ThreadPoolExecutor(1, "wanduet-noise") as drawing:
            # In a thread: it takes about as long as launching the text's key projections, and releases the GIL.
            noise = drawing.submit(initial_noise, (1, *shape), request.seed + task.index)
            self.predictor = around.wrap(TransformerPredictor(denoiser, (1, *shape), around.forward))
            self.contexts = self._contexts(spec.text_len)
            self.noise = noise.result()
        self._saved_at = 0.0
        self._last: tuple[int, Tensor] | None = None
        self._began = time.perf_counter()
        self._before = 0.0  # seconds that the steps before the loaded checkpoint took
        self.seconds_of_others = 0.0  # the same, if another job made those steps; else 0

    def __call__(self) -> Tensor:
        """Return latents `[16, T, h, w]` float32 on the host.

        Raises CancelledError (after saving a checkpoint), or NonFiniteLatentsError if PyTorch kernels give NaN too.
        """
        try:
            return self._run()[0].float().cpu()
        except NonFiniteLatentsError as error:
            if not self._use_plain_kernels():
                raise
            problem = error
        # Outside the except block: the traceback there keeps the failed run's tensors alive.
        log.warning("%s Retrying with plain kernels.", problem.message)
        self.around.record.note(f"denoise: plain kernels after NaN at step {problem.step + 1}")
        return self._run()[0].float().cpu()

    def _run(self) -> Tensor:
        """Return latents `[1, 16, T, h, w]` on the device. Resume from the last checkpoint, if a usable one exists."""
        request, device = self.task.request, self.denoiser.device
        sampler = make_sampler(request.sampler, request.flow_shift, request.num_inference_steps, device)
        start, latents = 0, self.noise.to(device)
        self.predictor.restore({})
        if (saved := self._find_checkpoint()) is not None:
            start, latents = saved.step, saved.latents.to(device)
            sampler.restore(saved.sampler_state)
            self.predictor.restore(saved.predictor_state)
            log.info("Going on after step %d of %d.", start, request.num_inference_steps)
        self._saved_at = time.perf_counter()
        self._last = None
        self.around.context.emit(Event("denoise", start, request.num_inference_steps, self.task.index))
        try:
            return denoise(
                self._velocity(),
                latents,
                sampler,
                on_step=lambda info: self._on_step(info, sampler, start),
                should_cancel=self.around.context.should_cancel,
                start_step=start,
            )
        except CancelledError:
            self._keep_last(sampler)
            raise

    def _find_checkpoint(self) -> DenoiseCheckpoint | None:
        """Return the checkpoint to resume from, or None. Add how it was made to this video's record."""
        saved = None
        if self.around.keeps_checkpoints:
            saved = self.checkpoints.load(own_only=not self.task.resume)
        if self.around.mesh is not None:  # all ranks use rank 0's: another process may write a newer one meanwhile
            saved = all_gather_object(saved)[0]
        if saved is None:
            return None
        video, record = self.around.record, saved.record
        if record.get("changed") and saved.writer != self.task.writer:
            log.warning("A callback had changed the latents of the interrupted run: this one begins again.")
            return None
        video.changed = bool(record.get("changed"))
        self._began, self._before = time.perf_counter(), float(record.get("denoise_s", 0.0))
        if saved.writer != self.task.writer:
            self.seconds_of_others = self._before
            for event in record.get("rungs", ()):
                if event not in video.notes:
                    video.note(event)
            devices, attention = (record.get(name) for name in ("devices", "attention"))
            if (devices, attention) != (self._devices, self.denoiser.attention):
                video.note(f"denoise: up to step {saved.step} on {devices} device(s) with attention {attention}")
        return saved

    @property
    def _devices(self) -> int:
        mesh = self.around.mesh
        return 1 if mesh is None else mesh.layout.world_size

    def _use_plain_kernels(self) -> bool:
        """Replace every optimised kernel by its PyTorch implementation. Return False if none was in use."""
        runtime = self.denoiser.transformer.runtime
        if runtime.kernels is TORCH_KERNELS and runtime.attention is sdpa:
            return False
        self.denoiser.transformer.runtime = replace(runtime, kernels=TORCH_KERNELS, attention=sdpa)
        self.denoiser.attention = "sdpa"
        return True

    def _velocity(self) -> Velocity:
        scale, mesh = self.task.request.guidance_scale, self.around.mesh
        if self.task.conditioning.negative is None:
            return NoGuidance(self.predictor, self.contexts[0])
        if mesh is not None and mesh.layout.cfg > 1:
            return ParallelGuidance(self.predictor, self.contexts[0], scale, mesh.cfg)
        positive, negative = self.contexts
        return SequentialGuidance(self.predictor, positive, negative, scale)

    def _contexts(self, text_len: int) -> list[TextContext]:
        """The text contexts that this process needs: both prompts, or with a split CFG only its own branch's."""
        both = self.task.conditioning
        prompts = [p for p in (both.prompt, both.negative) if p is not None]
        mesh = self.around.mesh
        if mesh is not None and mesh.layout.cfg > 1 and len(prompts) > 1:
            prompts = [prompts[mesh.cfg_rank]]
        return [self._context(pad_embeddings(prompt.embeds, text_len)) for prompt in prompts]

    def _context(self, padded: Tensor) -> TextContext:
        on_device = padded.to(self.denoiser.device)
        context: TextContext = self.around.forward(lambda: self.denoiser.transformer.prepare_text(on_device))
        return context

    def _on_step(self, info: StepInfo, sampler: Sampler, start: int) -> Tensor | None:
        if self.around.mesh is not None:
            # Every rank computes the same step. Different GPU models may differ in the last bit: keep them from
            # drifting.
            broadcast_(info.latents)
        done, now = info.step + 1, time.perf_counter()
        left = info.seconds / (done - start) * (info.num_steps - done)
        self.around.context.emit(Event("denoise", done, info.num_steps, self.task.index, seconds_left=left))
        if self.around.watch is not None:
            self.around.watch(info)
        replaced = self._call_back(info)
        latents = info.latents if replaced is None else replaced
        # After the callback: a run that resumes here does not call it again for this step.
        self._last = (done, latents)
        if now - self._saved_at >= self.task.checkpoint_seconds and done < info.num_steps:
            self._save(done, latents, sampler)
            self._saved_at = time.perf_counter()
        return replaced

    def _call_back(self, info: StepInfo) -> Tensor | None:
        """Call `on_step`. Return the latents if it replaced them or changed them in place, else None."""
        if self.around.on_step is None:
            return None
        before = info.latents._version
        replaced = self.around.on_step(info)
        if replaced is None and info.latents._version != before:
            replaced = info.latents
        if replaced is not None:
            self.around.record.changed = True
        return replaced

    def _keep_last(self, sampler: Sampler) -> None:
        """Save a checkpoint of the last step after a cancel, so that --resume loses nothing."""
        if self._last is not None:
            self._save(*self._last, sampler)

    def _save(self, step: int, latents: Tensor, sampler: Sampler) -> None:
        """Save a checkpoint. If that fails (a full disk, for example), log a warning; the job goes on."""
        if not self.around.keeps_checkpoints:
            return
        video = self.around.record
        record = {
            "rungs": video.notes,
            "changed": video.changed,
            "devices": self._devices,
            "attention": self.denoiser.attention,
            "denoise_s": round(self._before + time.perf_counter() - self._began, 3),
        }
        try:
            checkpoint = DenoiseCheckpoint(
                step,
                latents,
                sampler.state(),
                self.task.about,
                record,
                self.task.writer,
                predictor_state=self.predictor.state(),
            )
            if not self.checkpoints.save(checkpoint):
                log.warning("After step %d there is NaN or infinity: the checkpoint before it is kept.", step)
        except (OSError, OutputError) as error:
            log.warning("The checkpoint after step %d could not be written: %s", step, error)
