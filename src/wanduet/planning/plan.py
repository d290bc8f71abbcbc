"""What runs where: a plan's parts, and what is predicted of it. Plain data; `planning.planner` makes it."""

from dataclasses import dataclass
from typing import Any, Literal

from wanduet.config import format_bytes, format_seconds
from wanduet.distributed.mesh import ONE_DEVICE, Layout
from wanduet.errors import DoesNotFitError
from wanduet.models.vae.rows import Tiling
from wanduet.planning.cost import Seconds
from wanduet.planning.placement import StrategyName
from wanduet.request import ResolvedRequest

OffloadMemory = Literal["pinned", "mapped"]
Residency = Literal["resident", "streamed"]


@dataclass(frozen=True, slots=True)
class TransformerPlan:
    """How the transformer is loaded and run.

    The first `resident_blocks` of its blocks stay on `device`; the others wait in host memory of the kind
    `offload_memory`: page-locked, or mapped from a scratch file. `share_first`: with guidance, the first block's
    self-attention is computed once for both prompts.
    """

    device: str
    dtype: str
    resident_blocks: int
    offload_memory: OffloadMemory
    share_first: bool


@dataclass(frozen=True, slots=True)
class VAEPlan:
    """How the VAE decodes: in which row tiles and order (`tiling`), and whether its float32 products may use TF32."""

    device: str
    dtype: str
    tiling: Tiling
    tf32: bool


@dataclass(frozen=True, slots=True)
class TextPlan:
    """How the text encoder runs on the CPU: with all layers in memory (`resident`), or reading one after another."""

    dtype: str
    residency: Residency


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """Strategy `parallel`: the device of each rank, and how they divide the work. No ranks: another strategy."""

    ranks: tuple[str, ...] = ()
    layout: Layout = ONE_DEVICE


@dataclass(frozen=True, slots=True)
class DevicePrediction:
    """What one device holds, and its predicted peak bytes in each phase, beside the CUDA context.

    `role`: "vae", "transformer", "text_encoder", joined by "+".
    """

    name: str
    role: str
    phases: dict[str, int]
    limit_bytes: int

    @property
    def peak(self) -> int:
        """The highest phase."""
        return max(self.phases.values(), default=0)


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a plan will take: bytes of each device and of the host beside their limits, and seconds."""

    devices: tuple[DevicePrediction, ...]
    host_bytes: int
    host_limit_bytes: int
    seconds: Seconds

    @property
    def fits(self) -> bool:
        """Whether nothing exceeds its limit."""
        return self.host_bytes <= self.host_limit_bytes and all(d.peak <= d.limit_bytes for d in self.devices)

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Highest predicted phase of each device."""
        return {d.name: d.peak for d in self.devices}


@dataclass(frozen=True, slots=True)
class Choice:
    """One setting that the plan has decided, and why. Its name is that of `wanduet plan --json`."""

    setting: str
    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything the engine needs to know to run a request.

    `both_resident`: transformer and VAE stay loaded side by side; else each is taken off the device while the other
    runs. `choices` and `nearest_that_fits` are for people: why it is so, and what fits instead.
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

    def as_dict(self) -> dict[str, Any]:
        """The plan as `wanduet plan --json` prints it."""
        predicted, seconds = self.prediction, self.prediction.seconds
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
            "predicted_seconds": {
                "denoise": round(seconds.denoise, 1),
                "decode": round(seconds.decode, 1),
                "total": round(seconds.total, 1),
            },
            "nearest_that_fits": list(self.nearest_that_fits),
        }


def require_fit(plan: Plan, request: ResolvedRequest) -> None:
    """Raise DoesNotFitError, with the nearest settings that fit, if the plan does not."""
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
