"""What LoRA adds to a plan: the adapters in host memory, and the seconds to merge them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol, Self

from wanduet.config import format_bytes, format_seconds
from wanduet.footprint.phases import Shapes
from wanduet.loras import loras_at
from wanduet.planning.plan import Choice, Plan
from wanduet.request import ResolvedRequest

# Elements of weights that are read, updated and written in a second. One core of a CPU alone: 0.9e8 at rank 32; an H200: 9e8.
MERGED_PER_SECOND, ON_A_GPU = 2e8, 8e8
LARGEST_COPIES = 3  # of the largest weight in float32: the base, the update, their sum


class AdapterSize(Protocol):
    """What a plan needs to know of an adapter: its bytes in memory, and the names of the parameters that it updates."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""

    @property
    def updates(self) -> Mapping[str, Any]:
        """The updates, by parameter name."""


@dataclass(frozen=True, slots=True)
class LorasPlan:
    """The cost of a request's LoRAs: host memory, and seconds to merge them into the weights and to take them out again.
    `num_elements`: of the weights that change. `merges`: how often they do during one denoise, the first time included."""

    host_bytes: int
    num_elements: int
    merges: int
    num_parameters: int

    @classmethod
    def of(cls, request: ResolvedRequest, adapters: Sequence[AdapterSize], shapes: Shapes) -> Self:
        """`shapes`: of the transformer's parameters."""
        names: Collection[str] = {name for adapter in adapters for name in adapter.updates}
        sizes = [prod(shapes[name]) for name in names]
        steps = request.num_denoising_steps
        sets = [loras_at(request.loras, step, steps) for step in range(steps)]
        merges = sum(one != before for one, before in zip(sets, [(), *sets], strict=False))
        num_bytes = sum({id(one): one.num_bytes for one in adapters}.values())
        host = num_bytes + LARGEST_COPIES * 4 * max(sizes, default=0)
        return cls(host, sum(sizes), merges, len(names))

    def added_to(self, plan: Plan) -> Plan:
        """Return the plan with this cost, and a choice that says so."""
        predicted = plan.prediction
        seconds = self.num_elements / (ON_A_GPU if plan.transformer.device.startswith("cuda") else MERGED_PER_SECOND)
        again = f", {self.merges} times a video" if self.merges > 1 else ""
        why = (
            f"{self.num_parameters} weights are merged in float32 from the base, in about {format_seconds(seconds)}"
            f"{again}; {format_bytes(self.host_bytes)} of host memory"
        )
        choice = Choice("loras", "merged", why)
        prediction = replace(
            predicted,
            host_bytes=predicted.host_bytes + self.host_bytes,
            seconds=replace(predicted.seconds, denoise=predicted.seconds.denoise + self.merges * seconds),
        )
        cost = {"host_bytes": self.host_bytes, "swap_seconds": round(seconds, 2), "merges": self.merges}
        return replace(plan, prediction=prediction, choices=(*plan.choices, choice), loras=cost)
