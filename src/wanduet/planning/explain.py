"""Explains a plan with one sentence for each setting, from the plan, the request, the configuration and the hardware.

Nothing is decided here. The sentences say so where a fact is known only when a job runs (which attention is fastest,
whether kernels are correct).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from wanduet.accelerate.low_res import LowRes
from wanduet.config import GIB, EngineConfig, Weights, format_bytes, parse_devices
from wanduet.family.attention import attention_for
from wanduet.family.registry import RANDOM_SPECS
from wanduet.family.spec import ModelSpec
from wanduet.family.speeds import EXACT, fields_set_by
from wanduet.family.step_caches import OFF
from wanduet.footprint.phases import ModelMemory, text_device_bytes, text_encoder_bytes
from wanduet.kernels.attention.backends import SDPA, available_backends
from wanduet.kernels.attention.choose import Shape, remembered
from wanduet.kernels.select import TRITON, VAE_TRITON, has_quack, plans_triton
from wanduet.kernels.verdicts import triton_problem
from wanduet.models.dit.quantizer import LAYERS_OF_A_BLOCK
from wanduet.planning.hardware import DeviceInfo, Hardware
from wanduet.planning.plan import Choice, Plan
from wanduet.planning.sparse import attention_by, attention_choice, sparse_choice
from wanduet.planning.text import text_device
from wanduet.request import ResolvedRequest
from wanduet.weights.hub import local_model

REQUESTED = "asked for"


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan and the facts that decided it; `refused`: plans for better placements, which do not fit."""

    plan: Plan
    request: ResolvedRequest
    memory: ModelMemory
    config: EngineConfig
    hardware: Hardware
    refused: Sequence[Plan] = ()

    @property
    def spec(self) -> ModelSpec:
        """The model's shapes."""
        return self.memory.spec

    def choices(self) -> tuple[Choice, ...]:
        """Return the explained settings of a whole job."""
        plan = self.plan
        found: tuple[Choice, ...] = (
            Choice("strategy", plan.strategy, self._strategy()),
            Choice("transformer_dtype", plan.transformer.dtype, self._transformer_dtype()),
            self._vae_dtype(),
            self._tf32(),
            Choice("text_encoder_hold", plan.text.residency, self._text_encoder()),
            *([Choice("text_encoder_device", plan.text.device, self._text_device())] if plan.text.on_gpu else []),
            Choice("resident_blocks", plan.transformer.resident_blocks, self._resident()),
            Choice("block_hold", plan.transformer.offload_memory, self._block_residency()),
            self._decode(),
            Choice("keep_both", plan.both_resident, self._keep_both()),
            self._attention(),
            self._kernels("kernels", self._transformer),
            self._kernels("vae_kernels", self._vae),
        )
        if self.request.uses_guidance and plan.group.layout.cfg == 1:
            found += (
                Choice(
                    "first_self_attention", "shared" if plan.transformer.share_first else "apart", self._share_first()
                ),
            )
        if plan.transformer.weights != "auto":
            found += (Choice("weights", plan.transformer.weights, self._weights()),)
        if self.request.uses_input:
            found += (self._encode(),)
        found += self._approximations() + self._quantize()
        if plan.group.ranks:
            layout = plan.group.layout
            value = f"cfg {layout.cfg} x ring {layout.ring} x ulysses {layout.ulysses}"
            found += (Choice("layout", value, self._layout()),)
        return found + unused_settings(self.plan, self.config)

    @property
    def _transformer(self) -> DeviceInfo:
        return self.hardware.device(self.plan.transformer.device)

    @property
    def _vae(self) -> DeviceInfo:
        return self.hardware.device(self.plan.vae.device)

    def _strategy(self) -> str:
        plan, devices = self.plan, parse_devices(self.config.devices)
        if devices.roles:
            return "--devices names " + ", ".join(f"{role}={device}" for role, device in devices.roles)
        if self.config.strategy != "auto":
            on_cpu = plan.strategy == "placed" and plan.transformer.device == plan.vae.device
            return f"{REQUESTED}; {plan.vae.device} stands for both devices" if on_cpu else REQUESTED
        if plan.group.ranks:
            return f"{len(plan.group.ranks)} devices of one kind make one video together: {self._sharing()}"
        if not plan.prediction.fits and self.refused:
            return "nothing fits; of all placements this one lacks least device memory"
        if plan.strategy == "placed":
            together = "; one video on several devices together does not fit" if self.refused else ""
            return f"{plan.transformer.device} denoises while {plan.vae.device} decodes{together}"
        if self.refused:
            return "the work in parts on several devices does not fit, and on this one it does"
        if devices.names:
            return f"{plan.transformer.device} is the only device that --devices names"
        return "there is no GPU" if self._transformer.is_cpu else f"{plan.transformer.device} is the only GPU"

    def _sharing(self) -> str:
        cfg, sequence = self.plan.group.layout.cfg, self.plan.group.layout.sequence
        if cfg == 1:
            return "each has a part of the tokens"
        each = "one device" if sequence == 1 else f"{sequence} devices, each with a part of the tokens"
        return f"each of the two prompts is on {each}"

    def _transformer_dtype(self) -> str:
        device = self._transformer
        if self.config.transformer_dtype != "auto":
            return REQUESTED
        if device.is_cpu:
            return "the most precise, and the default on a CPU"
        if device.has_bfloat16:
            return "this GPU has bfloat16 matrix units; norms, modulation and residuals stay float32"
        known = device.capability > (0, 0)
        return (
            "this GPU has no bfloat16 matrix units" if known else "this GPU is not known to have bfloat16 matrix units"
        )

    def _weights(self) -> str:
        dtype = self.plan.transformer.dtype
        names: tuple[Weights, ...] = (self.plan.transformer.weights, "auto")
        stored, dense = (format_bytes(replace(self.memory, weights=name).transformer_weights(dtype)) for name in names)
        computed = dtype if self.request.quantize == "off" else f"{dtype} and {self.request.quantize}"
        return (
            f"{REQUESTED}: the transformer takes {stored} instead of {dense}; its products are computed in {computed}"
        )

    def _vae_dtype(self) -> Choice:
        why = REQUESTED
        if self.config.vae_dtype == "auto":
            faster = "; bfloat16 decodes faster at a small loss" if self._vae.has_bfloat16 else ""
            why = f"the most precise, and the default{faster}"
        return Choice("vae_dtype", self.plan.vae.dtype, why)

    def _tf32(self) -> Choice:
        plan, device = self.plan, self._vae
        if not device.name.startswith("cuda"):
            why = f"without effect: the VAE is on {device.name}"
        elif plan.vae.dtype != "float32":
            why = f"without effect: the VAE computes in {plan.vae.dtype}"
        elif device.capability < (8, 0):
            why = "without effect: this GPU has no TF32"
        elif plan.vae.tf32:
            why = "the VAE's float32 convolutions round their factors to TF32"
        else:
            why = f"{REQUESTED}: the VAE's float32 convolutions are exact"
        return Choice("tf32", plan.vae.tf32, why)

    def _text_device(self) -> str:
        if text_device(self.config) != "cpu":
            return REQUESTED
        return "there is room beside the video, which is made with less work, and the CPU would delay it"

    def _text_encoder(self) -> str:
        if self.config.text_encoder_hold != "auto":
            return REQUESTED
        if self.config.model in RANDOM_SPECS:
            return "its memory is counted as with published weights; random ones have no text encoder"
        dtype = self.plan.text.dtype
        whole, part = (
            format_bytes(text_encoder_bytes(self.spec, dtype, residency)) for residency in ("resident", "streamed")
        )
        if self.plan.text.on_gpu:
            of_device = format_bytes(text_device_bytes(self.spec, dtype, "resident")[0])
            kept = self.plan.text.residency == "resident"
            return f"its {of_device} of layers {'stay on the device' if kept else 'are copied for each new prompt'}"
        if self.plan.text.residency == "resident":
            if text_encoder_bytes(self.spec, "float32", "resident") < GIB:
                return f"small: {whole} of host memory hold all of it"
            return f"all of it stays in host memory, {whole}, which is free"
        return f"read layer by layer from its files, which takes {part} of host memory instead of {whole}"

    def _resident(self) -> str:
        plan, layers = self.plan, self.spec.transformer.num_layers
        if self._transformer.is_cpu:
            return "all blocks are in host memory, where they run"
        if not plan.prediction.fits:
            return (
                "strategy parallel keeps all blocks on every device" if plan.group.ranks else "the fewest there can be"
            )
        if plan.transformer.resident_blocks == layers:
            return "all blocks fit on every device" if plan.group.ranks else "all blocks fit on the device"
        return f"{layers - plan.transformer.resident_blocks} come from host memory as they are needed: no larger number that is tried fits"

    def _block_residency(self) -> str:
        plan, device = self.plan, self._transformer
        if device.is_cpu:
            return "without effect: the transformer runs in host memory"
        if plan.both_resident and plan.transformer.resident_blocks == self.spec.transformer.num_layers:
            return "without effect: no block waits on the host"
        if not device.name.startswith("cuda"):
            return "in ordinary host memory: page-locked memory is for CUDA devices"
        if plan.transformer.offload_memory == "pinned":
            return "page-locked host memory: copies run beside the computation"
        return "in a scratch file: too little host memory is free to hold them page-locked"

    def _decode(self) -> Choice:
        plan, mode = self.plan, self.plan.vae.tiling
        alone = f"{mode.order}-major, {mode.num_tiles} {'strip' if mode.num_tiles == 1 else 'strips'}"
        if plan.group.ranks:
            why = f"every device decodes its rows of each frame; should the others be lost, one goes on {alone}"
            return Choice("decode", f"frame-major, {len(plan.group.ranks)} strips, one a device", why)
        value = f"{mode.order}-major, {mode.num_tiles} strips"
        if not plan.prediction.fits:
            return Choice("decode", value, "what needs least memory")
        fastest = (mode.order, mode.num_tiles) == ("frame", 1)
        return Choice("decode", value, "whole frames, the fastest way" if fastest else "no faster way to decode fits")

    def _encode(self) -> Choice:
        count = self.plan.vae.encode_tiles
        value = f"{count} {'strip' if count == 1 else 'strips'}"
        if not self.plan.prediction.fits:
            return Choice("encode", value, "what needs least memory")
        return Choice("encode", value, "whole frames, the fastest way" if count == 1 else "fewer strips do not fit")

    def _approximations(self) -> tuple[Choice, ...]:
        request, forwards, found = self.request, self.plan.prediction.forwards, []
        count = f"{2 * len(request.guided_steps) or request.num_denoising_steps} forwards a video, nothing is skipped"
        if forwards is not None:
            count = f"{forwards.count} of {forwards.exact_count} forwards a video"
            if forwards.is_estimate:
                count += " by estimate, as the latents decide" if "easycache" in request.step_cache else " by estimate"
        if request.speed is not None:
            found.append(Choice("speed", request.speed, f"{self._why_speed()}: {count}{self._loss()}"))
        if request.step_cache != OFF:
            why = f"{self._by('step_cache')}: {count}; the video differs from the exact one"
            found.append(Choice("step_cache", request.step_cache, why))
        if request.guidance_mode != "cfg":
            found.append(Choice("guidance_mode", request.guidance_mode, REQUESTED))
        for name in ("guidance_gate", "guidance_interval"):
            if name in request.approximations:
                steps = f"{len(request.guided_steps)} of {request.num_denoising_steps} steps are guided"
                found.append(Choice(name, getattr(request, name), f"{self._by(name)}: {count}; {steps}"))
        if (sparse := sparse_choice(request, self.spec, self._by("sparse"))) is not None:
            found.append(sparse)
        if (coded := attention_choice(request, REQUESTED, self._transformer)) is not None:
            found.append(coded)
        if (low := LowRes.of(request, self.spec)) is not None:
            found.append(Choice("low_res_first", True, f"{REQUESTED}: {low}; the video differs from the exact one"))
        return tuple(found)

    def _by(self, name: str) -> str:
        """Return who has set a field of the request: the user, or the speed."""
        request = self.request
        is_of_speed = fields_set_by(request.speed).get(name) == getattr(request, name)
        return f"set by speed {request.speed}" if is_of_speed else REQUESTED

    def _why_speed(self) -> str:
        if self.request.loss_budget is None:
            return REQUESTED
        if self.request.speed == EXACT:
            return f"no faster one is known to keep {self.request.loss_budget:g} dB here"
        return f"the fastest that is known to keep {self.request.loss_budget:g} dB here"

    def _loss(self) -> str:
        request = self.request
        if request.price is not None:
            return f"; {request.price}"
        return "" if request.speed == EXACT else "; what it loses here is not known"

    def _quantize(self) -> tuple[Choice, ...]:
        if self.request.quantize == "off":
            return ()
        spec = self.spec.transformer
        count = (LAYERS_OF_A_BLOCK + (spec.attention == "vsa")) * spec.num_layers
        why = f"{REQUESTED}: {count} layers are products in 8 bits; the video differs from the exact one"
        if self._transformer.is_cpu:
            why += ", and takes longer, as a CPU only rounds to 8 bits"
        return (Choice("quantize", self.request.quantize, why),)

    def _keep_both(self) -> str:
        plan = self.plan
        if plan.group.ranks:
            return "every device holds both"
        if plan.transformer.device != plan.vae.device:
            return "each model has a device of its own"
        if self._vae.is_cpu:
            return "both are in host memory"
        if plan.both_resident:
            return "both fit on the device together"
        if not plan.prediction.fits:
            return "they take turns on the device, which needs least memory"
        return "they take turns on the device: with both on it, no decode that fits is as fast"

    def _share_first(self) -> str:
        if self.plan.transformer.share_first:
            return "the same for both prompts: computed once, and kept meanwhile"
        return (
            "to keep it from one prompt to the next would not fit"
            if self.plan.prediction.fits
            else "what needs least memory"
        )

    def _layout(self) -> str:
        if self.plan.group.layout.cfg == 2:
            return f"{self._sharing()}: this exchanges least"
        if not self.request.uses_guidance:
            return "there is one prompt: each device has a part of its tokens"
        if len(self.plan.group.ranks) % 2:
            return "an odd number of devices: each has a part of the tokens"
        return "devices of unlike speeds: each has a part of the tokens, the faster one more"

    def _attention(self) -> Choice:
        """Explain the attention backend, as far as it is known before a run."""
        plan, device = self.plan, self._transformer
        wish = attention_for(self.request.quantize_attention, self.config.attention)
        auto, asked = wish == "auto", attention_by(self.request, REQUESTED)
        if not device.name.startswith("cuda"):
            if auto:
                return Choice("attention", SDPA.name, f"PyTorch's own, the only one on {device.name}")
            refused = "" if wish == SDPA.name else f", but not there on {device.name}: the job will be refused"
            return Choice("attention", wish, asked + refused)
        if not self._is_here(device):
            seen = "checked" if not auto else "the fastest that is right: checked and measured"
            return Choice("attention", wish, f"{'' if auto else asked + ': '}{seen} when a job first runs there")
        on = torch.device(device.name)
        backends = available_backends(on)
        if not auto:
            there = (
                "checked before it is used" if wish in backends else "but not available here: the job will be refused"
            )
            return Choice("attention", wish, f"{asked}, {there}")
        found = remembered(
            on, self._shape(), getattr(torch, plan.transformer.dtype), self.config.data_folder / "measurements"
        )
        if found is not None:
            name, table = found
            usable = sum(row.usable for row in table)
            agreed = "; devices that work together agree on one" if plan.group.ranks else ""
            return Choice("attention", name, f"the fastest of {usable} that were measured on this GPU{agreed}")
        names = ", ".join(backend.name for backend in backends.values() if backend.exact)
        return Choice("attention", wish, f"the fastest that is right of {names}: measured when a job first runs here")

    def _is_here(self, device: DeviceInfo) -> bool:
        """Return True if `device` is in this machine, not in another node or in described hardware."""
        index = torch.device(device.name).index or 0
        return (
            not self.hardware.assumed
            and torch.cuda.is_available()
            and index < torch.cuda.device_count()
            and torch.cuda.get_device_name(index) == device.model
        )

    def _shape(self) -> Shape:
        request, t = self.request, self.spec.transformer
        tokens = self.spec.num_tokens(request.generated_height, request.generated_width, request.num_frames)
        return Shape(tokens, tokens, t.num_attention_heads, t.attention_head_dim)

    def _kernels(self, setting: str, device: DeviceInfo) -> Choice:
        if not device.name.startswith("cuda"):
            return Choice(setting, "torch", f"PyTorch's own operations: Triton's kernels are not for {device.name}")
        if not plans_triton(TRITON if setting == "kernels" else VAE_TRITON, device.name):
            why = triton_problem() or "some of Triton's kernels did not work here"
            return Choice(setting, "torch", f"PyTorch's own operations: {why}")
        if not self._is_here(device):
            return Choice(setting, "triton", "taken to work there; PyTorch's own operations run where they do not")
        dtype = getattr(torch, self.plan.transformer.dtype)
        quack = setting == "kernels" and has_quack(torch.device(device.name), dtype)
        why = "checked before they are used; PyTorch's own operations run where they are wrong or fail"
        return Choice(setting, "triton+quack" if quack else "triton", why)


def unused_settings(plan: "Plan", config: EngineConfig) -> tuple[Choice, ...]:
    """Return the settings that the user gave and that have no effect on this plan, each with the reason."""
    found = []
    is_random = config.model in RANDOM_SPECS
    if config.revision is not None and (is_random or local_model(config.model, None, config.files) is not None):
        found.append(Choice("revision", config.revision, "without effect: the model is not on the hub"))
    if config.weights != plan.transformer.weights:
        why = f"without effect: the transformer computes in {plan.transformer.dtype}, which is as small"
        found.append(Choice("weights", config.weights, why))
    if config.vram_limit is not None and all(device.name == "cpu" for device in plan.prediction.devices):
        found.append(Choice("vram_limit", config.vram_limit, "without effect: no GPU is used"))
    if config.device_speeds is not None and not plan.group.ranks:
        speeds = ",".join(f"{speed:g}" for speed in config.device_speeds)
        found.append(
            Choice("device_speeds", speeds, f"without effect: strategy {plan.strategy} does not share a video")
        )
    return tuple(found)
