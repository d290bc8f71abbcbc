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

    def adopt(self, made: "VideoRecord") -> None:
        """Take over how another process made the latents, in its record; of its notes, those that are new."""
        self.attention, self.kernels = made.attention, made.kernels
        self.changed = self.changed or made.changed
        self.skipped_steps, self.quantized_layers = made.skipped_steps, made.quantized_layers
        self.notes += [event for event in made.notes if event not in self.notes]
