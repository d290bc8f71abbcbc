"""All models of one engine, each in its own host, and the locks of their devices."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch

from wanduet.config import EngineConfig
from wanduet.family.attention import FIELD as QUANTIZE_ATTENTION
from wanduet.family.spec import ModelSpec
from wanduet.family.speeds import Price
from wanduet.footprint.phases import ModelMemory
from wanduet.kernels.device import on_device_of
from wanduet.media.input_video import resolve
from wanduet.models.vae.model import WanVAE
from wanduet.planning.hardware import Hardware, detect
from wanduet.planning.plan import Plan, TextPlan
from wanduet.planning.planner import make_plan
from wanduet.planning.prices import has_fast_8_bit_attention, loss_of
from wanduet.request import GenerationRequest, ResolvedRequest
from wanduet.runtime.checkpoint import ModelCheckpoint
from wanduet.runtime.context import RunContext
from wanduet.runtime.dit_host import TransformerHost
from wanduet.runtime.leases import VAE, DeviceLeases
from wanduet.runtime.peaks import PEAKS
from wanduet.runtime.prompt_host import PromptHost
from wanduet.runtime.release import release_models
from wanduet.runtime.text_host import PromptEncoder
from wanduet.runtime.vae_host import VAEHost
from wanduet.weights.diffusers import ModelFolder


class Models:
    """A checkpoint and the hosts of its models. Methods except `unload` may be called from any thread."""

    def __init__(self, config: EngineConfig) -> None:
        """Loads nothing."""
        self.config = config
        self.checkpoint = ModelCheckpoint(config)
        self.locks = DeviceLeases()
        self.peaks = PEAKS
        # The hosts refer to the checkpoint, not to this object: a reference cycle would delay freeing the memory.
        self.vae = VAEHost(self.checkpoint, self.locks)
        self.prompts = PromptHost(self.checkpoint, self.locks)
        self.transformer = TransformerHost(self.checkpoint, self.locks, self.vae, self.prompts)

    @property
    def folder(self) -> ModelFolder | None:
        """The folder of the weights; None for random weights. Raises ModelNotFoundError."""
        return self.checkpoint.folder

    @property
    def spec(self) -> ModelSpec:
        """The model's shapes and defaults."""
        return self.checkpoint.spec

    @property
    def memory(self) -> ModelMemory:
        """See `ModelCheckpoint.memory`."""
        return self.checkpoint.memory

    @property
    def about(self) -> dict[str, str | None]:
        """The model's name, hash of the weights and revision, for provenance."""
        return self.checkpoint.about

    def price(self, settings: Mapping[str, Any]) -> Price | None:
        """Return what a set of approximations loses with these weights on this machine; None if that was not measured, and for
        attention in 8 bits where the engine would not gain by it."""
        price = loss_of(self.checkpoint.measurements, self.about["hash"], settings)
        if price is None or QUANTIZE_ATTENTION not in settings or has_fast_8_bit_attention(self.config, detect()):
            return price
        return None

    def resolve(self, request: GenerationRequest) -> ResolvedRequest:
        """Return a request with a value in every field, and the hashes of its files.

        Raises InvalidRequestError, also for an input video that is none, and for LoRAs that are not there or not for this
        model.
        """
        return self.transformer.loras.resolve(resolve(request, self.transformer.loras.spec_for(request), self.price))

    def plan(self, request: ResolvedRequest, config: EngineConfig, hardware: Hardware) -> Plan:
        """See `planner.make_plan`."""
        return self.transformer.loras.planned(make_plan(request, self.memory, config, hardware), request)

    def plan_here(self, request: ResolvedRequest, config: EngineConfig, hardware: Hardware) -> Plan:
        """Return a plan for this process alone, without strategy `parallel`, whose ranks are other processes."""
        plan = self.plan(request, config, hardware)
        if plan.strategy == "parallel":
            for strategy in ("placed", "single"):
                plan = self.plan(request, replace(config, strategy=strategy), hardware)
                if plan.prediction.fits:
                    break
        return plan

    @contextmanager
    def decoder(self, plan: Plan, device: str, context: RunContext) -> Iterator[WanVAE]:
        """Yield the VAE, loaded on a device; the block has the locks of both. If the plan swaps the two models, move
        the transformer's blocks off the device first."""
        with self.locks.take(VAE), self.locks.take(device), on_device_of(torch.device(device)):
            self.prompts.make_room(device, plan.text)
            if not plan.both_resident:
                self.transformer.evict(device)
            yield self.vae.load(device, plan.vae.dtype, context)

    @contextmanager
    def encoder(self, plan: Plan, device: str, context: RunContext) -> Iterator[WanVAE]:
        """Yield a VAE with only its encoder loaded, on a device, for the block, which has the locks of both. If the
        plan swaps the two models, move the transformer's blocks off the device first.

        Where the transformer is being loaded, wait for that: its blocks may have to be moved, and attention is being
        measured. Raises WeightsError, or CancelledError if the job is cancelled meanwhile.
        """
        with self.locks.take(VAE), self.locks.take(device), on_device_of(torch.device(device)):
            self.prompts.make_room(device, plan.text)
            if plan.transformer.device == device:
                self.transformer.settle(context)
            if not plan.both_resident:
                self.transformer.evict(device)
            with self.vae.encoder(device, plan.vae.dtype, context) as vae:
                yield vae

    def text(self, plan: TextPlan) -> PromptEncoder:
        """See `PromptHost.encoder`."""
        return self.prompts.encoder(plan)

    def unload(self) -> None:
        """Drop all models and free their memory at once. No thread may use the models meanwhile."""
        for host in (self.transformer, self.vae, self.prompts):
            with suppress(RuntimeError):  # a failed device raises at every call
                host.unload()
        with suppress(RuntimeError):
            release_models()
        self.checkpoint.close()
