"""Strategy `parallel`, the ranks' side: every process of a group holds the transformer and a strip of the decode.

Each process waits for tasks, does its part with the same code as one device (engine/denoising.py), and
rank 0 reports. See engine/group.py for the side that gives the tasks.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
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
from wanduet.engine.speeds import all_speeds, of_sequence, suited_layout
from wanduet.errors import CancelledError, KernelFailedError
from wanduet.folders import never_make
from wanduet.kernels.attention.choose import choose_together
from wanduet.kernels.host_copy import HostCopy
from wanduet.media.files import atomic_output
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
from wanduet.stages.denoise import DenoiseTask, Denoising, Surroundings
from wanduet.stages.record import VideoRecord


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """Decode latents `[16, T, h, w]`, or None for those denoised last, which every rank still has; each takes rows in
    proportion to its speed."""

    latents: Tensor | None


@dataclass(frozen=True, slots=True)
class Assignment:
    """One task with the plan that it runs under."""

    plan: Plan
    request: ResolvedRequest
    task: DenoiseTask | DecodeTask | None  # None: only load the transformer
    job: str = ""  # its id


@dataclass(frozen=True, slots=True)
class Denoised:
    """Rank 0's answer to a denoise: latents `[16, T, h, w]`, and what was used."""

    latents: Tensor | None  # None: it was cancelled
    attention: str | None
    rungs: tuple[str, ...]
    peaks: dict[str, int]  # bytes by device, of all ranks
    prepare_s: float  # of the task's seconds, what the first rank waited for kernels and attention
    seconds_of_others: float = 0.0  # that another job has spent on steps which this one went on from


@dataclass(frozen=True, slots=True)
class DecodedRows:
    """One rank's rows `[t, rows, W, 3]` uint8 of the frames of one latent frame."""

    frame: int
    rows: Rows
    pixels: NDArray[np.uint8]
    peaks: dict[str, int]  # what this rank had at most so far, in bytes by device


def work(rank: Rank, config: EngineConfig) -> None:
    """What each process of the group runs, until it is told None."""
    torch.set_grad_enabled(False)
    if config.data_folder.is_dir():
        never_make(config.data_folder)
    models = Models(config)
    meshes: dict[Layout, Mesh] = {}
    speeds: tuple[float, ...] = ()
    denoised: Tensor | None = None
    while (assignment := rank.receive()) is not None:
        assert isinstance(assignment, Assignment)
        speeds = speeds or all_speeds(rank, config.speeds)
        layout = suited_layout(assignment.plan, assignment.request, models.spec, speeds, rank.link)
        if layout not in meshes:
            meshes[layout] = rank.mesh(layout)
        trim_cache({one.name: one.peak for one in assignment.plan.prediction.devices if one.name == str(rank.device)})
        reset()
        plan, request = _own_plan(assignment.plan, rank), assignment.request
        if assignment.task is None:
            models.transformer.preload(plan, request, RunContext(assignment.job))
        elif isinstance(assignment.task, DecodeTask):
            latents = denoised if assignment.task.latents is None else assignment.task.latents
            assert latents is not None
            _decode(rank, models, plan, latents, speeds)
        else:
            record = VideoRecord(assignment.task.index, request.seed + assignment.task.index)
            if layout != assignment.plan.group.layout:
                record.note(f"denoise: one sequence, cut by the speeds that were measured: {speeds}")
            run = _Run(plan, assignment.job, record, meshes[layout], speeds)
            denoised = _denoise(rank, models, assignment.task, run)


