"""Decides before weights are loaded: devices, dtypes, offload and the decode's row tiles.

The planner predicts the peak bytes of every device in each phase, and takes the fastest settings whose prediction stays
below the limits. If none do, the plan names the nearest settings that do.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from wanduet.accelerate.skipped_steps import Forwards
from wanduet.accelerate.step_cache import kept_latents
from wanduet.config import EngineConfig, Weights
from wanduet.distributed.mesh import choose_layout, one_sequence
from wanduet.family.attention import attention_for
from wanduet.family.registry import RANDOM_SPECS
from wanduet.family.sparsity import ALL, ring_refused
from wanduet.family.spec import ModelSpec
from wanduet.footprint.dit import buffer_bytes
from wanduet.footprint.phases import (
    DTYPE_BYTES,
    DenoiseShape,
    ModelMemory,
    Size,
    TransformerMemory,
    text_device_bytes,
    text_encoder_bytes,
    text_positions,
)
from wanduet.models.vae.rows import Tiling
from wanduet.planning.alternatives import alternatives
from wanduet.planning.cost import predict_seconds, rate, step_seconds
from wanduet.planning.explain import Explanation
from wanduet.planning.hardware import DeviceInfo, Hardware, check_attention, check_quantize
from wanduet.planning.placement import Placement, find_placements, pairs_up, parallel_placement, sequence_cost
from wanduet.planning.plan import (
    DevicePrediction,
    GroupPlan,
    OffloadMemory,
    Plan,
    Prediction,
    TextPlan,
    TransformerPlan,
    VAEPlan,
)
from wanduet.planning.search import ENCODE_TILES, Candidate, candidates, memory_rank
from wanduet.planning.text import better_texts, plan_text
from wanduet.request import ResolvedRequest
from wanduet.weights.safetensors import MAPPED_BYTES

# Left free on every device in addition to the prediction, for other programs and allocator fragmentation.
HEADROOM_BYTES = 192 * 2**20
# Share by which later jobs of an engine may exceed the first: memory that stays between jobs (the VAE, workspaces)
# fragments the allocator's pool. Measured on an H200: 0.5 to 0.9 %.
LATER_JOBS_SHARE = 0.01
# Additional share on a rank: the ranks' parts of a decode follow their measured speeds and so are not equal. Measured
# on two H200: the larger part took 5 to 7 % more than half, the smaller one 10 % less.
RANKS_SHARE = 0.08
# Python, PyTorch and its libraries, frames queued for the video encoder.
HOST_BASE_BYTES = 1200 * 2**20
NO_GROUP = GroupPlan()


def make_plan(
    request: ResolvedRequest, memory: ModelMemory, config: EngineConfig, hardware: Hardware, *, nearest: bool = True
) -> Plan:
    """Return the fastest plan that fits.

    If none fits, return the closest (`plan.prediction.fits` is False); with `nearest`, it names the nearest settings
    that fit. Raises ConfigError if the hardware does not have what `config` requires, and InvalidRequestError if a device
    has no products in the format of `request.quantize`, or not its `quantize_attention`.
    """
    memory = replace(
        memory, weights=config.weights, attention=attention_for(request.quantize_attention, config.attention)
    )
    text = plan_text(memory.spec, config, hardware)
    plan, refused = Planner(request, memory, config, hardware, text).with_best_text()
    for name in plan.group.ranks or (plan.transformer.device,):
        check_quantize(request.quantize, hardware.device(name))
        check_attention(config.attention, hardware.device(name), request.quantize_attention)
    plan = replace(plan, choices=Explanation(plan, request, memory, config, hardware, refused).choices())
    if plan.prediction.fits or not nearest:
        return plan
    found: dict[str, dict[str, Any]] = {}
    planner = Planner(request, memory, config, hardware, plan.text)
    only_mode = planner.too_small_for_the_models(plan)  # a smaller video would not fit either
    for other in alternatives(request, config, memory.spec, hardware):
        if other.kind in found or (other.kind == "both" and found) or (only_mode and other.kind != "mode"):
            continue  # only the first of each kind, the smallest change
        text = plan_text(memory.spec, other.config, hardware)
        candidate, _ = Planner(other.request, memory, other.config, hardware, text).fastest_that_fits()
        predicted = candidate.prediction
        if predicted.fits:
            found[other.kind] = other.change | {
                "predicted_peak_bytes": predicted.peak_bytes,
                "predicted_seconds": round(predicted.seconds.total, 1),
            }
    return replace(plan, nearest_that_fits=tuple(found.values()))


@dataclass(frozen=True)
class Planner:
    """Searches the settings for one request on one machine."""

    request: ResolvedRequest
    memory: ModelMemory
    config: EngineConfig
    hardware: Hardware
    text: TextPlan

    @cached_property
    def _size(self) -> Size:
        return self.request.generated_height, self.request.generated_width, self.request.num_frames

    @cached_property
    def _spec(self) -> ModelSpec:
        return self.memory.spec

    @cached_property
    def _forwards(self) -> Forwards | None:
        return Forwards.of(self.request, self._spec) if self.request.approximates else None

    @cached_property
    def _vae_dtype(self) -> str:
        return "float32" if self.config.vae_dtype == "auto" else self.config.vae_dtype

    @cached_property
    def _host_limit(self) -> int:
        return min(self.config.ram_limit or self.hardware.host_total_bytes, self.hardware.host_free_bytes)

    def with_best_text(self) -> tuple[Plan, tuple[Plan, ...]]:
        """Return `fastest_that_fits`, with the text encoder in more memory, or on a GPU, if that changes nothing else of
        the plan."""
        plan, refused = self.fastest_that_fits()
        if plan.prediction.fits and self.config.model not in RANDOM_SPECS:
            for text in better_texts(plan, self._spec, self.config, self.hardware, self.request):
                other, refused_too = replace(self, text=text).fastest_that_fits()
                if other.prediction.fits and replace(other, text=plan.text, prediction=plan.prediction) == plan:
                    return other, refused_too
        return plan, refused

    def fastest_that_fits(self) -> tuple[Plan, tuple[Plan, ...]]:
        """Return the first plan that fits, or the one that lacks the least device memory; and the plans of better
        placements, which do not fit."""
        refused: list[Plan] = []
        if self.config.strategy in ("auto", "parallel"):
            shared = parallel_placement(self.request, self.config, self.hardware)
            if shared is not None:
                plan = self._of_group(shared)
                if plan.group.layout.ring > 1 and (
                    self.request.sparse < ALL or self._spec.transformer.attention != "dense"
                ):
                    self._refuse_ring(len(shared.ranks))
                elif plan.prediction.fits or self.config.strategy == "parallel":
                    return plan, ()
                else:
                    refused.append(plan)
        apart: list[Plan] = []
        for place in find_placements(self.config, self.hardware):
            plan = self._fastest_of(place)
            if plan.prediction.fits:
                return plan, (*refused, *apart)
            apart.append(plan)
        least = min(apart, key=lambda plan: sum(max(0, d.peak - d.limit_bytes) for d in plan.prediction.devices))
        return least, (*refused, *(plan for plan in apart if plan is not least))

    def _refuse_ring(self, ranks: int) -> None:
        """Raise ConfigError if the user wants sparse attention on devices of which each would see a part of the keys."""
        if self.config.strategy == "parallel":
            raise ring_refused(self._spec.transformer, self.request.sparse, ranks)

    def too_small_for_the_models(self, plan: Plan) -> bool:
        """Return True if all models are on the host and their weights alone exceed its memory."""
        if (plan.transformer.device, plan.vae.device) != ("cpu", "cpu"):
            return False
        text = text_encoder_bytes(self._spec, plan.text.dtype, plan.text.on_host)
        models = self.memory.transformer_weights(plan.transformer.dtype) + self.memory.vae_weights(plan.vae.dtype)
        return HOST_BASE_BYTES + text + models > plan.prediction.host_limit_bytes

    def _fastest_of(self, place: Placement) -> Plan:
        """Return the plan of the first candidate on a placement that fits, or of the one that needs least memory."""
        weights = self.memory.transformer_weights(self.transformer_dtype(place.transformer))
        tried = list(candidates(self.request, self._spec, place, weights, self._vae_dtype))
        smallest = self.plan_of(place, min(tried, key=memory_rank))
        predicted = smallest.prediction
        all_on_host = place.transformer.is_cpu and place.vae.is_cpu  # then the smallest also needs least host memory
        text = text_encoder_bytes(self._spec, self.text.dtype, self.text.on_host)
        least = predicted.host_bytes if all_on_host else HOST_BASE_BYTES + text
        if any(d.peak > d.limit_bytes for d in predicted.devices) or least > predicted.host_limit_bytes:
            return smallest  # no other candidate fits either
        return next((plan for one in tried if (plan := self.plan_of(place, one)).prediction.fits), smallest)

    def _of_group(self, place: Placement) -> Plan:
        """Return the plan of a group: every rank has the whole transformer, its part of the sequence and its rows of
        the decode."""
        spec, count = self._spec, len(place.ranks)
        rates = self.config.device_speeds or tuple(rate(device) for device in place.ranks)
        step_s = step_seconds(self.request, predict_seconds(self.request, spec, place.transformer, place.vae, count))
        item = DTYPE_BYTES[self.transformer_dtype(place.transformer)]
        pairs = self.request.uses_guidance and pairs_up(
            rates, sequence_cost(self.request, spec, count, item, step_s, self.hardware.link_rate)
        )
        layout = choose_layout(count, spec.transformer.num_attention_heads, pairs)
        group = GroupPlan(tuple(d.name for d in place.ranks), layout)
        whole = Candidate(spec.transformer.num_layers, True, True, Tiling("strip", count))
        return self.plan_of(place, whole, group)

    def plan_of(self, place: Placement, candidate: Candidate, group: GroupPlan = NO_GROUP) -> Plan:
        """Return the plan of one candidate, with its predictions. An input video is encoded in the fewest row tiles
        that fit."""

        def in_tiles(count: int) -> Plan:
            return self._predicted(place, candidate._replace(encode_tiles=count), group)

        fastest = in_tiles(1)
        if fastest.prediction.fits or not self.request.uses_input:
            return fastest
        smallest = in_tiles(ENCODE_TILES[-1])
        if not smallest.prediction.fits:
            return smallest
        return next((plan for count in ENCODE_TILES[1:-1] if (plan := in_tiles(count)).prediction.fits), smallest)

    def _predicted(self, place: Placement, candidate: Candidate, group: GroupPlan) -> Plan:
        transformer = self._transformer_memory(place, candidate, group)
        devices = self._with_text(self._devices(place, candidate, transformer))
        host, offload = self._host(place, candidate, transformer, devices)
        seconds = predict_seconds(
            self.request, self._spec, place.transformer, place.vae, max(1, len(place.ranks)), self._vae_dtype
        )
        return Plan(
            place.strategy,
            TransformerPlan(
                place.transformer.name,
                self.transformer_dtype(place.transformer),
                candidate.resident_blocks,
                offload,
                candidate.share_first,
                self._weights(place.transformer),
            ),
            VAEPlan(place.vae.name, self._vae_dtype, candidate.tiling, self.config.tf32, candidate.encode_tiles),
            self.text,
            candidate.both_resident,
            Prediction(
                devices, host, self._host_limit, seconds, self._forwards, self.request.speed, self.request.price
            ),
            group,
        )

    def _transformer_memory(self, place: Placement, candidate: Candidate, group: GroupPlan) -> TransformerMemory:
        request, device = self.request, place.transformer
        texts = [request.prompt, request.negative_prompt] if request.uses_guidance else [request.prompt]
        positions = sorted(text_positions(text, self._spec.text_len) for text in texts)
        # If each prompt has its own devices, they store the text keys and values of one prompt only; of both if all
        # devices share the prompt in steps without guidance.
        positions = positions[-1:] if group.layout.cfg > 1 and not request.ends_guidance else positions
        dtype, kept = self.transformer_dtype(device), kept_latents(request)
        shape = DenoiseShape(
            self._size, dtype, positions, group.layout, kept, sparse=request.sparse, quantize=request.quantize
        )
        found = self.memory.transformer(shape, candidate.resident_blocks, device.name, candidate.share_first)
        if group.layout.cfg == 1 or not request.ends_guidance:
            return found
        # Without guidance, all ranks share one sequence, and exchange parts of it through a buffer of its own.
        layout = one_sequence(group.layout, self._spec.transformer.num_attention_heads)
        latents = self._spec.latent_shape(*self._size)
        buffer = buffer_bytes(self._spec.transformer, latents, shape.dtype, layout)
        return replace(found, activations=found.activations + buffer, exchange=found.exchange + buffer)

    def _devices(
        self, place: Placement, candidate: Candidate, transformer: TransformerMemory
    ) -> tuple[DevicePrediction, ...]:
        """Predict the peak bytes of each device, without a text encoder on a GPU."""
        vae_weights = self.memory.vae_weights(self._vae_dtype)
        ranks = max(1, len(place.ranks))
        decode = self.memory.decode(self._size, candidate.tiling, self._vae_dtype, place.vae.name, ranks)
        # The decode's memory is allocated once before the denoise (`reserve_decode`), after the text tensors.
        beside = transformer.weights + transformer.text + transformer.latents + transformer.exchange
        both = candidate.both_resident
        on_transformer = {"denoise": transformer.peak, "decode": beside if both else transformer.swapped_out}
        on_vae = {"denoise": vae_weights if both else 0, "decode": vae_weights + decode}
        if self.text.on_gpu:
            on_vae["encode"] = vae_weights
        if self.request.uses_input:
            encoder = self.memory.vae_encoder_weights(self._vae_dtype)
            encode = self.memory.encode(self._size, candidate.encode_tiles, self._vae_dtype)
            on_vae["encode"] = vae_weights + encoder + encode
        if "encode" in on_vae:
            # Of the decoder and the transformer, an earlier job or the load may have left the weights there. An input
            # video may move the transformer's off the device, a prompt does not.
            stays = both or self.text.on_gpu
            on_transformer["encode"] = transformer.weights + transformer.exchange if stays else transformer.swapped_out
        together = {phase: on_transformer[phase] + on_vae[phase] for phase in on_vae}
        if place.ranks:
            phases = {phase: int(size * (1 + RANKS_SHARE)) for phase, size in together.items()}
            return tuple(self._device(device, "vae+transformer", phases) for device in place.ranks)
        if place.shared:
            role = "vae+transformer" + ("+text_encoder" if place.vae.is_cpu else "")
            return (self._device(place.vae, role, together),)
        return (
            self._device(place.vae, "vae", on_vae),
            self._device(place.transformer, "transformer", on_transformer),
        )

    def _with_text(self, devices: tuple[DevicePrediction, ...]) -> tuple[DevicePrediction, ...]:
        """Add a text encoder on a GPU, of this plan or of no other model, to the predictions of devices."""
        text = self.text
        if not text.on_gpu:
            return devices
        if text.device not in [device.name for device in devices]:
            devices += (self._device(self.hardware.device(text.device), "", {"denoise": 0, "decode": 0}),)
        kept, encode = text_device_bytes(self._spec, text.dtype, text.residency)

        def added(device: DevicePrediction) -> DevicePrediction:
            phases = {phase: size + kept + encode * (phase == "encode") for phase, size in device.phases.items()}
            return replace(device, phases=phases, role=f"{device.role}+text_encoder".lstrip("+"))

        return tuple(added(device) if device.name == text.device else device for device in devices)

    def _host(
        self,
        place: Placement,
        candidate: Candidate,
        transformer: TransformerMemory,
        devices: tuple[DevicePrediction, ...],
    ) -> tuple[int, OffloadMemory]:
        """Predict the bytes of the host, and choose the kind of memory for offloaded blocks."""
        text = text_encoder_bytes(self._spec, self.text.dtype, self.text.on_host)
        host = HOST_BASE_BYTES + text + (min(MAPPED_BYTES, text) if self.text.on_host == "resident" else 0)
        host += len(place.ranks) * HOST_BASE_BYTES  # each rank is a process
        if self.config.model not in RANDOM_SPECS:
            host += self.memory.loading_host(self.transformer_dtype(place.transformer))
        host += sum(d.peak for d in devices if d.name == "cpu")
        host += self.memory.decode_host(self._size, candidate.tiling, self._vae_dtype, place.vae.name)
        if self.request.uses_input:
            host += self.memory.encode_host(self._size, candidate.encode_tiles, self._vae_dtype)
        if not candidate.both_resident and not place.vae.is_cpu:
            host += self.memory.vae_weights(self._vae_dtype)  # swapped out while the transformer runs
        waiting, layers, on_host = 0, self._spec.transformer.num_layers, 0
        if not place.transformer.is_cpu:
            # Unless both models are resident, all blocks are on the host during a decode.
            on_host = layers - candidate.resident_blocks if candidate.both_resident else layers
            waiting = transformer.total_weights * on_host // layers
        if host + waiting <= self._host_limit:
            return host + waiting, "pinned"
        # The operating system may evict blocks that are mapped from a scratch file; two at a time are being read.
        return host + transformer.total_weights * min(on_host, 2) // layers, "mapped"

    def _device(self, device: DeviceInfo, role: str, phases: dict[str, int]) -> DevicePrediction:
        free, wanted = max(0, device.free_bytes - HEADROOM_BYTES), self.config.vram_limit
        limit = free if wanted is None or device.is_cpu else min(wanted, free)
        if not device.is_cpu:
            phases = {phase: int(size * (1 + LATER_JOBS_SHARE)) for phase, size in phases.items()}
        return DevicePrediction(device.name, role, {"encode": 0} | phases, limit)

    def _weights(self, device: DeviceInfo) -> Weights:
        return self.memory.format_name(self.transformer_dtype(device))

    def transformer_dtype(self, device: DeviceInfo) -> str:
        """Return the dtype in which the transformer computes on a device."""
        if self.config.transformer_dtype != "auto":
            return self.config.transformer_dtype
        if device.is_cpu:
            return "float32"
        return "bfloat16" if device.has_bfloat16 else "float16"
