"""The checkpoints of a running denoise: which one it resumes from, and when it saves the next."""

import logging
import time

from torch import Tensor

from wanduet.distributed.collectives import all_gather_object
from wanduet.errors import OutputError
from wanduet.runtime.context import RunContext
from wanduet.runtime.loaded import LoadedTransformer
from wanduet.sampling.checkpoint import Checkpoints, DenoiseCheckpoint
from wanduet.sampling.guidance import Guidance
from wanduet.sampling.samplers import Sampler
from wanduet.stages.record import VideoRecord
from wanduet.stages.task import DenoiseTask

log = logging.getLogger(__name__)


class CheckpointKeeper:
    """Finds the checkpoint that a denoise resumes from, and saves one every `task.checkpoint_seconds`."""

    def __init__(
        self,
        task: DenoiseTask,
        denoiser: LoadedTransformer,
        checkpoints: Checkpoints | None,
        record: VideoRecord,
        context: RunContext,
    ) -> None:
        """Without `checkpoints` it neither loads nor saves any; a rank then still resumes from rank 0's."""
        self._task, self._denoiser, self._record, self._context = task, denoiser, record, context
        self._checkpoints = checkpoints
        self._began = time.perf_counter()
        self._before = 0.0  # seconds that the steps before the loaded checkpoint took
        self._counted = False  # whether those of another job are in this video's timings
        self._last: tuple[int, Tensor] | None = None

    def find(self) -> DenoiseCheckpoint | None:
        """Return the checkpoint to resume from, or None. Add how it was made to the video's record and timings."""
        saved = None
        if self._checkpoints is not None:
            saved = self._checkpoints.load(own_only=not self._task.resume)
        if self._denoiser.mesh is not None:  # all ranks use rank 0's: another process may write a newer one meanwhile
            saved = all_gather_object(saved)[0]
        if saved is None:
            return None
        video, record = self._record, saved.record
        if record.get("changed") and saved.writer != self._task.writer:
            log.warning("A callback had changed the latents of the interrupted run: this one begins again.")
            return None
        video.changed = bool(record.get("changed"))
        self._began, self._before = time.perf_counter(), float(record.get("denoise_s", 0.0))
        if saved.writer != self._task.writer:
            if not self._counted:
                self._context.add_time("denoise_s", self._before)
            self._counted = True
            for event in record.get("rungs", ()):
                if event not in video.notes:
                    video.note(event)
            devices, attention = (record.get(name) for name in ("devices", "attention"))
            if (devices, attention) != (self._devices, self._denoiser.attention):
                video.note(f"denoise: up to step {saved.step} on {devices} device(s) with attention {attention}")
        return saved

    @property
    def _devices(self) -> int:
        mesh = self._denoiser.mesh
        return 1 if mesh is None else mesh.layout.world_size

    def begin(self, sampler: Sampler, guidance: Guidance) -> None:
        """Begin the steps, whose states are the sampler's and the guidance's."""
        self._sampler, self._guidance = sampler, guidance
        self._saved_at = time.perf_counter()
        self._last = None

    def step(self, done: int, total: int, latents: Tensor) -> None:
        """Save a checkpoint after `done` of `total` steps, if it is time for one."""
        self._last = (done, latents)
        if time.perf_counter() - self._saved_at >= self._task.checkpoint_seconds and done < total:
            self._save(done, latents)
            self._saved_at = time.perf_counter()

    def save_last(self, *, within_step: bool = False) -> None:
        """Save a checkpoint of the last step, so that --resume loses nothing after a cancel.

        `within_step`: the step after it was begun. What guidance remembers may then be of that step already; in that case
        the checkpoint before is kept.
        """
        if self._last is not None and not (within_step and self._guidance.state()):
            self._save(*self._last)

    def _save(self, step: int, latents: Tensor) -> None:
        """Save a checkpoint. If that fails (a full disk, for example), log a warning; the job goes on."""
        if self._checkpoints is None:
            return
        record = {
            "rungs": self._record.notes,
            "changed": self._record.changed,
            "devices": self._devices,
            "attention": self._denoiser.attention,
            "denoise_s": round(self._before + time.perf_counter() - self._began, 3),
        }
        task, states = self._task, (self._sampler.state(), self._guidance.state())
        try:
            checkpoint = DenoiseCheckpoint(
                step, latents, states[0], task.about, record, task.writer, predictor_state=states[1]
            )
            if not self._checkpoints.save(checkpoint):
                log.warning("After step %d there is NaN or infinity: the checkpoint before it is kept.", step)
        except (OSError, OutputError) as error:
            log.warning("The checkpoint after step %d could not be written: %s", step, error)