def _own_plan(plan: Plan, rank: Rank) -> Plan:
    device = str(rank.device)
    # In here it is one device with all that it holds.
    return replace(
        plan,
        strategy="single",
        transformer=replace(plan.transformer, device=device),
        vae=replace(plan.vae, device=device),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A rank's part in one denoise: its own plan, the job's id, the video's record, the mesh and each rank's speed."""

    plan: Plan
    job: str
    record: VideoRecord
    mesh: Mesh
    speeds: tuple[float, ...]


def _denoise(rank: Rank, models: Models, task: DenoiseTask, run: _Run) -> Tensor | None:
    """The latents, the same on every rank; None if it was cancelled."""
    first, record = rank.index == 0, run.record

    def emit(event: Event) -> None:
        if first:
            rank.report(event)

    folder = models.config.data_folder / "checkpoints"
    checkpoints = Checkpoints(folder, task.digest, atomic_output, task.writer)
    if rank.cancelled():  # while the ranks started, or worked on another task
        if first:
            rank.report(Denoised(None, None, (), look(), 0.0))
        return None
    seconds_of_others = 0.0
    context = RunContext(run.job, emit, add_time=record.timings.add, note=record.note)
    with models.transformer.use(run.plan, task.request, context) as denoiser, ShownSteps(rank) as shown:
        _agree(denoiser)
        _share(denoiser, run.mesh, run.speeds)
        around = Surroundings(
            record,
            replace(context, should_cancel=rank.cancelled),
            watch=shown if first and task.watched else None,
            mesh=run.mesh,
            keeps_checkpoints=first,
        )
        try:
            denoising = Denoising(task, models.spec, denoiser, checkpoints, around)
            latents = denoising()
            seconds_of_others = denoising.seconds_of_others
        except CancelledError:
            latents = None
        except KernelFailedError as error:  # the others wait for this rank: all begin again, without that kernel
            denoiser.without_kernel(error.operation)
            models.checkpoint.keep_verdicts()
            raise
    peaks = add_up(all_gather_object(_own_peaks(rank)))
    if first:
        report = Denoised(
            latents,
            denoiser.attention,
            tuple(record.rungs),
            peaks,
            record.timings["prepare_s"],
            seconds_of_others,
        )
        rank.report(report)
    return latents


def _own_peaks(rank: Rank) -> dict[str, int]:
    """What this process has taken of its device and of the host since its task came."""
    return {name: size for name, size in look().items() if name in ("cpu", str(rank.device))}


class ShownSteps:
    """Reports steps while the next ones are computed: to wait for a step's latents would keep a GPU waiting for the next.

    One at a time, so that a starter that is slow to read does not fill the memory. Leave it when the steps are over:
    all have been reported then; after an error, which may mean that a GPU never finishes, nothing is waited for.
    """

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._pool = ThreadPoolExecutor(1, "wanduet-shown")
        self._last: Future[None] | None = None

    def __call__(self, info: StepInfo) -> None:
        """Report it soon. Raises what the report before raised."""
        if self._last is not None:
            self._last.result()
        latents = HostCopy(info.latents)
        self._last = self._pool.submit(lambda: self._rank.report(replace(info, latents=latents.wait())))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=kind is None)


def _agree(denoiser: LoadedTransformer) -> None:
    """Let all ranks attend with the same kernel, which each of them has chosen for itself."""
    assert denoiser.chosen is not None
    choice = denoiser.chosen[2]
    denoiser.attend_with(choose_together(all_gather_object((choice.name, choice.table)), denoiser.device))


def _share(denoiser: LoadedTransformer, mesh: Mesh, speeds: tuple[float, ...]) -> None:
    """Give the transformer its part of the sequence, the faster rank more of it; or of what all prompts have in common."""
    sharding: Sharding
    if mesh.layout.sequence > 1:
        sharding = SequenceSharding(mesh, denoiser.attention_lse, of_sequence(speeds, mesh))
    elif mesh.layout.cfg > 1 and uses_nccl(denoiser.device):  # over the host it would take longer than it saves
        sharding = CfgSharding.from_group(mesh.cfg)
    else:
        return
    denoiser.transformer.runtime = replace(denoiser.transformer.runtime, sharding=sharding)


def _decode(rank: Rank, models: Models, plan: Plan, latents: Tensor, speeds: tuple[float, ...]) -> None:
    with models.decoder(plan, plan.vae.device, NO_JOB) as vae:
        for index, (rows, pixels) in enumerate(decode_share(rank, vae, latents, speeds)):
            rank.report(DecodedRows(index, rows, pixels, _own_peaks(rank)))
            if rank.cancelled():
                break
