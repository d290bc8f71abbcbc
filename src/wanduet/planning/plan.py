"""A plan, its parts and its predictions, as plain data. `planning.planner` makes plans."""

from dataclasses import dataclass
from typing import Any, Literal

from wanduet.accelerate.skipped_steps import Forwards
from wanduet.config import Weights, format_bytes, format_seconds
from wanduet.distributed.mesh import ONE_DEVICE, Layout
from wanduet.errors import DoesNotFitError
from wanduet.family.speeds import Price, price_dict
from wanduet.models.vae.rows import Tiling
from wanduet.planning.cost import Seconds
from wanduet.planning.placement import StrategyName
from wanduet.request import ResolvedRequest

OffloadMemory = Literal["pinned", "mapped"]
Residency = Literal["resident", "streamed"]


@dataclass(frozen=True, slots=True)
class TransformerPlan:
    """How the transformer is loaded and run.

    The first `resident_blocks` blocks stay on `device`; the others are offloaded to host memory of the kind
    `offload_memory`: page-locked, or mapped from a scratch file. `share_first`: with guidance, compute the first
    block's self-attention once for both prompts. `weights`: the format of the blocks' matrices in memory, as in
    `EngineConfig`; "auto" if they are in `dtype`.
    """

    device: str
    dtype: str
    resident_blocks: int
    offload_memory: OffloadMemory
    share_first: bool
    weights: Weights = "auto"


@dataclass(frozen=True, slots=True)
class VAEPlan:
    """How the VAE decodes, and encodes an input video.

    `tiling`: number and order of the decode's row tiles. `tf32`: its float32 products may use TF32. `encode_tiles`: the
    number of an encode's row tiles.
    """

    device: str
    dtype: str
    tiling: Tiling
    tf32: bool
    encode_tiles: int = 1


@dataclass(frozen=True, slots=True)
class TextPlan:
    """How the text encoder runs: `resident` keeps all layers in the device's memory, `streamed` reads one after another
    from the files."""

    dtype: str
    residency: Residency
    device: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        """Whether it does not run on the CPU."""
        return self.device != "cpu"

    @property
    def on_host(self) -> Residency:
        """What the host's memory contains of it."""
        return "streamed" if self.on_gpu else self.residency


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Strategy `parallel`: the device of each rank, and how ranks divide the work. Other strategies have no ranks."""

    ranks: tuple[str, ...] = ()
    layout: Layout = ONE_DEVICE


@dataclass(frozen=True, slots=True)
class DevicePrediction:
    """The models on one device, and its predicted peak bytes in each phase, without the CUDA context.

    `role`: "vae", "transformer", "text_encoder", joined by "+".
    """

    name: str
    role: str
    phases: dict[str, int]
    limit_bytes: int

    @property
    def peak(self) -> int:
        """The highest of the phases' peaks, in bytes."""
        return max(self.phases.values(), default=0)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The predicted cost of a plan: bytes of each device and of the host, with their limits, and seconds.

    `forwards`: of the transformer for one video, if the request asks for an approximation. `speed`, if it asks for one, and
    its `price`, if that is known.
    """

    devices: tuple[DevicePrediction, ...]
    host_bytes: int
    host_limit_bytes: int
    seconds: Seconds
    forwards: Forwards | None = None
    speed: str | None = None
    price: Price | None = None

    @property
    def fits(self) -> bool:
        """Whether nothing exceeds its limit."""
        return self.host_bytes <= self.host_limit_bytes and all(d.peak <= d.limit_bytes for d in self.devices)

    @property
    def peak_bytes(self) -> dict[str, int]:
        """The peak bytes of each device, by name."""
        return {d.name: d.peak for d in self.devices}


@dataclass(frozen=True, slots=True)
class Choice:
    """One setting of a plan, its value and the reason. `setting` is its name in `wanduet plan --json`."""

    setting: str
    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All settings with which the engine runs a request.

    `both_resident`: transformer and VAE stay on the device together; if False, each is moved off the device while the
    other runs. `choices` explains the settings to users; `nearest_that_fits`: settings that fit if the plan does not.
    """

    strategy: StrategyName
    transformer: TransformerPlan
    vae: VAEPlan
    text: TextPlan
    both_resident: bool
    prediction: Prediction
    group: GroupPlan = GroupPlan()
    choices: tuple[Choice, ...] = ()
    nearest_that_fits: tuple[dict[str, Any], ...] = ()
    loras: dict[str, Any] | None = None  # what the request's LoRAs cost, see `planning.loras`

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as `wanduet plan --json` prints it."""
        predicted, seconds = self.prediction, self.prediction.seconds
        about: dict[str, Any] = {}
        if predicted.forwards is not None:
            about["predicted_forwards"] = predicted.forwards.as_dict()
        if predicted.speed is not None:
            about["speed"] = predicted.speed
        if predicted.speed is not None or predicted.price is not None:
            about["price"] = price_dict(predicted.price)
        if self.loras is not None:
            about["loras"] = self.loras
        return {
            "fits": predicted.fits,
            "strategy": self.strategy,
            "devices": [
                {"name": d.name, "role": d.role, "phases": d.phases, "limit_bytes": d.limit_bytes}
                for d in predicted.devices
            ],
            "host_bytes": predicted.host_bytes,
            "host_limit_bytes": predicted.host_limit_bytes,
            "choices": [{"setting": c.setting, "value": c.value, "why": c.why} for c in self.choices],
            "predicted_seconds": ({"encode": round(seconds.encode, 1)} if seconds.encode else {})
            | {
                "denoise": round(seconds.denoise, 1),
                "decode": round(seconds.decode, 1),
                "total": round(seconds.total, 1),
            },
            **about,
            "nearest_that_fits": list(self.nearest_that_fits),
        }


def require_fit(plan: Plan, request: ResolvedRequest) -> None:
    """Raise DoesNotFitError, which names the nearest settings that fit, if the plan does not fit."""
    predicted = plan.prediction
    if predicted.fits:
        return
    short = [(d.name, d.peak, d.limit_bytes) for d in predicted.devices if d.peak > d.limit_bytes]
    if predicted.host_bytes > predicted.host_limit_bytes:
        short.append(("the host", predicted.host_bytes, predicted.host_limit_bytes))
    where = "; ".join(f"{name} needs {format_bytes(need)} and may use {format_bytes(has)}" for name, need, has in short)
    near = [
        ", ".join(f"{k}={v}" for k, v in n.items() if not k.startswith("predicted"))
        + f" (about {format_seconds(n['predicted_seconds'])})"
        for n in plan.nearest_that_fits
    ]
    hint = f"These fit: {' · '.join(near)}." if near else "No smaller setting fits either."
    size = f"{request.width}x{request.height} with {request.num_frames} frames"
    raise DoesNotFitError(f"{size} does not fit: {where}.", hint=hint)
