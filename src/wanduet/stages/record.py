"""The record of how one video was made: its metadata besides the request and the plan."""

from dataclasses import dataclass, field

from wanduet.runtime.context import Timings


@dataclass(eq=False, slots=True)
class VideoRecord:
    """How one video of a request was made. Only one stage at a time changes it.

    `notes`: the fallbacks and other deviations from the plan, in order. `attention`, `kernels`, `vae_kernels`: the
    attention back end and the kernels in use, by their names in `kernels.select`. `changed`: whether a callback changed
    the latents. `skipped_steps`: those that a step cache skipped, as indices in the schedule. `quantized_layers`: how many
    linear layers were computed in 8 bits. `timings`: seconds by phase, of this video only.
    """

    index: int
    seed: int
    notes: list[str] = field(default_factory=list)
    attention: str | None = None
    kernels: str | None = None
    vae_kernels: str | None = None
    changed: bool = False
    skipped_steps: list[int] = field(default_factory=list)
    quantized_layers: int = 0
    timings: Timings = field(default_factory=Timings)

    def note(self, event: str) -> None:
        """Record a deviation from the plan."""
        self.notes.append(event)
