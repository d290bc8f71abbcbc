"""The keywords of a call that save work at a loss; diffusers has none of them."""

from dataclasses import asdict, dataclass
from typing import Any

from wanduet.doors.python.loop import CallbackSettings
from wanduet.doors.python.schedule import Schedule
from wanduet.family.step_caches import OFF
from wanduet.request import ResolvedRequest


@dataclass(frozen=True, slots=True)
class Approximations:
    """Fields of a request, by their names there; None where the call does not give them."""

    speed: str | None = None
    loss_budget: float | None = None
    step_cache: str | None = None
    guidance_gate: float | None = None
    sparse: float | None = None
    quantize: str | None = None
    guidance_interval: str | None = None
    guidance_mode: str | None = None
    quantize_attention: str | None = None
    low_res_first: bool = False  # not supported

    def __post_init__(self) -> None:
        """Raise ValueError for what no call can have."""
        if self.low_res_first:
            raise ValueError(
                "low_res_first is not supported in this call: the solver would start anew at another noise level, and the "
                "pipeline's scheduler is stepped as it is. Use wanduet.Engine with GenerationRequest(low_res_first=True)."
            )

    def fields(self, schedule: Schedule, encodes: bool) -> dict[str, Any]:
        """Return the fields of a request that they set, and those that give it as many steps as the call; {} if the call
        gives none. `encodes`: the request has an input video, of which a part is kept."""
        given = {name: value for name, value in asdict(self).items() if value is not None and value is not False}
        if not given:
            return {}
        count = schedule.num_inference_steps if schedule.timesteps is None else len(schedule.timesteps)
        steps = min(int(count * schedule.strength), count)
        if encodes:
            return given | {"num_inference_steps": steps + 1, "strength": (steps + 0.5) / (steps + 1)}
        return given | {"num_inference_steps": max(1, steps)}

    def check(self, request: ResolvedRequest, after: CallbackSettings, scheduler: Any) -> None:
        """Raise ValueError for a step cache that this call cannot have."""
        if request.step_cache == OFF:
            return
        if after.on_step_end is not None:
            raise ValueError(
                "callback_on_step_end may change the latents that a step cache compares: leave it out (progress= shows the "
                f"progress), or the step cache {request.step_cache}."
            )
        if getattr(scheduler, "order", 1) != 1:
            raise ValueError(
                f"{type(scheduler).__name__} computes each step twice, which a step cache cannot skip: set another pipe.scheduler."
            )
