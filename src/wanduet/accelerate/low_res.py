"""Which steps of a request are made at a lower resolution, and which one."""

from dataclasses import dataclass
from typing import Any, Self

from wanduet.accelerate.skipped_steps import levels_of
from wanduet.family.low_res import last_low_level, low_size
from wanduet.family.spec import ModelSpec
from wanduet.request import ResolvedRequest
from wanduet.sampling.enlarge import Enlargement
from wanduet.sampling.samplers import Schedule


@dataclass(frozen=True, slots=True)
class LowRes:
    """The first steps of a video, made at `height` x `width` pixels, and how their latents are enlarged."""

    height: int
    width: int
    enlargement: Enlargement

    @classmethod
    def of(cls, request: ResolvedRequest, spec: ModelSpec) -> Self | None:
        """Return them for a request; None if it does not ask for low resolution first.

        At least one step is made at either size, whatever the noise levels of few steps are.
        """
        if not request.low_res_first:
            return None
        size = low_size(request.generated_height, request.generated_width, spec)
        assert size is not None
        small = spec.latent_shape(*size, request.num_frames)[2:]
        large = spec.latent_shape(request.generated_height, request.generated_width, request.num_frames)[2:]
        last = last_low_level(Enlargement(1, small, large).ratio, min(large))
        sigmas, timesteps = levels_of(Schedule.of(request))
        steps = sum(sigma > last for sigma in sigmas[: len(timesteps)])
        return cls(*size, Enlargement(min(max(steps, 1), len(timesteps) - 1), small, large))

    @property
    def num_steps(self) -> int:
        """How many steps are made at the lower resolution."""
        return self.enlargement.num_steps

    def apply(self, request: ResolvedRequest) -> ResolvedRequest:
        """Return a request of the smaller size, all of whose steps cost as much as those at the lower resolution."""
        return request.model_copy(update={"generated_height": self.height, "generated_width": self.width})

    def as_dict(self) -> dict[str, Any]:
        """Return it as a video's metadata have it."""
        return {"steps": self.num_steps, "height": self.height, "width": self.width}

    def __str__(self) -> str:
        """A part of a sentence."""
        return f"the first {self.num_steps} steps at {self.width}x{self.height}"
