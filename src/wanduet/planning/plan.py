"""What runs where, decided before anything is loaded: devices, dtypes, offload and decode mode that fit.

`make_plan` predicts the peak bytes of every device in each phase and picks the fastest choices whose
prediction stays below the limits. It refuses with the nearest settings that would fit.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

from wanduet.config import GIB, EngineConfig, format_bytes, format_seconds
from wanduet.distributed.mesh import ONE_DEVICE, Layout, choose_layout
from wanduet.errors import DoesNotFitError
from wanduet.family.specs import RANDOM_SPECS, ModelSpec
from wanduet.footprint.phases import DTYPE_BYTES, ModelMemory, text_encoder_bytes, text_positions
from wanduet.models.vae.rows import DecodePlan
from wanduet.planning.alternatives import alternatives
from wanduet.planning.cost import Seconds, cut_seconds, decode_seconds, predict_seconds, rate, step_seconds
from wanduet.planning.explain import Choice, Explained
from wanduet.planning.hardware import DeviceInfo, Hardware
from wanduet.planning.placement import (
    Placement,
    StrategyName,
    find_placements,
    pairs_up,
    parallel_placement,
    sequence_cost,
)
from wanduet.planning.search import DECODE_MODES, bulk, candidates
from wanduet.request import ResolvedRequest
from wanduet.weights.safetensors import MAPPED_BYTES

BlockHold = Literal["pinned", "mapped"]

# Kept free on every device beside what is predicted: other programs and allocator fragmentation.
HEADROOM_BYTES = 192 * 2**20
# By so much an engine's later jobs may exceed its first: the allocator's memory is no longer empty, and what stays between
# jobs (the VAE, workspaces) lies among what comes and goes. Seen on an H200: 0.5 to 0.9 %.
LATER_JOBS_SHARE = 0.01
# And by so much more on a rank, where parts of a decode go by measured speed and so are not equal. Seen on two H200: the
# larger part took 5 to 7 % more than half, the smaller one 10 % less.
RANKS_SHARE = 0.08
# Python, PyTorch and its libraries, frames on their way to the encoder.
HOST_BASE_BYTES = 1200 * 2**20


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What one device holds and the predicted peak bytes of each phase (outside the CUDA context)."""

    name: str
    role: str  # "vae", "transformer", "text_encoder", joined by "+"
    phases: dict[str, int]
    limit_bytes: int

    @property
    def peak(self) -> int:
        """The highest phase."""
        return max(self.phases.values(), default=0)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything the engine needs to know to run a request."""

    strategy: StrategyName
    transformer_device: str
    vae_device: str
    transformer_dtype: str
    vae_dtype: str
    text_encoder_dtype: str
    text_encoder_hold: Literal["resident", "streamed"]
    resident_blocks: int  # of the transformer; the others are streamed from host memory
    block_hold: BlockHold  # how those wait there
    share_first: bool  # the first block's self-attention serves both prompts, and is kept meanwhile
    decode: DecodePlan
    keep_both: bool  # transformer and VAE stay loaded side by side; else one makes room for the other
    tf32: bool
    devices: tuple[DevicePlan, ...]
    host_bytes: int
    host_limit_bytes: int
    choices: tuple[Choice, ...]
    seconds: Seconds
    fits: bool
    ranks: tuple[str, ...] = ()  # strategy `parallel`: the device of each process
    layout: Layout = ONE_DEVICE  # and what they share
    nearest_that_fits: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The plan as `wanduet plan --json` prints it."""
        return {
            "fits": self.fits,
            "strategy": self.strategy,
            "devices": [
                {"name": d.name, "role": d.role, "phases": d.phases, "limit_bytes": d.limit_bytes} for d in self.devices
            ],
            "host_bytes": self.host_bytes,
            "host_limit_bytes": self.host_limit_bytes,
            "choices": [{"setting": c.setting, "value": c.value, "why": c.why} for c in self.choices],
            "predicted_seconds": {
                "denoise": round(self.seconds.denoise, 1),
                "decode": round(self.seconds.decode, 1),
                "total": round(self.seconds.total, 1),
            },
            "nearest_that_fits": list(self.nearest_that_fits),
        }

    @property
    def predicted_peak_bytes(self) -> dict[str, int]:
        """Highest predicted phase of each device."""
        return {d.name: d.peak for d in self.devices}


