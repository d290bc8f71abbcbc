"""Models on their devices, as a plan wants them: loaded once, kept between jobs, moved when they must take turns."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import nn

from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.offload import allocate_streamed, stream_blocks
from wanduet.accelerate.packing import allocate_packed
from wanduet.config import EngineConfig
from wanduet.engine.job import Event, Job, Planned
from wanduet.engine.preload import Loading, Targets
from wanduet.errors import CancelledError, OutOfMemoryError
from wanduet.family.specs import RANDOM_SPECS, ModelSpec
from wanduet.footprint.phases import ModelMemory
from wanduet.kernels.attention.choose import Shape, choose_attention
from wanduet.kernels.device import MEMORY_LIMITS, on_device_of, prepare_allocator
from wanduet.kernels.select import guarded, kernels_for, vae_kernels_for, without
from wanduet.kernels.vae.choose import choose_tiles
from wanduet.kernels.vae.gpu import VAE_TRITON_KERNELS
from wanduet.kernels.verdicts import read_verdicts, write_verdicts
from wanduet.meta.init import meta_init
from wanduet.models.dit.model import Runtime, WanTransformer
from wanduet.models.vae.model import WanVAE
from wanduet.planning.plan import Plan
from wanduet.runtime import selftest
from wanduet.runtime.denoiser import Denoiser
from wanduet.runtime.leases import GROUP, PLACE, VAE, Locks
from wanduet.runtime.peaks import PEAKS, look
from wanduet.runtime.random_weights import randomise
from wanduet.runtime.release import drop_memory, release_memory, release_models
from wanduet.runtime.text_host import CachedPromptEncoder, PromptEncoder, RandomPromptEncoder
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.hub import open_model, verify_manifest

if TYPE_CHECKING:
    from wanduet.engine.group import Group

MIB = 2**20


class Models:
    """All models of one engine. Methods may be called from any thread."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises ModelNotFoundError; reads configs and headers only."""
        self.config = config
        self.locks = Locks()
        self.peaks = PEAKS
        self._loading = Loading()
        read_verdicts(config.data_folder / "measurements")
        self._vae: WanVAE | None = None
        self._text: tuple[tuple[str, str], PromptEncoder] | None = None
        self._group: Group | None = None

    @cached_property
    def folder(self) -> ModelFolder | None:
        """Where the weights are; None for random ones."""
        if self.config.model in RANDOM_SPECS:
            return None
        return open_model(self.config.model, self.config.revision, remember=self.config.data_folder / "verified.json")

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's shapes and defaults."""
        return RANDOM_SPECS[self.config.model] if self.folder is None else self.folder.spec

    @cached_property
    def memory(self) -> ModelMemory:
        """What the planner computes with: the tensors' shapes. The files' headers are checked against them.

        Raises WeightsError, before a job has done any work, for files that do not fit their configs.
        """
        with meta_init():
            modules: tuple[nn.Module, ...] = (WanTransformer(self.spec.transformer), WanVAE(self.spec.vae))
        shapes = [{n: tuple(p.shape) for n, p in m.named_parameters()} for m in modules]
        if self.folder is not None:
            self.folder.transformer.check(shapes[0])
            self.folder.vae.check(shapes[1])
        return ModelMemory(self.spec, *shapes)

    @property
    def about(self) -> dict[str, str | None]:
        """Name, weights' hash and revision, for provenance."""
        folder = self.folder
        if folder is None:
            return {"name": self.config.model, "hash": None, "revision": None}
        return {"name": folder.name, "hash": folder.fingerprint, "revision": folder.revision}

    def verify_weights(self, job: Job) -> None:
        """Hash the weights that were not hashed on this machine before; the job shows how far that is.

        Raises WeightsError, or CancelledError if the job is cancelled meanwhile.
        """
        if self.folder is None:
            return

        def show(done: int, total: int) -> None:
            job.check_cancelled()
            job.emit(Event("verify", done // MIB, total // MIB))

        with job.timed("verify_s"):
            verify_manifest(self.folder, self.config.data_folder / "verified.json", (), show)

    # Text.

    def text(self, plan: Plan) -> PromptEncoder:
        """The prompt encoder."""
        key = (plan.text.dtype, plan.text.residency)
        if self._text is None or self._text[0] != key:
            if self.folder is None:
                encoder: PromptEncoder = RandomPromptEncoder(self.spec)
            else:
                cache = self.config.data_folder / "embeddings" if self.config.cache_embeddings else None
                encoder = CachedPromptEncoder(self.folder, *key, cache)
            self._text = (key, encoder)
        return self._text[1]

    # Transformer.

    def preload(self, work: Planned) -> None:
        """Start to load the transformer, and all that its first step needs, while the text is encoded."""
        if work.plan.strategy == "parallel":
            with self.locks.if_idle(GROUP) as idle:  # a group at work has loaded; the text must not wait for it
                if idle:
                    with self.group(work) as group:
                        group.preload(work)
        else:
            self._loading.begin(self, work)

    @property
    def _denoiser(self) -> Denoiser | None:
        return self._loading.loaded

    @contextmanager
    def transformer(self, work: Planned) -> Iterator[Denoiser]:
        """The transformer, on its device for the length of the block, set up for the job's shapes."""
        plan = work.plan
        device = torch.device(plan.transformer.device)
        with self.locks.take(plan.transformer.device), on_device_of(device):
            began = time.perf_counter()
            if not plan.both_resident:  # first: there may be no room for its blocks beside the VAE
                self._vae_to_host(device)
            denoiser = self._ready_denoiser(work)
            self.fit_to(denoiser, work)
            if denoiser.fitted_at > began:  # in this job's time
                work.add_time("prepare_s", denoiser.fitted_at - max(began, denoiser.loaded_at))
            yield denoiser

    def _ready_denoiser(self, work: Planned) -> Denoiser:
        plan = work.plan
        wanted = (torch.device(plan.transformer.device), getattr(torch, plan.transformer.dtype))
        while ((have := self._loading.wait(self, work)).device, have.dtype) != wanted:
            del have  # it was loaded for another job, which wanted it otherwise
            self._loading.drop()
        have.memory.retain_copies(not plan.both_resident)
        if have.resident_blocks != plan.transformer.resident_blocks:
            have.restream(plan.transformer.resident_blocks)
        return have

    @torch.no_grad()
    def load_denoiser(self, work: Planned) -> Denoiser:
        """The transformer as the job's plan wants it, not yet set up for the job's shapes.

        Raises WeightsError, OutOfMemoryError, or CancelledError if the engine is closed meanwhile.
        """
        began = time.perf_counter()
        try:
            denoiser = self._load_denoiser(work.plan)
        except torch.OutOfMemoryError as error:
            problem = str(error).split(". ")[0]
        else:
            work.add_time("load_s", time.perf_counter() - began)
            return denoiser
        release_models()  # outside the handler, whose traceback holds what was loaded
        raise OutOfMemoryError(
            f"The transformer's weights found too little memory on {work.plan.transformer.device} ({problem}).",
            hint="Other programs may use it: see nvidia-smi, free it or set --vram-limit, and try again.",
        )

    def _load_denoiser(self, plan: Plan) -> Denoiser:
        spec = self.spec
        device, dtype = torch.device(plan.transformer.device), getattr(torch, plan.transformer.dtype)
        self._enforce_limit(device)
        resident, memory = plan.transformer.resident_blocks, self._host_memory(plan)
        with meta_init():
            transformer = WanTransformer(spec.transformer).eval().requires_grad_(False)
        if resident == spec.transformer.num_layers:
            allocate_packed(transformer, device, dtype)
        else:
            allocate_streamed(transformer, device, dtype, resident, memory)
        parameters = dict(transformer.named_parameters())
        if self.folder is None:
            randomise(parameters)
        else:
            self._verify()
            self.folder.transformer.load_into(Targets(parameters, self._check_open))
        if resident < spec.transformer.num_layers:
            stream_blocks(transformer, device, resident, memory)
        if self.folder is not None:
            self._check_open()
            selftest.check_transformer(transformer, spec.text_len)
        return Denoiser(transformer, device, dtype, resident, memory)

    def _check_open(self) -> None:
        if self._loading.stopped.is_set():
            raise CancelledError("The engine was closed while it loaded.")

    def fit_to(self, denoiser: Denoiser, work: Planned) -> None:
        """Kernels and attention for the job's length of sequence."""
        request, t = work.request, self.spec.transformer
        tokens = self.spec.num_tokens(request.generated_height, request.generated_width, request.num_frames)
        folder = self.config.data_folder / "measurements"
        heads = (t.num_attention_heads, t.attention_head_dim)

        shape = Shape(tokens, tokens, *heads)
        if denoiser.chosen is None or denoiser.chosen[0] != shape:  # jobs of one size follow each other
            kernels = guarded(kernels_for(denoiser.device, denoiser.dtype, *heads))
            self.keep_verdicts()
            choice = choose_attention(denoiser.device, shape, denoiser.dtype, self.config.attention, folder)
            denoiser.chosen = (shape, kernels, choice)
            denoiser.fitted_at = time.perf_counter()
        _, kernels, choice = denoiser.chosen
        denoiser.transformer.runtime = Runtime(kernels=kernels, share_first=work.plan.transformer.share_first)
        denoiser.attend_with(choice)

    def keep_verdicts(self) -> None:
        """Keep what was seen of kernels for plans and processes to come."""
        if torch.cuda.is_available():
            write_verdicts(self.config.data_folder / "measurements")

    # A group of ranks.

    @contextmanager
    def group(self, work: Planned) -> "Iterator[Group]":
        """The processes that share a `parallel` job's work, for one user at a time; started when needed. If the block
        fails, they may have ended, or be at work on what nobody waits for: the next job starts new ones."""
        from wanduet.engine.group import Group, collective_timeout  # which imports this module, in its processes

        with self.locks.take(GROUP):
            if self._group is not None and not self._group.suits(work):
                self.close_group()
            if self._group is None:
                self._group = Group(self.config, work.plan, collective_timeout(work))
            try:
                yield self._group
            except CancelledError:  # of a task that has a number, by which the ranks skip it
                raise
            except BaseException:
                self.close_group()
                raise

    def close_group(self) -> None:
        """End the group's processes; the next job starts new ones."""
        with self.locks.take(GROUP):
            group, self._group = self._group, None
            if group is not None:
                group.close()

    # VAE.

    @contextmanager
    def vae(self, work: Planned, device: str) -> Iterator[WanVAE]:
        """The VAE, on a device for the length of the block."""
        with self.locks.take(VAE), self.locks.take(device), on_device_of(torch.device(device)):
            if not work.plan.both_resident:
                self.make_room(device)
            yield self.load_vae(device, work.plan.vae.dtype, work)

    def make_room(self, device: str) -> None:
        """Take the transformer's blocks off a device; the next denoise brings them back."""
        with self.locks.take(device):
            denoiser = self._denoiser
            if denoiser is not None and denoiser.device == torch.device(device) and denoiser.device.type != "cpu":
                denoiser.swap_out()
            release_memory()

    def load_vae(self, device: str, dtype: str, work: Planned | None = None) -> WanVAE:
        """The VAE's decoder on a device, loaded or moved there."""
        with self.locks.take(PLACE):
            return self._load_vae(device, dtype, work)

    def _load_vae(self, device: str, dtype: str, work: Planned | None) -> WanVAE:
        began = time.perf_counter()
        kind = getattr(torch, dtype)
        if self._vae is None:
            with meta_init():
                vae = WanVAE(self.spec.vae).eval().requires_grad_(False)
            vae.tf32 = self.config.tf32
            self._enforce_limit(torch.device(device))
            for part in vae.decoding_parts:  # the encoder stays without memory
                part.to(kind).to_empty(device=device)
            parameters = {name: p for name, p in vae.named_parameters() if vae.decodes(name)}
            if self.folder is None:
                randomise(parameters)
            else:
                self._verify()
                rest = [name for name, _ in vae.named_parameters() if not vae.decodes(name)]
                self.folder.vae.load_into({n: p.data for n, p in parameters.items()}, ignore=rest)
                selftest.check_vae(vae)
            self._vae = vae
            loaded = time.perf_counter()
            self._fit_vae_to(torch.device(device), kind)
            if work is not None:
                work.add_time("load_s", loaded - began)
                work.add_time("prepare_s", time.perf_counter() - loaded)
        moved = self._vae.post_quant_conv.weight.device != torch.device(device)
        for part in self._vae.decoding_parts:
            part.to(device, kind)
        if moved:  # also to the CPU, where a GPU's kernels must not follow
            self._fit_vae_to(torch.device(device), kind)
        return self._vae

    def _fit_vae_to(self, device: torch.device, dtype: torch.dtype) -> None:
        assert self._vae is not None
        if device.type == "cuda":
            self._vae.channels_last()
            if self.config.tf32:
                self._vae.round_to_tf32()
        kernels = vae_kernels_for(device, dtype, self.spec.vae.base_dim, self.config.tf32)
        if kernels.causal_conv is VAE_TRITON_KERNELS.causal_conv:
            self.choose_tiles(device, dtype)
        self._vae.use_kernels(guarded(kernels))
        self.keep_verdicts()

    def choose_tiles(self, device: torch.device, dtype: torch.dtype, may_measure: bool = True) -> None:
        """Let the VAE's convolutions take the tiles that are fastest on a device. `may_measure`: nothing else runs there."""
        vae, folder = self.spec.vae, self.config.data_folder / "measurements"
        outputs = {vae.base_dim * factor for factor in vae.dim_mult}
        choose_tiles(device, dtype, outputs, folder, self.config.tf32, may_measure)

    def without_vae_kernel(self, operation: str) -> None:
        """Decode with an operation's plain form from now on."""
        with self.locks.take(VAE):
            if self._vae is not None:
                device = self._vae.post_quant_conv.weight.device
                self._vae.use_kernels(without(self._vae.kernels, operation, device))

    def _vae_to_host(self, device: torch.device) -> None:
        """Take the VAE off a device, which this thread has locked: so nobody decodes there. On another one it may be
        decoding, and stays."""
        with self.locks.take(PLACE):
            if self._vae is not None and self._vae.post_quant_conv.weight.device == device:
                for part in self._vae.decoding_parts:
                    part.to("cpu")
                release_memory()

    # Housekeeping.

    def peak_memory(self) -> dict[str, int]:
        """Peak bytes by device since a job last began: what the allocator reserved on GPUs, the process's resident memory on the host."""
        return look()

    def stop_loading(self) -> None:
        """Let a load under way end as soon as it can; what waits for it fails with CancelledError. `unload` follows."""
        self._loading.stop()

    def unload(self) -> None:
        """Drop everything, and give its memory back at once. Nobody may use the models meanwhile."""
        self.close_group()
        vae, self._vae, self._text = self._vae, None, None
        with suppress(RuntimeError):  # a device that has failed says so at every call
            self._loading.close()
        if vae is not None:
            with suppress(RuntimeError):
                drop_memory(vae)
        del vae
        with suppress(RuntimeError):
            release_models()
        MEMORY_LIMITS.let_go(self)

    def _enforce_limit(self, device: torch.device) -> None:
        """Let the allocator itself keep `--vram-limit`: beyond it, memory runs out and the ladder is walked."""
        prepare_allocator(device)
        if device.type == "cuda":
            MEMORY_LIMITS.hold(device, self, self.config.vram_limit)

    def _host_memory(self, plan: Plan) -> HostMemory:
        """Where blocks wait that are not on the device."""
        if torch.device(plan.transformer.device).type != "cuda":
            return HostMemory("plain")
        return HostMemory(plan.transformer.offload_memory, self.config.data_folder / "blocks")

    def _verify(self) -> None:
        if self.folder is not None:
            verify_manifest(self.folder, self.config.data_folder / "verified.json")
