"""Models on their devices, as a plan wants them: loaded once, kept between jobs, moved when they must take turns."""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.offload import allocate_streamed, stream_blocks
from wanduet.config import EngineConfig
from wanduet.engine import selftest
from wanduet.engine.job import Job
from wanduet.engine.memory import ModelMemory
from wanduet.engine.peaks import PeakMemory, look
from wanduet.engine.plan import Plan
from wanduet.engine.preload import preload
from wanduet.engine.text import CachedPromptEncoder, PromptEncoder, RandomPromptEncoder
from wanduet.models.packing import allocate_packed
from wanduet.models.transformer import Runtime, WanTransformer
from wanduet.models.vae import WanVAE
from wanduet.models.without_memory import without_memory
from wanduet.ops.attention import AttentionLseFn
from wanduet.ops.attention_choice import Choice, Shape, choose_attention
from wanduet.ops.devices import MEMORY_LIMITS, on_device_of, prepare_allocator
from wanduet.ops.fused import Kernels
from wanduet.ops.kernels import kernels_for, vae_kernels_for
from wanduet.specs import RANDOM_SPECS, ModelSpec
from wanduet.weights.download import open_model, verify_manifest
from wanduet.weights.folder import ModelFolder

if TYPE_CHECKING:
    from wanduet.engine.group import Group

log = logging.getLogger(__name__)

PARKED = -1  # resident blocks of a transformer that made room


@dataclass(slots=True)
class Denoiser:
    """The loaded transformer, and the plan's part that decided how it was loaded."""

    transformer: WanTransformer
    device: torch.device
    dtype: torch.dtype
    resident_blocks: int
    memory: HostMemory  # where blocks wait that are not on the device
    attention: str = ""
    attention_lse: AttentionLseFn | None = None
    chosen: tuple[Shape, Kernels, Choice] | None = None  # for the last job's length of sequence
    loaded_at: float = field(default_factory=time.perf_counter)
    fitted_at: float = 0.0  # when that was chosen

    def attend_with(self, choice: Choice) -> None:
        """Use that attention from the next forward on."""
        self.attention, self.attention_lse = choice.name, choice.fn_with_lse
        self.transformer.runtime = replace(self.transformer.runtime, attention=choice.fn)

    def restream(self, resident_blocks: int) -> None:
        """Keep so many blocks on the device."""
        stream_blocks(self.transformer, self.device, resident_blocks, self.memory)
        self.resident_blocks = resident_blocks

    def park(self) -> None:
        """Take all blocks off the device, and what they come through: `restream` before it runs again."""
        stream_blocks(self.transformer, self.device, 0, self.memory, num_buffers=0)
        self.resident_blocks = PARKED