def make_plan(
    request: ResolvedRequest, memory: ModelMemory, config: EngineConfig, hardware: Hardware, *, nearest: bool = True
) -> Plan:
    """Choose. Returns a plan with `fits=False` if nothing does, and the nearest settings that do unless told not to."""
    plan, refused = _fastest_that_fits(request, memory, config, hardware)
    plan = replace(plan, choices=Explained(plan, request, memory.spec, config, hardware, refused).choices())
    if plan.fits or not nearest:
        return plan
    found: dict[str, dict[str, Any]] = {}
    only_mode = _too_small_for_the_models(plan, memory)  # no smaller video would help
    for other in alternatives(request, config, memory.spec, hardware):
        if other.kind in found or (other.kind == "both" and found) or (only_mode and other.kind != "mode"):
            continue  # one of each kind, the least painful
        candidate, _ = _fastest_that_fits(other.request, memory, other.config, hardware)
        if candidate.fits:
            told = {"predicted_peak_bytes": candidate.predicted_peak_bytes}
            found[other.kind] = other.change | told | {"predicted_seconds": round(candidate.seconds.total, 1)}
    return replace(plan, nearest_that_fits=tuple(found.values()))


def make_decode_plan(request: ResolvedRequest, memory: ModelMemory, config: EngineConfig, hardware: Hardware) -> Plan:
    """For a worker that only decodes: the VAE has the device to itself, in the fastest mode that fits."""
    device = find_placements(replace(config, strategy="single"), hardware)[0].vae
    size = (request.generated_height, request.generated_width, request.num_frames)
    dtype = "float32" if config.vae_dtype == "auto" else config.vae_dtype
    weights = memory.vae_weights(dtype)

    def on_device(mode: DecodePlan) -> DevicePlan:
        needed = weights + memory.decode(size, mode, dtype, device.name)
        return _device_plan(device, "vae", {"denoise": 0, "decode": needed}, config)

    seconds = decode_seconds(request, memory.spec, device)
    fastest_first = sorted(DECODE_MODES, key=lambda mode: cut_seconds(request, seconds, mode))
    tried = ((mode, on_device(mode)) for mode in fastest_first)
    mode, held = next(
        ((mode, one) for mode, one in tried if one.peak <= one.limit_bytes),
        (DECODE_MODES[-1], on_device(DECODE_MODES[-1])),
    )
    host = HOST_BASE_BYTES + (held.peak if device.is_cpu else 0) + memory.decode_host(size, mode, dtype, device.name)
    host_limit = min(config.ram_limit or hardware.host_total_bytes, hardware.host_free_bytes)
    text_dtype, hold = text_encoder_choice(memory.spec, config)
    plan = Plan(
        strategy="single",
        transformer_device=device.name,
        vae_device=device.name,
        transformer_dtype=_transformer_dtype(config, device),
        vae_dtype=dtype,
        text_encoder_dtype=text_dtype,
        text_encoder_hold=hold,
        resident_blocks=0,
        block_hold="pinned",
        share_first=True,
        decode=mode,
        keep_both=True,
        tf32=config.tf32,
        devices=(held,),
        host_bytes=host,
        host_limit_bytes=host_limit,
        choices=(),
        seconds=Seconds(0.0, seconds),
        fits=held.peak <= held.limit_bytes and host <= host_limit,
    )
    return replace(plan, choices=Explained(plan, request, memory.spec, config, hardware).choices_of_decode())


def require_fit(plan: Plan, request: ResolvedRequest) -> None:
    """Raise DoesNotFitError, with the nearest settings that fit, if the plan does not."""
    if plan.fits:
        return
    short = [(d.name, d.peak, d.limit_bytes) for d in plan.devices if d.peak > d.limit_bytes]
    if plan.host_bytes > plan.host_limit_bytes:
        short.append(("the host", plan.host_bytes, plan.host_limit_bytes))
    where = "; ".join(f"{name} needs {format_bytes(need)} and may use {format_bytes(has)}" for name, need, has in short)
    near = [
        ", ".join(f"{k}={v}" for k, v in n.items() if not k.startswith("predicted"))
        + f" (about {format_seconds(n['predicted_seconds'])})"
        for n in plan.nearest_that_fits
    ]
    hint = f"These fit: {' · '.join(near)}." if near else "No smaller setting fits either."
    size = f"{request.width}x{request.height} with {request.num_frames} frames"
    raise DoesNotFitError(f"{size} does not fit: {where}.", hint=hint)


