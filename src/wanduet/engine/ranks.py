"""Strategy `parallel`, the ranks' side: each process of a group has the transformer, and decodes a row tile.

Each process waits for tasks and computes its share with the same code as a single device (stages/denoise.py). Rank 0
reports a denoise; every rank reports its decoded rows. See engine/group.py for the engine's side.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wanduet.config import EngineConfig
from wanduet.distributed.collectives import all_gather_object, uses_nccl
from wanduet.distributed.mesh import Layout, Mesh
from wanduet.distributed.rank import Rank
from wanduet.distributed.sequence.cfg import CfgSharding
from wanduet.distributed.sequence.hybrid import SequenceSharding
from wanduet.distributed.sequence.sharding import Sharding
from wanduet.engine.rank_decode import decode_share
from wanduet.engine.speeds import all_speeds, layout_unguided, link_rate, of_sequence, suited_layout
from wanduet.errors import CancelledError, KernelFailedError
from wanduet.folders import never_make
from wanduet.kernels.attention.choose import choose_together
from wanduet.kernels.host_copy import HostCopy
from wanduet.media.files import atomic_output
from wanduet.media.input_video import frames_of
from wanduet.models.vae.rows import Rows
from wanduet.planning.plan import Plan
from wanduet.request import ResolvedRequest
from wanduet.runtime.context import NO_JOB, Event, RunContext
from wanduet.runtime.loaded import LoadedTransformer
from wanduet.runtime.models import Models
from wanduet.runtime.peaks import add_up, look, reset
from wanduet.runtime.release import trim_cache
from wanduet.sampling.checkpoint import Checkpoints
from wanduet.sampling.denoise import StepInfo
from wanduet.stages.denoise import denoise
from wanduet.stages.encode_video import encode_video
from wanduet.stages.record import VideoRecord
from wanduet.stages.task import DenoiseTask, StepHooks


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """Decode latents `[16, T, h, w]`; None means the latents denoised last, which every rank still has. Each rank
    decodes rows in proportion to its speed."""

    latents: Tensor | None


@dataclass(frozen=True, slots=True)
class EncodeVideoTask:
    """Encode the request's input video, on rank 0: the file is read on the same host."""


@dataclass(frozen=True, slots=True)
class EncodedVideo:
    """Rank 0's report of an encode: normalised latents `[16, T, h, w]` float32 on the host."""

    latents: Tensor | None  # None: cancelled
    notes: tuple[str, ...]
    peaks: dict[str, int]  # peak bytes by device of this rank
    seconds: float


@dataclass(frozen=True, slots=True)
class Left:
    """Each rank's last report about an encode or a decode: it has ended, or was cancelled."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """One task for the ranks, with its plan."""

    plan: Plan
    request: ResolvedRequest
    task: EncodeVideoTask | DenoiseTask | DecodeTask | None  # None: only load the transformer
    job: str = ""  # the job's id


@dataclass(frozen=True, slots=True)
class Denoised:
    """Rank 0's report of a denoise: latents `[16, T, h, w]` float32, and how they were made.

    In the record's timings, `prepare_s` is how long rank 0 waited for kernels and attention, and `denoise_s` what
    another job spent on the steps before the loaded checkpoint.
    """

    latents: Tensor | None  # None: cancelled
    record: VideoRecord
    peaks: dict[str, int]  # peak bytes by device, of all ranks


@dataclass(frozen=True, slots=True)
class DecodedRows:
    """One rank's rows `[t, rows, W, 3]` uint8 of the frames of one latent frame."""

    frame: int
    rows: Rows
    pixels: NDArray[np.uint8]
    peaks: dict[str, int]  # peak bytes by device of this rank so far
    kernels: str  # the VAE's, by their name


