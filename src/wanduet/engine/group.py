"""Strategy `parallel`, the engine's side: sends tasks to a group of ranks and collects the results.

A group stays alive while jobs use the same devices. If a rank dies, the whole group ends; the next task starts a new
one, and a denoise resumes from its last checkpoint.
"""

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from wanduet.config import EngineConfig
from wanduet.distributed.launch import COLLECTIVE_TIMEOUT, RankGroup
from wanduet.engine.job import Video
from wanduet.engine.ranks import (
    Assignment,
    DecodedRows,
    DecodeTask,
    Denoised,
    EncodedVideo,
    EncodeVideoTask,
    Left,
    work,
)
from wanduet.errors import CancelledError, WanduetError
from wanduet.planning.cost import step_seconds
from wanduet.planning.plan import Plan
from wanduet.request import ResolvedRequest
from wanduet.runtime.context import Event, RunContext
from wanduet.runtime.leases import GROUP
from wanduet.runtime.models import Models
from wanduet.runtime.peaks import add_up, join
from wanduet.sampling.denoise import StepInfo
from wanduet.stages.task import DenoiseTask

log = logging.getLogger(__name__)

# The timeout of a collective is at least this many predicted steps. A GPU's collectives are queued at the beginning of
# a forward, and wait until all other ranks have computed theirs, however slow they are.
STEPS_WAITED = 3
# Seconds between checks for a cancel while the engine waits for the ranks.
POLL = 0.2
# How many seconds ranks may take to leave a cancelled task; then they are ended. The watchdog ends the whole worker
# a few seconds later (`HangSettings.cancel_seconds`).
CANCEL_SECONDS = 6.0


def collective_timeout(plan: Plan, request: ResolvedRequest) -> float:
    """Return the timeout of a collective in a job, in seconds."""
    return max(COLLECTIVE_TIMEOUT, STEPS_WAITED * step_seconds(request, plan.prediction.seconds))


class Group:
    """The worker processes (ranks) for one list of devices."""

    def __init__(self, config: EngineConfig, plan: Plan, timeout_s: float = COLLECTIVE_TIMEOUT) -> None:
        """Start the processes. They load the model at the first task. `timeout_s`: the timeout of a collective, in
        seconds."""
        self.devices, self.timeout_s = plan.group.ranks, timeout_s
        self._ranks = RankGroup(work, plan.group.ranks, config, timeout_s=timeout_s)
        self._denoised: Tensor | None = None  # the latents denoised last, which the ranks still have
        # Of the encode or decode that was sent last: whether a rank has reported a part of it, how many have left it.
        self._begun, self._left = False, 0
        self.is_stuck = False  # whether the ranks have not left a cancelled task in time, or have failed in it

    def suits(self, plan: Plan, request: ResolvedRequest) -> bool:
        """Return whether the group lives, and has the plan's devices and a collective timeout long enough for the
        request."""
        long_enough = self.timeout_s >= collective_timeout(plan, request)
        return self._ranks.alive and self.devices == plan.group.ranks and long_enough

    def preload(self, plan: Plan, request: ResolvedRequest, job: str) -> None:
        """Make the ranks load the transformer for the job with this id. Does not wait."""
        self._ranks.send(Assignment(plan, request, None, job))

    def encode_video(self, video: Video) -> Tensor:
        """Return normalised latents `[16, T, h, w]` float32 of the request's input video. Raises as `denoise` does."""
        job, number = video.job, self._send(video, EncodeVideoTask())
        sent = time.perf_counter()
        while True:
            if job.cancelled:
                self._leave(number)  # the ranks skip it, or stop between two chunks of frames
                raise CancelledError("The job was cancelled.")
            message = self._next(number)
            if isinstance(message, Event):
                job.emit(message)
            elif isinstance(message, EncodedVideo):
                for event in message.notes:
                    video.record.note(event)
                join(job.rank_peaks, message.peaks)
                video.context.add_time("encode_video_s", message.seconds)
                # Before it, the ranks have started and loaded.
                video.context.add_time("load_s", max(0.0, time.perf_counter() - sent - message.seconds))
                if message.latents is None:
                    raise CancelledError("The job was cancelled.")
                return message.latents

    def denoise(self, video: Video, task: DenoiseTask) -> Tensor:
        """Return latents `[16, T, h, w]` float32. Raises CancelledError, RankFailedError, or a WanduetError of a rank.

        If the job is cancelled before the ranks have begun, raise at once: the ranks skip the task once they have
        started and loaded, and are ready for the next one. If it is cancelled later, they stop before the next block; if
        they do not within CANCEL_SECONDS, raise with `is_stuck` set.
        """
        job = video.job
        job.check_cancelled()
        self._denoised = None
        number = self._ranks.send(Assignment(video.plan, video.request, task, video.id))
        sent, waited = time.perf_counter(), 0.0
        begun, cancelled = False, None
        while True:
            if job.cancelled and cancelled is None:
                self._ranks.cancel(number)
                cancelled = time.perf_counter()
            if cancelled is not None:
                self.is_stuck = begun and time.perf_counter() - cancelled > CANCEL_SECONDS
                if self.is_stuck or not begun:
                    raise CancelledError("The job was cancelled.")
            message = self._next(number)
            if message is not None and not begun:  # the ranks have started, loaded and chosen their kernels
                begun, waited = True, time.perf_counter() - sent
            if isinstance(message, Event):
                job.emit(message)
            elif isinstance(message, StepInfo) and job.watch is not None:
                job.watch(message)
            elif isinstance(message, Denoised):
                video.record.adopt(message.record)
                join(job.rank_peaks, message.peaks)
                prepared = message.record.timings["prepare_s"]
                loaded = max(0.0, waited - prepared)
                video.context.add_time("load_s", loaded)
                video.context.add_time("prepare_s", prepared)
                video.context.add_time("denoise_s", -(loaded + prepared))
                if message.latents is None:
                    raise CancelledError("The job was cancelled.")
                video.context.add_time("denoise_s", message.record.timings["denoise_s"])
                self._denoised = message.latents
                return message.latents

    def decode(self, video: Video, latents: Tensor) -> Generator[NDArray[np.uint8], None, None]:
        """Yield frames `[1 or 4, H, W, 3]` uint8 of latents `[16, T, h, w]`, assembled from the ranks' rows. If the
        generator is closed early, or the job is cancelled, wait until the ranks stop after a latent frame, as `denoise`
        does."""
        on_ranks, job = latents is self._denoised, video.job
        number = self._send(video, DecodeTask(None if on_ranks else latents))
        waiting: dict[int, list[DecodedRows]] = {}
        last: dict[int, dict[str, int]] = {}  # the memory peaks of each rank, by its first row
        done = 0
        try:
            for frame in range(latents.shape[1]):
                parts = waiting.setdefault(frame, [])
                while len(parts) < len(self.devices):
                    job.check_cancelled()
                    message = self._next(number)
                    if isinstance(message, DecodedRows):
                        waiting.setdefault(message.frame, []).append(message)
                parts.sort(key=lambda part: part.rows.start)
                video.record.vae_kernels = parts[0].kernels
                last.update((part.rows.start, part.peaks) for part in parts)
                join(job.rank_peaks, add_up(list(last.values())))
                picture = np.concatenate([part.pixels for part in waiting.pop(frame)], axis=1)
                done += len(picture)
                job.emit(Event("decode", done, video.request.num_frames, video.index))
                yield picture
        except (CancelledError, GeneratorExit):
            self._leave(number)
            raise

    def close(self) -> None:
        """End all processes."""
        self._ranks.close()

    def _send(self, video: Video, task: EncodeVideoTask | DecodeTask) -> int:
        """Send an encode or a decode to the ranks; return its number."""
        self._begun, self._left = False, 0
        return self._ranks.send(Assignment(video.plan, video.request, task, video.id))

    def _leave(self, number: int) -> None:
        """Cancel task `number`, an encode or a decode. If the ranks have begun it, wait until they have left it: what
        fails in it until then must not reach the next job."""
        self._ranks.cancel(number)
        until = time.perf_counter() + CANCEL_SECONDS
        while self._begun and self._left < len(self.devices) and not self.is_stuck:
            try:
                self._next(number)
                self.is_stuck = time.perf_counter() > until
            except WanduetError as error:
                log.info("The ranks of a cancelled task failed: %s", error.message)
                self.is_stuck = True

    def _next(self, number: int) -> object:
        """Return the next report of a rank about task `number`, or None if none arrives within POLL seconds."""
        try:
            item = self._ranks.receive(POLL, number)
        except TimeoutError:
            return None
        report = None if item is None else item[1]
        if isinstance(report, Left):
            self._left += 1
        else:
            self._begun = self._begun or report is not None
        return report