def _fastest_that_fits(
    request: ResolvedRequest, memory: ModelMemory, config: EngineConfig, hardware: Hardware
) -> tuple[Plan, tuple[Plan, ...]]:
    """The first candidate that fits, or the one that lacks least; and those of placements that come before it in vain."""
    refused: list[Plan] = []
    if config.strategy in ("auto", "parallel"):
        shared = parallel_placement(request, config, hardware)
        if shared is not None:
            plan = _parallel_plan(request, memory, config, hardware, shared)
            if plan.fits or config.strategy == "parallel":
                return plan, ()
            refused.append(plan)
    alone: list[Plan] = []
    for place in find_placements(config, hardware):
        plan = _fastest_of(request, memory, config, hardware, place)
        if plan.fits:
            return plan, (*refused, *alone)
        alone.append(plan)
    least = min(alone, key=lambda plan: sum(max(0, d.peak - d.limit_bytes) for d in plan.devices))
    return least, (*refused, *(plan for plan in alone if plan is not least))


def _fastest_of(
    request: ResolvedRequest, memory: ModelMemory, config: EngineConfig, hardware: Hardware, place: Placement
) -> Plan:
    """The first candidate of one placement that fits, or the smallest one."""
    weights = memory.transformer_weights(_transformer_dtype(config, place.transformer))
    ways = list(candidates(request, memory.spec, place, weights))
    smallest = _plan(request, memory, config, hardware, place, *min(ways, key=bulk))
    all_on_host = place.transformer.is_cpu and place.vae.is_cpu  # there the smallest needs least of the host too
    text_dtype, hold = text_encoder_choice(memory.spec, config)
    least = smallest.host_bytes if all_on_host else HOST_BASE_BYTES + text_encoder_bytes(memory.spec, text_dtype, hold)
    if any(d.peak > d.limit_bytes for d in smallest.devices) or least > smallest.host_limit_bytes:
        return smallest  # without a look at all the others
    plans = (_plan(request, memory, config, hardware, place, *way) for way in ways)
    return next((plan for plan in plans if plan.fits), smallest)


def _too_small_for_the_models(plan: Plan, memory: ModelMemory) -> bool:
    """Whether all is on the host, and the weights alone are more than it has."""
    if (plan.transformer_device, plan.vae_device) != ("cpu", "cpu"):
        return False
    text = text_encoder_bytes(memory.spec, plan.text_encoder_dtype, plan.text_encoder_hold)
    models = memory.transformer_weights(plan.transformer_dtype) + memory.vae_weights(plan.vae_dtype)
    return HOST_BASE_BYTES + text + models > plan.host_limit_bytes


def _plan(
    request: ResolvedRequest,
    memory: ModelMemory,
    config: EngineConfig,
    hardware: Hardware,
    place: Placement,
    resident: int,
    share_first: bool,
    keep_both: bool,
    mode: DecodePlan,
    layout: Layout = ONE_DEVICE,
) -> Plan:
    size = (request.generated_height, request.generated_width, request.num_frames)
    dtype = _transformer_dtype(config, place.transformer)
    vae_dtype = "float32" if config.vae_dtype == "auto" else config.vae_dtype
    texts = [request.prompt, request.negative_prompt] if request.uses_guidance else [request.prompt]
    positions = sorted(text_positions(text, memory.spec.text_len) for text in texts)
    # With the branches of the guidance on devices of their own, each has one prompt.
    positions = positions[-1:] if layout.cfg > 1 else positions
    transformer = memory.transformer(size, dtype, positions, resident, place.transformer.name, share_first, layout)
    ranks = max(1, len(place.ranks))
    vae_weights, decode = memory.vae_weights(vae_dtype), memory.decode(size, mode, vae_dtype, place.vae.name, ranks)
    # The decode's memory is taken once before the denoise (ladder.reserve_decode), when the text is there already.
    beside = transformer.weights + transformer.text + transformer.latents + transformer.exchange
    on_transformer = {"denoise": transformer.peak, "decode": beside if keep_both else transformer.parked}
    on_vae = {"denoise": vae_weights if keep_both else 0, "decode": vae_weights + decode}
    devices = _device_plans(place, on_transformer, on_vae, config)

    text_dtype, hold = text_encoder_choice(memory.spec, config)
    text = text_encoder_bytes(memory.spec, text_dtype, hold)
    host = HOST_BASE_BYTES + text + (min(MAPPED_BYTES, text) if hold == "resident" else 0)
    host += len(place.ranks) * HOST_BASE_BYTES  # processes of their own
    if config.model not in RANDOM_SPECS:
        host += memory.loading_host(dtype)
    host += sum(d.peak for d in devices if d.name == "cpu") + memory.decode_host(size, mode, vae_dtype, place.vae.name)
    if not keep_both and not place.vae.is_cpu:
        host += vae_weights  # the VAE waits there while the transformer has the device
    waiting, layers, on_host = 0, memory.spec.transformer.num_layers, 0
    if not place.transformer.is_cpu:
        on_host = layers - resident if keep_both else layers  # taking turns, all blocks wait on the host at times
        waiting = transformer.total_weights * on_host // layers
    host_limit = min(config.ram_limit or hardware.host_total_bytes, hardware.host_free_bytes)
    # Mapped from a scratch file the system may write blocks out; two at a time are being read.
    block_hold: BlockHold = "pinned" if host + waiting <= host_limit else "mapped"
    host += waiting if block_hold == "pinned" else transformer.total_weights * min(on_host, 2) // layers
    fits = host <= host_limit and all(d.peak <= d.limit_bytes for d in devices)
    return Plan(
        strategy=place.strategy,
        transformer_device=place.transformer.name,
        vae_device=place.vae.name,
        transformer_dtype=dtype,
        vae_dtype=vae_dtype,
        text_encoder_dtype=text_dtype,
        text_encoder_hold=hold,
        resident_blocks=resident,
        block_hold=block_hold,
        share_first=share_first,
        decode=mode,
        keep_both=keep_both,
        tf32=config.tf32,
        devices=devices,
        host_bytes=host,
        host_limit_bytes=host_limit,
        choices=(),
        seconds=predict_seconds(request, memory.spec, place.transformer, place.vae, ranks),
        fits=fits,
    )