def work(rank: Rank, config: EngineConfig) -> None:
    """The main loop of each process of a group. Ends when it receives None."""
    torch.set_grad_enabled(False)
    if config.data_folder.is_dir():
        never_make(config.data_folder)
    models = Models(config)
    meshes: dict[Layout, Mesh] = {}
    speeds: tuple[float, ...] = ()
    sends: float | None = None  # bytes a second
    denoised: Tensor | None = None
    while (assignment := rank.receive()) is not None:
        assert isinstance(assignment, Assignment)
        if not speeds:
            speeds, sends = all_speeds(rank, config.device_speeds), link_rate(rank)
        layout = suited_layout(assignment.plan, assignment.request, models.spec, speeds, sends)
        after = layout_unguided(assignment.plan, assignment.request, models.spec, layout, sends)
        for one in (layout, after):
            if one is not None and one not in meshes:
                meshes[one] = rank.mesh(one)
        trim_cache({one.name: one.peak for one in assignment.plan.prediction.devices if one.name == str(rank.device)})
        reset()
        plan, request = _own_plan(assignment.plan, rank), assignment.request
        if assignment.task is None:
            models.transformer.preload(plan, request, RunContext(assignment.job))
        elif isinstance(assignment.task, EncodeVideoTask):
            if rank.index == 0:
                _encode_video(rank, models, plan, assignment)
            rank.report(Left())
        elif isinstance(assignment.task, DecodeTask):
            latents = denoised if assignment.task.latents is None else assignment.task.latents
            assert latents is not None
            _decode(rank, models, plan, latents, speeds)
            rank.report(Left())
        else:
            record = VideoRecord(assignment.task.index, request.seed + assignment.task.index)
            if layout != assignment.plan.group.layout:
                record.note(f"denoise: one sequence, cut by the speeds that were measured: {speeds}")
            run = _Run(plan, assignment.job, record, meshes[layout], meshes[after] if after else None, speeds)
            denoised = _denoise(rank, models, assignment.task, run)