class Models:
    """All models of one engine. Methods may be called from any thread."""

    def __init__(self, config: EngineConfig) -> None:
        """Raises ModelNotFoundError; reads configs and headers only."""
        self.config = config
        self._denoiser: Denoiser | None = None
        self._vae: WanVAE | None = None
        self._text: tuple[tuple[str, str], PromptEncoder] | None = None
        self._loading: Future[Denoiser] | None = None
        self._group: Group | None = None
        self.peaks = PeakMemory()
        self._loader = ThreadPoolExecutor(2, "wanduet-load")
        self._turns: dict[str, threading.RLock] = {}  # one user of a device at a time
        self._guard = threading.Lock()

    @cached_property
    def folder(self) -> ModelFolder | None:
        """Where the weights are; None for random ones."""
        if self.config.model in RANDOM_SPECS:
            return None
        return open_model(self.config.model, self.config.revision)

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's shapes and defaults."""
        return RANDOM_SPECS[self.config.model] if self.folder is None else self.folder.spec

    @cached_property
    def memory(self) -> ModelMemory:
        """What the planner computes with: the tensors' shapes. The files' headers are checked against them.

        Raises WeightsError, before a job has done any work, for files that do not fit their configs.
        """
        with without_memory():
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

    # Text.

    def text(self, plan: Plan) -> PromptEncoder:
        """The prompt encoder."""
        key = (plan.text_encoder_dtype, plan.text_encoder_hold)
        if self._text is None or self._text[0] != key:
            if self.folder is None:
                encoder: PromptEncoder = RandomPromptEncoder(self.spec)
            else:
                cache = self.config.data_folder / "embeddings" if self.config.cache_embeddings else None
                encoder = CachedPromptEncoder(self.folder, *key, cache)
            self._text = (key, encoder)
        return self._text[1]

    # Transformer.

    def preload(self, job: Job) -> None:
        """Start to load the transformer, and all that its first step needs, while the text is encoded."""
        if job.plan.strategy == "parallel":
            with self.if_idle("group") as idle:  # a group at work has loaded; the text must not wait for it
                if idle:
                    with self.group(job) as group:
                        group.preload(job)
            return
        with self._guard:
            if self._denoiser is None and self._loading is None:
                self._loading = preload(self, job, self._loader)

    @contextmanager
    def transformer(self, job: Job) -> Iterator[Denoiser]:
        """The transformer, on its device for the length of the block, set up for the job's shapes."""
        plan = job.plan
        with self._turn(plan.transformer_device), on_device_of(torch.device(plan.transformer_device)):
            began = time.perf_counter()
            denoiser = self._ready_denoiser(job)
            if not plan.keep_both:
                self._vae_to_host()
            self.fit_to(denoiser, job)
            if denoiser.fitted_at > began:  # in this job's time
                job.add_time("prepare_s", denoiser.fitted_at - max(began, denoiser.loaded_at))
            yield denoiser

    def _ready_denoiser(self, job: Job) -> Denoiser:
        loading, self._loading = self._loading, None
        if loading is not None:
            self._denoiser = loading.result()
        plan = job.plan
        wanted = (torch.device(plan.transformer_device), getattr(torch, plan.transformer_dtype))
        have = self._denoiser
        if have is not None and (have.device, have.dtype) != wanted:
            self._denoiser = have = None
            release_memory()
        if have is None:
            self._denoiser = have = self.load_denoiser(job)
        have.memory.keep_copies(not plan.keep_both)
        if have.resident_blocks != plan.resident_blocks:
            have.restream(plan.resident_blocks)
        return have

    @torch.no_grad()
    def load_denoiser(self, job: Job) -> Denoiser:
        """The transformer as the job's plan wants it, not yet set up for the job's shapes. Raises WeightsError."""
        began = time.perf_counter()
        plan, spec = job.plan, self.spec
        device, dtype = torch.device(plan.transformer_device), getattr(torch, plan.transformer_dtype)
        self._enforce_limit(device)
        resident, memory = plan.resident_blocks, self._host_memory(plan)
        with without_memory():
            transformer = WanTransformer(spec.transformer).eval().requires_grad_(False)
        if resident == spec.transformer.num_layers:
            allocate_packed(transformer, device, dtype)
        else:
            allocate_streamed(transformer, device, dtype, resident, memory)
        parameters = dict(transformer.named_parameters())
        if self.folder is None:
            _randomise(parameters)
        else:
            self._verify()
            self.folder.transformer.load_into({n: p.data for n, p in parameters.items()})
        if resident < spec.transformer.num_layers:
            stream_blocks(transformer, device, resident, memory)
        if self.folder is not None:
            selftest.check_transformer(transformer, spec.text_len)
        job.add_time("load_s", time.perf_counter() - began)
        return Denoiser(transformer, device, dtype, resident, memory)

    def fit_to(self, denoiser: Denoiser, job: Job) -> None:
        """Kernels and attention for the job's length of sequence."""
        request, t = job.request, self.spec.transformer
        tokens = self.spec.num_tokens(request.generated_height, request.generated_width, request.num_frames)
        folder = self.config.data_folder / "measurements"
        heads = (t.num_attention_heads, t.attention_head_dim)

        shape = Shape(tokens, tokens, *heads)
        if denoiser.chosen is None or denoiser.chosen[0] != shape:  # jobs of one size follow each other
            kernels = kernels_for(denoiser.device, denoiser.dtype, *heads)
            choice = choose_attention(denoiser.device, shape, denoiser.dtype, self.config.attention, folder)
            denoiser.chosen = (shape, kernels, choice)
            denoiser.fitted_at = time.perf_counter()
        _, kernels, choice = denoiser.chosen
        denoiser.transformer.runtime = Runtime(kernels=kernels, share_first=job.plan.share_first)
        denoiser.attend_with(choice)

    @contextmanager
    def if_idle(self, device: str) -> Iterator[bool]:
        """Whether nobody else uses a device; if so, nobody does for the length of the block."""
        turn = self._turn(device)
        idle = turn.acquire(blocking=False)
        try:
            yield idle
        finally:
            if idle:
                turn.release()

    # A group of ranks.

    @contextmanager
    def group(self, job: Job) -> "Iterator[Group]":
        """The processes that share a `parallel` job's work, for one user at a time; started when needed."""
        from wanduet.engine.group import Group  # which imports this module, in its processes

        with self._turn("group"):
            if self._group is not None and self._group.devices != job.plan.ranks:
                self.close_group()
            if self._group is None:
                self._group = Group(self.config, job.plan)
            yield self._group

    def close_group(self) -> None:
        """End the group's processes; the next job starts new ones."""
        with self._turn("group"):
            group, self._group = self._group, None
            if group is not None:
                group.close()

    # VAE.

    @contextmanager
    def vae(self, job: Job, device: str) -> Iterator[WanVAE]:
        """The VAE, on a device for the length of the block."""
        with self._turn(device), on_device_of(torch.device(device)):
            if not job.plan.keep_both:
                self.make_room(device)
            yield self.load_vae(device, job.plan.vae_dtype, job)

    def make_room(self, device: str) -> None:
        """Take the transformer's blocks off a device; the next denoise brings them back."""
        with self._turn(device):
            denoiser = self._denoiser
            if denoiser is not None and denoiser.device == torch.device(device) and denoiser.device.type != "cpu":
                denoiser.park()
            release_memory()

    def load_vae(self, device: str, dtype: str, job: Job | None = None) -> WanVAE:
        """The VAE's decoder on a device, loaded or moved there."""
        began = time.perf_counter()
        kind = getattr(torch, dtype)
        if self._vae is None:
            with without_memory():
                vae = WanVAE(self.spec.vae).eval().requires_grad_(False)
            vae.tf32 = self.config.tf32
            self._enforce_limit(torch.device(device))
            for part in vae.decoding_parts:  # the encoder stays without memory
                part.to(kind).to_empty(device=device)
            parameters = {name: p for name, p in vae.named_parameters() if vae.decodes(name)}
            if self.folder is None:
                _randomise(parameters)
            else:
                self._verify()
                rest = [name for name, _ in vae.named_parameters() if not vae.decodes(name)]
                self.folder.vae.load_into({n: p.data for n, p in parameters.items()}, ignore=rest)
                selftest.check_vae(vae)
            self._vae = vae
            loaded = time.perf_counter()
            self._fit_vae_to(torch.device(device), kind)
            if job is not None:
                job.add_time("load_s", loaded - began)
                job.add_time("prepare_s", time.perf_counter() - loaded)
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
        self._vae.use_kernels(vae_kernels_for(device, dtype, self.spec.vae.base_dim, self.config.tf32))

    def _vae_to_host(self) -> None:
        if self._vae is not None:
            for part in self._vae.decoding_parts:
                part.to("cpu")
            release_memory()

    # Housekeeping.

    def recover(self, error: BaseException) -> None:
        """After a failure: nothing of it stays on the devices."""
        loading, self._loading = self._loading, None
        if loading is not None and loading.done() and loading.exception() is None:
            self._denoiser = loading.result()
        error.__traceback__ = None  # its frames hold tensors
        release_memory()

    def peak_memory(self) -> dict[str, int]:
        """Peak bytes by device since a job last began: what the allocator reserved on GPUs, the process's resident memory on the host."""
        return look()

    def unload(self) -> None:
        """Drop everything."""
        self.close_group()
        self._loader.shutdown(wait=True)
        self._denoiser = self._vae = self._text = self._loading = None
        release_memory()
        MEMORY_LIMITS.let_go(self)

    def _enforce_limit(self, device: torch.device) -> None:
        """Let the allocator itself keep `--vram-limit`: beyond it, memory runs out and the ladder is walked."""
        prepare_allocator(device)
        if device.type == "cuda":
            MEMORY_LIMITS.hold(device, self, self.config.vram_limit)

    def _host_memory(self, plan: Plan) -> HostMemory:
        """Where blocks wait that are not on the device."""
        if torch.device(plan.transformer_device).type != "cuda":
            return HostMemory("plain")
        return HostMemory(plan.block_hold, self.config.data_folder / "blocks")

    def _verify(self) -> None:
        if self.folder is not None:
            verify_manifest(self.folder, self.config.data_folder / "verified.json")

    def _turn(self, device: str) -> threading.RLock:
        with self._guard:
            return self._turns.setdefault(device, threading.RLock())


def release_memory() -> None:
    """Give cached blocks back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _randomise(parameters: Mapping[str, Tensor]) -> None:
    """Random weights of the true shapes: norms of one, small matrices, so that activations stay finite.

    The same ones each time, on devices of one kind.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for seed, (name, parameter) in enumerate(sorted(parameters.items())):
        if parameter.ndim == 1 or "gamma" in name:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = generators.setdefault(parameter.device, torch.Generator(parameter.device))
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator.manual_seed(seed))