def _parallel_plan(
    request: ResolvedRequest, memory: ModelMemory, config: EngineConfig, hardware: Hardware, place: Placement
) -> Plan:
    """Every rank holds the whole transformer, its part of the sequence, and its rows of the decode."""
    spec, count = memory.spec, len(place.ranks)
    rates = config.speeds or tuple(rate(device) for device in place.ranks)
    step_s = step_seconds(request, predict_seconds(request, spec, place.transformer, place.vae, count))
    item = DTYPE_BYTES[_transformer_dtype(config, place.transformer)]
    pairs = request.uses_guidance and pairs_up(rates, sequence_cost(request, spec, count, item, step_s, hardware.link))
    layout = choose_layout(count, spec.transformer.num_attention_heads, pairs)
    plan = _plan(
        request, memory, config, hardware, place, spec.transformer.num_layers, True, True,
        DecodePlan("strip", count), layout,
    )  # fmt: skip
    return replace(plan, ranks=tuple(d.name for d in place.ranks), layout=layout)


def _device_plans(
    place: Placement, on_transformer: dict[str, int], on_vae: dict[str, int], config: EngineConfig
) -> tuple[DevicePlan, ...]:
    if place.ranks:
        phases = {phase: int((on_transformer[phase] + on_vae[phase]) * (1 + RANKS_SHARE)) for phase in on_vae}
        return tuple(_device_plan(device, "vae+transformer", phases, config) for device in place.ranks)
    if place.shared:
        role = "vae+transformer" + ("+text_encoder" if place.vae.is_cpu else "")
        phases = {phase: on_transformer[phase] + on_vae[phase] for phase in on_vae}
        return (_device_plan(place.vae, role, phases, config),)
    return (
        _device_plan(place.vae, "vae", on_vae, config),
        _device_plan(place.transformer, "transformer", on_transformer, config),
    )


def _device_plan(device: DeviceInfo, role: str, phases: dict[str, int], config: EngineConfig) -> DevicePlan:
    free = max(0, device.free_bytes - HEADROOM_BYTES)
    limit = free if config.vram_limit is None or device.is_cpu else min(config.vram_limit, free)
    if not device.is_cpu:
        phases = {phase: int(size * (1 + LATER_JOBS_SHARE)) for phase, size in phases.items()}
    return DevicePlan(device.name, role, {"encode": 0} | phases, limit)


def _transformer_dtype(config: EngineConfig, device: DeviceInfo) -> str:
    if config.transformer_dtype != "auto":
        return config.transformer_dtype
    if device.is_cpu:
        return "float32"
    return "bfloat16" if device.has_bfloat16 else "float16"


def text_encoder_choice(spec: ModelSpec, config: EngineConfig) -> tuple[str, Literal["resident", "streamed"]]:
    """What the text encoder computes in, and how its weights are held."""
    # A few dozen tokens: the time goes into reading weights, so half the bytes are twice as fast.
    small = text_encoder_bytes(spec, "float32", "resident") < GIB
    dtype = config.text_encoder_dtype
    if dtype == "auto":
        dtype = "float32" if small else "bfloat16"
    if config.text_encoder_hold != "auto":
        return dtype, config.text_encoder_hold
    return dtype, "resident" if small else "streamed"
