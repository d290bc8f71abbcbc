"""The host of the transformer: loads it once, keeps it between jobs, swaps its blocks, and sets it up for each job."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from threading import Event

import torch
from torch import Tensor

from wanduet.accelerate.formats import load_targets
from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.lora import MergedLoras
from wanduet.accelerate.passes import LoadContext, run_passes
from wanduet.errors import CancelledError, OutOfMemoryError
from wanduet.family.attention import attention_for
from wanduet.family.sparsity import ALL, block_for, first_sparse_step
from wanduet.kernels.attention.backends import import_backends
from wanduet.kernels.attention.choose import Shape, choose_attention
from wanduet.kernels.attention.sparse_steps import SPARSE, SparseSteps, choose_listed
from wanduet.kernels.attention.trained import TrainedSparse
from wanduet.kernels.device import on_device_of
from wanduet.kernels.dit.quantized import EightBits
from wanduet.kernels.dit.weight import Weight, format_of
from wanduet.kernels.select import guarded, kernels_for, quantized_kernels_for
from wanduet.meta.init import meta_init
from wanduet.models.dit.block import Runtime
from wanduet.models.dit.model import WanTransformer
from wanduet.models.dit.quantizer import Quantizer
from wanduet.planning.plan import Plan, TransformerPlan
from wanduet.request import ResolvedRequest
from wanduet.runtime import selftest
from wanduet.runtime.checkpoint import ModelCheckpoint
from wanduet.runtime.context import Event as Progress
from wanduet.runtime.context import RunContext
from wanduet.runtime.gil import SHORT_SWITCHES, finish_unless
from wanduet.runtime.leases import DeviceLeases
from wanduet.runtime.loaded import LoadedTransformer
from wanduet.runtime.loading import Loading, Start, Targets
from wanduet.runtime.loras import LoraFiles
from wanduet.runtime.prompt_host import PromptHost
from wanduet.runtime.random_weights import RandomSource, randomise
from wanduet.runtime.release import release_memory, release_models
from wanduet.runtime.vae_host import VAEHost
from wanduet.sampling.samplers import Schedule, make_sampler

log = logging.getLogger(__name__)


class TransformerHost:
    """Owns the transformer. Methods may be called from any thread.

    The first load also prepares, in a parallel thread, what else the first job needs (imports, decode kernels). An
    error there is ignored: the code that needs the result repeats the work, and raises the error.
    """

    def __init__(self, checkpoint: ModelCheckpoint, locks: DeviceLeases, vae: VAEHost, prompts: PromptHost) -> None:
        self._checkpoint, self._locks, self._vae, self._prompts = checkpoint, locks, vae, prompts
        self.loras = LoraFiles(checkpoint)
        self._loading = Loading()

    @property
    def loaded(self) -> LoadedTransformer | None:
        """The transformer, if it is loaded."""
        return self._loading.loaded

    def preload(self, plan: Plan, request: ResolvedRequest, context: RunContext) -> None:
        """Start loading the transformer and all that its first step needs, in the background. Does not wait."""
        self._loading.begin(self._start(plan, request, context), context.id)

    @contextmanager
    def use(self, plan: Plan, request: ResolvedRequest, context: RunContext) -> Iterator[LoadedTransformer]:
        """Yield the transformer, loaded on its device and set up for the request's shapes, with its LoRAs merged. The block
        has the device's lock. `adapt(step, context)` of the transformer merges what the request has at a step of the
        schedule, between two forwards; it returns whether weights changed.

        Raises InvalidRequestError (a LoRA's file has changed), WeightsError, OutOfMemoryError, or CancelledError if the job
        is cancelled or the engine closed meanwhile.
        """
        device = torch.device(plan.transformer.device)
        with self._locks.take(plan.transformer.device), on_device_of(device):
            began = time.perf_counter()
            self._prompts.make_room(plan.transformer.device, plan.text)
            if not plan.both_resident:  # first: the blocks may not fit beside the VAE
                self._vae.evict(device)
            denoiser = self._loaded(plan, request, context)
            denoiser.adapt = partial(_adapt, self.loras, denoiser.loras, request)
            with context.timed("load_s"):
                denoiser.adapt(request.first_step, context)
            self.fit_to(denoiser, plan.transformer, request)
            if denoiser.fitted_at > began:  # this job waited for it
                context.add_time("prepare_s", denoiser.fitted_at - max(began, denoiser.loaded_at))
            if denoiser.sparse is None and _is_sparse(request, denoiser):
                context.note(f"denoise: all keys: {SPARSE} has failed here before")
            yield denoiser

    def _loaded(self, plan: Plan, request: ResolvedRequest, context: RunContext) -> LoadedTransformer:
        start, part = self._start(plan, request, context), plan.transformer
        kind = torch.device(part.device), getattr(torch, part.dtype)
        while ((denoiser := self._loading.wait(start, context)).device, denoiser.dtype) != kind:
            del denoiser  # an earlier job loaded it with another device or dtype
            self._loading.drop()
        denoiser.memory.retain_copies(not plan.both_resident)
        if denoiser.resident_blocks != part.resident_blocks:
            denoiser.restream(part.resident_blocks)
        return denoiser

    def settle(self, context: RunContext) -> None:
        """Wait until no load of the transformer is running; starts none. Raises CancelledError."""
        self._loading.settle(context)

    def evict(self, device: str) -> None:
        """Move the transformer's blocks off a device; the next `use` moves them back."""
        with self._locks.take(device):
            denoiser = self._loading.loaded
            if denoiser is not None and denoiser.device == torch.device(device) and denoiser.device.type != "cpu":
                denoiser.swap_out()
            release_memory()

    def fit_to(self, denoiser: LoadedTransformer, plan: TransformerPlan, request: ResolvedRequest) -> None:
        """Choose kernels and attention for the request's sequence length, and install them in the transformer."""
        checkpoint, t = self._checkpoint, self._checkpoint.spec.transformer
        tokens = checkpoint.spec.num_tokens(request.generated_height, request.generated_width, request.num_frames)
        heads = (t.num_attention_heads, t.attention_head_dim)
        shape = Shape(tokens, tokens, *heads)
        requested = attention_for(request.quantize_attention, checkpoint.config.attention)
        if denoiser.chosen is None or denoiser.chosen[0] != shape:  # consecutive jobs often have one size
            kernels, denoiser.requested = guarded(kernels_for(denoiser.device, denoiser.dtype, *heads)), ""
            checkpoint.keep_verdicts()
        else:
            kernels = denoiser.chosen[1]
        if denoiser.requested != requested:
            choice = choose_attention(denoiser.device, shape, denoiser.dtype, requested, checkpoint.measurements)
            denoiser.chosen, denoiser.requested = (shape, kernels, choice), requested
            denoiser.fitted_at = time.perf_counter()
        assert denoiser.chosen is not None
        _, kernels, choice = denoiser.chosen
        denoiser.sparse = sparse_steps(request, tokens, denoiser)
        block = (
            block_for(tokens) if _is_sparse(request, denoiser) else None
        )  # also where its kernels have failed: ranks agree
        quantizer = None if request.quantize == "off" else self._quantizer(denoiser, request.quantize)
        denoiser.transformer.runtime = Runtime(
            kernels=kernels,
            share_first=plan.share_first,
            token_block=block,
            quantizer=quantizer,
            trained=trained_sparse(request, denoiser),
        )
        denoiser.attend_with(choice)

    def _quantizer(self, denoiser: LoadedTransformer, format: EightBits) -> Quantizer:
        """Return what quantizes one job's products, with kernels that are checked and timed at the first such job."""
        if denoiser.quantized is None or denoiser.quantized[0] != format:
            checkpoint, t = self._checkpoint, self._checkpoint.spec.transformer
            widths = (t.num_attention_heads, t.attention_head_dim, t.ffn_dim)
            kernels = quantized_kernels_for(denoiser.device, denoiser.dtype, format, widths, checkpoint.measurements)
            checkpoint.keep_verdicts()
            denoiser.quantized = (format, guarded(kernels))
            denoiser.fitted_at = time.perf_counter()
        return Quantizer(*denoiser.quantized)

    def stop_loading(self) -> None:
        """Stop a running load as soon as possible; its waiters get CancelledError. Call `unload` afterwards."""
        self._loading.stop()

    def unload(self) -> None:
        """Free the transformer's memory. No thread may use it meanwhile."""
        self._loading.close()

    # One load.

    def _start(self, plan: Plan, request: ResolvedRequest, context: RunContext) -> Start:
        """Return a function that starts a load; its future gives the transformer, set up for the job.

        Imports run after the load: they keep the GIL most of the time.
        """

        def start(pool: ThreadPoolExecutor) -> Future[LoadedTransformer]:
            loaded = pool.submit(self.load, plan.transformer, context)
            fitted = pool.submit(self._fit, loaded, plan.transformer, request)
            # Events, not the futures: those would keep the transformer alive, and the rest may take half a minute.
            is_loaded, is_fitted = Event(), Event()
            loaded.add_done_callback(lambda _: is_loaded.set())
            fitted.add_done_callback(lambda _: is_fitted.set())
            rest = pool.submit(self._prepare_rest, plan, request, context, (is_loaded, is_fitted))
            SHORT_SWITCHES.begin()
            rest.add_done_callback(lambda _: SHORT_SWITCHES.end())  # also if `close` cancels it before it begins
            return fitted

        return start

    @torch.no_grad()
    def load(self, plan: TransformerPlan, context: RunContext) -> LoadedTransformer:
        """Load the transformer as planned (device, dtype, resident blocks), not yet set up for a request's shapes.

        Raises WeightsError, OutOfMemoryError, or CancelledError if the engine is closed meanwhile.
        """
        began = time.perf_counter()
        try:
            denoiser = self._read(plan)
        except torch.OutOfMemoryError as error:
            problem = str(error).split(". ")[0]
        else:
            context.add_time("load_s", time.perf_counter() - began)
            return denoiser
        release_models()  # outside the except block, whose traceback keeps the loaded tensors alive
        raise OutOfMemoryError(
            f"The transformer's weights found too little memory on {plan.device} ({problem}).",
            hint="Other programs may use it: see nvidia-smi, free it or set --vram-limit, and try again.",
        )

    def _read(self, plan: TransformerPlan) -> LoadedTransformer:
        checkpoint, spec = self._checkpoint, self._checkpoint.spec
        device, dtype = torch.device(plan.device), getattr(torch, plan.dtype)
        checkpoint.limit_memory(device)
        with meta_init():
            transformer = WanTransformer(spec.transformer).eval().requires_grad_(False)
        context = LoadContext(
            device, dtype, plan.resident_blocks, self._host_memory(plan), self._fill, format_of(plan.weights, dtype)
        )
        run_passes(transformer, context)
        if checkpoint.folder is not None:
            self._check_open()
            selftest.check_transformer(transformer, spec.text_len)
        base = RandomSource(load_targets(transformer)) if checkpoint.folder is None else checkpoint.folder.transformer
        return LoadedTransformer(
            spec, transformer, device, dtype, plan.resident_blocks, context.memory,
            loras=MergedLoras(transformer, context.memory, base.iterate),
        )  # fmt: skip

    def _fill(self, targets: dict[str, Tensor | Weight]) -> None:
        """Write the checkpoint's weights, or random ones, into parameters and matrices."""
        checkpoint = self._checkpoint
        if checkpoint.folder is None:
            randomise(targets)
        else:
            checkpoint.verify()
            checkpoint.folder.transformer.load_into(Targets(targets, self._check_open))

    def _host_memory(self, plan: TransformerPlan) -> HostMemory:
        """Return the host memory for blocks that are not on the device."""
        if torch.device(plan.device).type != "cuda":
            return HostMemory("plain")
        return HostMemory(plan.offload_memory, self._checkpoint.config.data_folder / "blocks")

    def _check_open(self) -> None:
        if self._loading.stopped.is_set():
            raise CancelledError("The engine was closed while it loaded.")

    def _fit(
        self, loaded: Future[LoadedTransformer], plan: TransformerPlan, request: ResolvedRequest
    ) -> LoadedTransformer:
        denoiser, config = loaded.result(), self._checkpoint.config
        requested = attention_for(request.quantize_attention, config.attention)
        import_backends(denoiser.device, requested, config.data_folder / "kernels")
        with on_device_of(denoiser.device), suppress(Exception):
            self.fit_to(denoiser, plan, request)
        return denoiser

    def _prepare_rest(
        self, plan: Plan, request: ResolvedRequest, context: RunContext, steps: tuple[Event, Event]
    ) -> None:
        """Import the sampler once the transformer is loaded; prepare the decode's kernels once it is set up."""
        is_loaded, is_fitted = steps
        try:
            is_loaded.wait()
            imports = partial(make_sampler, Schedule(request.sampler, request.flow_shift, 1), 0, torch.device("cpu"))
            finish_unless(context.should_cancel, imports)
            is_fitted.wait()  # the setup measures attention: nothing else may run on the device
            if not context.should_cancel():
                self._vae.prepare(plan.vae, request, may_run=plan.both_resident)
        except Exception as error:
            log.info("The decode's kernels could not be made ready beforehand: %s", error)


def _adapt(
    files: LoraFiles, merged: MergedLoras | None, request: ResolvedRequest, step: int, context: RunContext
) -> bool:
    """Merge what a request has at a step of the schedule. Not a method: the transformer would refer to its host."""

    def show(done: int, total: int) -> None:
        context.check_cancelled()
        context.emit(Progress("load", done, total))

    has_changed = merged is not None and merged.merge(files.at_step(request, step), show)
    if has_changed:
        release_memory()  # of float32 copies, which would count in the job's peak
    return has_changed


def sparse_steps(request: ResolvedRequest, tokens: int, denoiser: LoadedTransformer) -> SparseSteps | None:
    """Return how a request's denoise of so many tokens is sparse; None for dense, also where the kernels have failed in a job.
    Raises ConfigError if they do not work on the transformer's device."""
    if not _is_sparse(request, denoiser):
        return None
    block = block_for(tokens)
    head_dim = denoiser.spec.transformer.attention_head_dim
    backend = choose_listed(denoiser.device, denoiser.dtype, head_dim, block)
    if backend is None:
        return None
    return SparseSteps(
        backend, request.sparse, block, first_sparse_step(request.first_step, request.num_denoising_steps)
    )


def _is_sparse(request: ResolvedRequest, denoiser: LoadedTransformer) -> bool:
    return request.sparse < ALL and denoiser.spec.transformer.attention == "dense"


def trained_sparse(request: ResolvedRequest, denoiser: LoadedTransformer) -> TrainedSparse:
    """Return how attention that is trained to be sparse runs, and note its kernel: the plain form where others have failed in
    a job. Raises ConfigError if they do not work on the transformer's device."""
    spec = denoiser.spec.transformer
    if spec.attention == "dense":
        return TrainedSparse()
    return TrainedSparse(denoiser.listed_of_trained(), None if request.sparse == ALL else request.sparse)
