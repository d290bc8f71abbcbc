"""The host of the VAE. It loads the decoder once, moves it to the planned device, and installs that device's kernels.
The encoder is loaded only for as long as a video is encoded."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from wanduet.kernels.device import on_device_of
from wanduet.kernels.select import guarded, vae_kernels_for, vae_kernels_to_compile, without
from wanduet.kernels.vae.choose import choose_tiles
from wanduet.kernels.vae.gpu import VAE_TRITON_KERNELS
from wanduet.meta.init import meta_init
from wanduet.models.vae.arena_size import compile_decode
from wanduet.models.vae.model import WanVAE
from wanduet.planning.plan import VAEPlan
from wanduet.request import ResolvedRequest
from wanduet.runtime import selftest
from wanduet.runtime.checkpoint import ModelCheckpoint
from wanduet.runtime.context import NO_JOB, RunContext
from wanduet.runtime.leases import PLACE, VAE, DeviceLeases
from wanduet.runtime.random_weights import randomise
from wanduet.runtime.release import drop_memory, release_memory


class VAEHost:
    """Owns the VAE. Methods except `unload` may be called from any thread."""

    def __init__(self, checkpoint: ModelCheckpoint, locks: DeviceLeases) -> None:
        self._checkpoint, self._locks = checkpoint, locks
        self._vae: WanVAE | None = None

    @property
    def loaded(self) -> WanVAE | None:
        """The VAE, if it is loaded."""
        return self._vae

    def load(self, device: str, dtype: str, context: RunContext = NO_JOB) -> WanVAE:
        """Load the VAE's decoder or move it to a device, and return it."""
        with self._locks.take(PLACE):
            return self._load(torch.device(device), getattr(torch, dtype), context)

    def _load(self, device: torch.device, dtype: torch.dtype, context: RunContext) -> WanVAE:
        if self._vae is None:
            began = time.perf_counter()
            self._vae = self._read(device, dtype, encodes=False)
            loaded = time.perf_counter()
            self._fit_to(device, dtype)
            context.add_time("load_s", loaded - began)
            context.add_time("prepare_s", time.perf_counter() - loaded)
        moved = self._vae.post_quant_conv.weight.device != device
        for part in self._vae.decoding_parts:
            part.to(device, dtype)
        if moved:  # also to the CPU, which cannot run a GPU's kernels
            self._fit_to(device, dtype)
        return self._vae

    @contextmanager
    def encoder(self, device: str, dtype: str, context: RunContext = NO_JOB) -> Iterator[WanVAE]:
        """Yield a VAE with only its encoder loaded, with PyTorch's kernels, and free it after the block. A loaded
        decoder stays as it is. Raises WeightsError."""
        on = torch.device(device)
        began = time.perf_counter()
        vae = self._read(on, getattr(torch, dtype), encodes=True)
        self._lay_out(vae, on)
        context.add_time("load_s", time.perf_counter() - began)
        try:
            yield vae
        finally:
            drop_memory(vae)
            release_memory()

    def _read(self, device: torch.device, dtype: torch.dtype, encodes: bool) -> WanVAE:
        """Return a VAE with only its encoder or its decoder loaded; the other stays on the meta device."""
        checkpoint = self._checkpoint
        with meta_init():
            vae = WanVAE(checkpoint.spec.vae).eval().requires_grad_(False)
        vae.tf32 = checkpoint.config.tf32
        checkpoint.limit_memory(device)
        needed = vae.encodes if encodes else vae.decodes
        for part in vae.encoding_parts if encodes else vae.decoding_parts:
            part.to(dtype).to_empty(device=device)
        parameters = {name: p for name, p in vae.named_parameters() if needed(name)}
        if checkpoint.folder is None:
            randomise(parameters)
        else:
            checkpoint.verify()
            rest = [name for name, _ in vae.named_parameters() if not needed(name)]
            checkpoint.folder.vae.load_into({n: p.data for n, p in parameters.items()}, ignore=rest)
            (selftest.check_vae_encoder if encodes else selftest.check_vae)(vae)
        return vae

    def _fit_to(self, device: torch.device, dtype: torch.dtype) -> None:
        assert self._vae is not None
        config, spec = self._checkpoint.config, self._checkpoint.spec.vae
        self._lay_out(self._vae, device)
        kernels = vae_kernels_for(device, dtype, spec.base_dim, config.tf32)
        if kernels.causal_conv is VAE_TRITON_KERNELS.causal_conv:
            self.choose_tiles(device, dtype)
        self._vae.use_kernels(guarded(kernels))
        self._checkpoint.keep_verdicts()

    def _lay_out(self, vae: WanVAE, device: torch.device) -> None:
        """Store a VAE's weights in the form in which a device computes."""
        if device.type == "cuda":
            vae.channels_last()
            if self._checkpoint.config.tf32:
                vae.round_to_tf32()

    def choose_tiles(self, device: torch.device, dtype: torch.dtype, may_measure: bool = True) -> None:
        """Choose the fastest tile sizes for the VAE's convolutions on a device. `may_measure` allows measuring them;
        pass False if other work runs on the device."""
        spec, config = self._checkpoint.spec.vae, self._checkpoint.config
        outputs = {spec.base_dim * factor for factor in spec.dim_mult}
        choose_tiles(device, dtype, outputs, self._checkpoint.measurements, config.tf32, may_measure)

    def prepare(self, plan: VAEPlan, request: ResolvedRequest, may_run: bool) -> None:
        """Compile a decode's kernels, in parallel with other work. It takes half a minute in the first job on a
        machine.

        `may_run` allows running the kernels' check too; pass False if its tensors may not fit on the device.
        """
        device, dtype = torch.device(plan.device), getattr(torch, plan.dtype)
        kernels = vae_kernels_to_compile(device, plan.tf32)
        if kernels is None:
            return
        self.choose_tiles(device, dtype, may_measure=False)  # the denoise runs
        spec, size = self._checkpoint.spec.vae, (request.generated_height, request.generated_width)
        compile_decode(spec, *size, plan.tiling, dtype, kernels)
        if may_run:
            with on_device_of(device):
                vae_kernels_for(device, dtype, spec.base_dim, plan.tf32)

    def without_kernel(self, operation: str) -> None:
        """Use an operation's PyTorch implementation in all later decodes."""
        with self._locks.take(VAE):
            if self._vae is not None:
                device = self._vae.post_quant_conv.weight.device
                self._vae.use_kernels(without(self._vae.kernels, operation, device))

    def evict(self, device: torch.device) -> None:
        """Move the VAE to the host if it is on `device`. This thread must have that device's lock, so that no decode
        runs there. On another device the VAE may be in use, and stays."""
        with self._locks.take(PLACE):
            if self._vae is not None and self._vae.post_quant_conv.weight.device == device:
                for part in self._vae.decoding_parts:
                    part.to("cpu")
                release_memory()

    def unload(self) -> None:
        """Free the VAE's memory. No thread may use it meanwhile."""
        vae, self._vae = self._vae, None
        if vae is not None:
            drop_memory(vae)
