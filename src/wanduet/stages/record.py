"""How one video was made: what its metadata will say besides the request and the plan."""

from dataclasses import dataclass, field

from wanduet.runtime.context import Timings


@dataclass(eq=False, slots=True)
class VideoRecord:
    """One video of a request, and how it was made. One stage at a time works on it, and changes it.

    `rungs`: what did not go as planned, in the order in which it happened. `attention`, `kernels`, `vae_kernels`: the
    attention back end and the kernels that were used, as `kernels.select` names them. `changed`: whether a callback has
    changed the latents. `timings`: its own seconds by phase.
    """

    index: int
    seed: int
    rungs: list[str] = field(default_factory=list)
    attention: str | None = None
    kernels: str | None = None
    vae_kernels: str | None = None
    changed: bool = False
    timings: Timings = field(default_factory=Timings)

    def note(self, event: str) -> None:
        """Record what did not go as planned."""
        self.rungs.append(event)