class EngineModels(Models):
    """The models of an engine, and its group of ranks if a plan uses strategy `parallel`."""

    def __init__(self, config: EngineConfig) -> None:
        """Loads and starts nothing."""
        super().__init__(config)
        self._group: Group | None = None

    @contextmanager
    def group(self, plan: Plan, request: ResolvedRequest) -> Iterator[Group]:
        """Yield the group of a `parallel` plan, started if needed. The block has the group's lock. On any error but
        CancelledError, the group is closed, for its ranks may have ended or still work on the failed task; so is a group
        that does not leave a cancelled one."""
        with self.locks.take(GROUP):
            if self._group is not None and not self._group.suits(plan, request):
                self.close_group()
            if self._group is None:
                self._group = Group(self.config, plan, collective_timeout(plan, request))
            group = self._group
            for device in plan.group.ranks:  # it may be on a rank's GPU, in this process
                self.prompts.make_room(device, plan.text)
            try:
                yield group
            except CancelledError:  # the ranks skip a cancelled task by its number
                if group.is_stuck:
                    log.warning("A cancelled job still keeps its group of ranks: the group is ended.")
                    self.close_group()
                raise
            except BaseException:
                self.close_group()
                raise

    def close_group(self) -> None:
        """End the group's processes. The next job starts new ones."""
        with self.locks.take(GROUP):
            group, self._group = self._group, None
            if group is not None:
                group.close()

    def preload(self, plan: Plan, request: ResolvedRequest, context: RunContext) -> None:
        """Start loading the transformer, in this process or in the ranks. Does not wait."""
        if plan.strategy != "parallel":
            self.transformer.preload(plan, request, context)
            return
        with self.locks.if_idle(GROUP) as idle:  # a busy group has loaded already: do not wait for it
            if idle:
                with self.group(plan, request) as group:
                    group.preload(plan, request, context.id)

    def unload(self) -> None:
        """End the group, drop all models and free their memory at once. No thread may use the models meanwhile."""
        self.close_group()
        super().unload()
