"""What a first job needs, made ready in threads beside the encoding of its text.

Whatever fails here but the loading is done once more, and fails, where it is needed.
"""

import logging
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from wanduet.engine.job import Job
from wanduet.engine.turns import SHORT_TURNS
from wanduet.models.vae_traced import compile_decode
from wanduet.ops.attention import import_backends
from wanduet.ops.devices import on_device_of
from wanduet.ops.kernels import vae_kernels_for, vae_kernels_to_compile
from wanduet.sampling.samplers import make_sampler

if TYPE_CHECKING:
    from wanduet.engine.build import Denoiser, Models

log = logging.getLogger(__name__)


def preload(models: "Models", job: Job, pool: Executor) -> "Future[Denoiser]":
    """Start; comes to the transformer, set up for the job. `pool` has two threads.

    Imports come after the loading: most of what they do keeps the interpreter to itself.
    """
    SHORT_TURNS.begin()
    try:
        loaded = pool.submit(models.load_denoiser, job)
        fitted = pool.submit(_fit, models, job, loaded)
        rest = pool.submit(_prepare_rest, models, job, loaded, fitted)
    except RuntimeError:  # the pool is closed
        SHORT_TURNS.end()
        raise
    rest.add_done_callback(lambda _: SHORT_TURNS.end())  # also where it was cancelled before it began
    return fitted


def _fit(models: "Models", job: Job, loaded: "Future[Denoiser]") -> "Denoiser":
    denoiser = loaded.result()
    import_backends(denoiser.device, models.config.attention, models.config.data_folder / "kernels")
    with on_device_of(denoiser.device), suppress(Exception):
        models.fit_to(denoiser, job)
    return denoiser


def _prepare_rest(models: "Models", job: Job, loaded: "Future[Denoiser]", fitted: "Future[Denoiser]") -> None:
    """What the first step and the decode need beside the transformer."""
    try:
        wait((loaded,))
        with suppress(Exception):
            make_sampler(job.request.sampler, job.request.flow_shift, 1, torch.device("cpu"))
        wait((fitted,))  # which measures what attention takes
        _prepare_vae_kernels(models, job)
    except Exception as error:
        log.info("The decode's kernels could not be made ready beforehand: %s", error)


def _prepare_vae_kernels(models: "Models", job: Job) -> None:
    """The decode's kernels, while the denoise runs: at the first job on a machine they take half a minute."""
    plan, request = job.plan, job.request
    device, dtype = torch.device(plan.vae_device), getattr(torch, plan.vae_dtype)
    kernels = vae_kernels_to_compile(device, plan.tf32)
    if kernels is None:
        return
    size = (request.generated_height, request.generated_width)
    compile_decode(models.spec.vae, *size, plan.decode, dtype, kernels)
    if plan.keep_both:  # else what they are tried on may have no room beside the transformer
        with on_device_of(device):
            vae_kernels_for(device, dtype, models.spec.vae.base_dim, plan.tf32)