def _own_plan(plan: Plan, rank: Rank) -> Plan:
    device = str(rank.device)
    # To a rank, the plan is that of a single device, its own.
    return replace(
        plan,
        strategy="single",
        transformer=replace(plan.transformer, device=device),
        vae=replace(plan.vae, device=device),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A rank's settings for one denoise: its own plan, the job's id, the video's record, the mesh, another one for the
    steps without guidance, all ranks' speeds."""

    plan: Plan
    job: str
    record: VideoRecord
    mesh: Mesh
    unguided: Mesh | None
    speeds: tuple[float, ...]


def _encode_video(rank: Rank, models: Models, plan: Plan, assignment: Assignment) -> None:
    record = VideoRecord(0, assignment.request.seed)
    context = RunContext(
        assignment.job, rank.report, rank.cancelled_locally, add_time=record.timings.add, note=record.note
    )
    latents: Tensor | None
    try:
        request = assignment.request
        latents = encode_video(models, plan, frames_of(request), record, context, request.num_frames)
    except CancelledError:
        latents = None
    rank.report(EncodedVideo(latents, tuple(record.notes), _own_peaks(rank), record.timings["encode_video_s"]))


def _denoise(rank: Rank, models: Models, task: DenoiseTask, run: _Run) -> Tensor | None:
    """Return the latents, the same on every rank; None if the task was cancelled."""
    first, record = rank.index == 0, run.record

    def emit(event: Event) -> None:
        if first:
            rank.report(event)

    folder = models.config.data_folder / "checkpoints"
    checkpoints = Checkpoints(folder, task.digest, atomic_output, task.writer)
    if rank.cancelled():  # before this rank began the task
        if first:
            rank.report(Denoised(None, record, look()))
        return None
    context = RunContext(run.job, emit, add_time=record.timings.add, note=record.note)
    with models.transformer.use(run.plan, task.request, context) as denoiser, Reports(rank) as reports:
        _agree(denoiser)
        _share(denoiser, run)
        hooks = StepHooks(watch=reports.add_step if first and task.watched else None)
        context = replace(context, should_cancel=rank.cancelled, should_cancel_in_step=rank.cancelled_in_step)
        try:
            latents = denoise(task, denoiser, checkpoints if first else None, hooks, record, context)
        except CancelledError:
            latents = None
        except KernelFailedError as error:  # the other ranks wait for this one: the group restarts without that kernel
            denoiser.without_kernel(error.operation)
            models.checkpoint.keep_verdicts()
            raise
    record.attention, record.kernels = denoiser.attention, denoiser.kernels
    peaks = add_up(all_gather_object(_own_peaks(rank)))
    if first:
        rank.report(Denoised(latents, record, peaks))
    return latents


def _own_peaks(rank: Rank) -> dict[str, int]:
    """Return this process's peak bytes of its device and of the host since its task began."""
    return {name: size for name, size in look().items() if name in ("cpu", str(rank.device))}


class Reports:
    """Reports in a background thread while the next values are computed: waiting for them would stall the GPU, and so
    would a parent process that reads late.

    It queues at most one report, so that a slow reader does not fill the memory. The end of the `with` block waits for
    all reports and raises the last one's error; after an error it does neither, as a GPU may never finish.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._pool = ThreadPoolExecutor(1, "wanduet-reports")
        self._last: Future[None] | None = None

    def add(self, make: Callable[[], object]) -> None:
        """Queue a report that `make` returns, once the one before has been sent. Raises that one's error."""
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(lambda: self._rank.report(make()))

    def add_step(self, info: StepInfo) -> None:
        """Queue the report of a step."""
        latents = HostCopy(info.latents)
        self.add(lambda: replace(info, latents=latents.wait()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=kind is None)
        if kind is None and self._last is not None:
            self._last.result()


def _agree(denoiser: LoadedTransformer) -> None:
    """Make all ranks use the same attention back end, chosen from the measurements of each."""
    assert denoiser.chosen is not None
    choice = denoiser.chosen[2]
    denoiser.attend_with(choose_together(all_gather_object((choice.name, choice.table)), denoiser.device))


def _share(denoiser: LoadedTransformer, run: _Run) -> None:
    """Install the mesh's sharding in the transformer: a part of the sequence, larger on faster ranks, or with CFG
    parallelism a part of the work that both prompts share; and in steps without guidance, a part of the sequence."""
    mesh, after = run.mesh, run.unguided

    def of_parts(mesh: Mesh) -> SequenceSharding:
        found = SequenceSharding(mesh, denoiser.attention_lse, of_sequence(run.speeds, mesh))
        found.block = denoiser.transformer.runtime.token_block or 1
        found.by_collectives = denoiser.spec.transformer.attention != "dense"  # it needs all queries and keys at once
        return found

    denoiser.mesh, denoiser.unguided = mesh, None
    if after is not None and (after.layout.ring == 1 or denoiser.attention_lse is not None):
        denoiser.unguided = of_parts(after)
    sharding: Sharding
    if mesh.layout.sequence > 1:
        sharding = of_parts(mesh)
    elif mesh.layout.cfg > 1 and uses_nccl(denoiser.device):  # through the host, the exchange costs more than it saves
        sharding = CfgSharding.from_group(mesh.cfg)
    else:
        return
    denoiser.transformer.runtime = replace(denoiser.transformer.runtime, sharding=sharding)


def _decode(rank: Rank, models: Models, plan: Plan, latents: Tensor, speeds: tuple[float, ...]) -> None:
    with models.decoder(plan, plan.vae.device, NO_JOB) as vae, Reports(rank) as reports:
        try:
            for index, (rows, pixels) in enumerate(decode_share(rank, vae, latents, speeds)):
                reports.add(partial(DecodedRows, index, rows, pixels.copy(), _own_peaks(rank), vae.kernels.name))
        except KernelFailedError as error:  # the next group does without it
            models.vae.without_kernel(error.operation)
            models.checkpoint.keep_verdicts()
            raise
