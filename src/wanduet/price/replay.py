"""What approximations predict along the exact trajectory: an exact run's latents and velocities, fed to their rules, or to a
run of their own (`Followed`).

At the same latents, an error is the approximation's own; after some steps of a run of its own, its latents differ too. No
forward is computed where that is possible: a step cache and the guidance gate are functions of velocities that the exact run computes anyway.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from wanduet.accelerate.step_cache import Stateless, StepCache, make_rule
from wanduet.family.spec import ModelSpec
from wanduet.kernels.attention.call import Step
from wanduet.price.compare import relative_error
from wanduet.request import ResolvedRequest
from wanduet.sampling.denoise import StepInfo
from wanduet.sampling.guidance import Combination, Guidance, NoGuidance, SequentialGuidance
from wanduet.sampling.predictor import Predictor

REPLAYED = (
    "step_cache",
    "guidance_gate",
    "guidance_interval",
)  # the fields whose approximations are functions of velocities
# The fields, and the format of weights, whose errors need forwards of their own (`Followed`).
FOLLOWED = ("quantize", "quantize_attention", "sparse", "weights")
CPU = torch.device("cpu")


class Replay:
    """Follows one exact run, whose observer it is (`OnPredict`), for several sets of approximations.

    Computes on the host, in a thread of its own, so that the run is not slowed down.
    """

    def __init__(
        self,
        requests: Mapping[str, ResolvedRequest],
        spec: ModelSpec,
        embed_time: Callable[[], Callable[[Tensor], Tensor]],
    ) -> None:
        """`requests`: of the exact run's prompt and seed, by the key under which `errors` returns them. `embed_time`
        returns the transformer's time embedding (see `make_rule`); called at the first prediction."""
        self._requests, self._spec, self._embed_time = requests, spec, embed_time
        self._followers: dict[str, _Follower] = {}
        self._last = -1  # the last step that was predicted
        self._steps: list[Future[None]] = []
        self._thread = ThreadPoolExecutor(1, "wanduet-replay")

    def __call__(self, latents: Tensor, step: Step, velocities: Sequence[Tensor]) -> None:
        """See OnPredict."""
        if not self._followers or step.index <= self._last:  # the run begins again, with other kernels
            embed = self._embed_time()
            self._followers = {key: _Follower(one, self._spec, embed) for key, one in self._requests.items()}
        self._last = step.index
        host = latents.cpu(), [velocity.cpu() for velocity in velocities]
        self._steps += [self._thread.submit(one, host[0], step, host[1]) for one in self._followers.values()]

    def errors(self) -> dict[str, list[float]]:
        """Wait for the last step, and return the relative error of the guided velocity in each step."""
        self._thread.shutdown()
        for step in self._steps:
            step.result()
        return {key: follower.errors for key, follower in self._followers.items()}


class Trajectory:
    """Keeps an exact run's latents and guided velocities on the host, by step; its observer (`OnPredict`)."""

    def __init__(self, request: ResolvedRequest) -> None:
        self._request = request
        self.latents: dict[int, Tensor] = {}
        self.velocities: dict[int, Tensor] = {}
        self.first_step = request.num_zero_steps
        self._guided = _Guided(request)

    def __call__(self, latents: Tensor, step: Step, velocities: Sequence[Tensor]) -> None:
        """See OnPredict."""
        self.latents[step.index] = latents.cpu()
        self.velocities[step.index] = self._guided(step, velocities)

    def follow(self) -> "Followed":
        """Return what makes another run of the same request follow this one."""
        return Followed(self, _Guided(self._request))


class Followed:
    """Makes a run go along an exact run's trajectory, and measures its error of the guided velocity in each step.

    It is the run's observer (`OnPredict`); `next_latents` is its `on_step`, which replaces the latents.
    """

    def __init__(self, exact: Trajectory, guided: "_Guided") -> None:
        self._exact, self._guided = exact, guided
        self._errors: dict[int, float] = {}

    def __call__(self, latents: Tensor, step: Step, velocities: Sequence[Tensor]) -> None:
        """See OnPredict."""
        self._errors[step.index] = relative_error(self._guided(step, velocities), self._exact.velocities[step.index])

    def next_latents(self, info: StepInfo) -> Tensor | None:
        """Return the exact run's latents before the next step; None after the last."""
        latents = self._exact.latents.get(info.step + 1)
        return None if latents is None else latents.to(info.latents)

    @property
    def errors(self) -> list[float]:
        """The relative error in each step."""
        return [0.0] * self._exact.first_step + [self._errors[step] for step in sorted(self._errors)]


class _Guided:
    """Combines a run's velocities as its guidance does."""

    def __init__(self, request: ResolvedRequest) -> None:
        self._request, self._last = request, -1

    @torch.no_grad()
    def __call__(self, step: Step, velocities: Sequence[Tensor]) -> Tensor:
        if step.index <= self._last or self._last < 0:  # the run begins, or begins again, with other kernels
            self._combine = Combination(self._request.guidance_scale, self._request.guidance_mode)
        self._last = step.index
        host = [velocity.cpu() for velocity in velocities]
        return host[0] if len(host) == 1 else self._combine(host[0], host[1])


class _Follower:
    """One set of approximations along the exact trajectory."""

    def __init__(self, request: ResolvedRequest, spec: ModelSpec, embed_time: Callable[[Tensor], Tensor]) -> None:
        self._exact: Combination | None = None
        self._recorded = _Recorded()
        rule = make_rule(request, spec, embed_time)
        predictor: Predictor[int] = self._recorded
        if rule is not None:
            predictor = StepCache(self._recorded, rule, bool, CPU)
        self._guidance: Guidance = NoGuidance(predictor, 0)
        if request.uses_guidance:
            self._exact, own = (Combination(request.guidance_scale, request.guidance_mode) for _ in range(2))
            self._guidance = SequentialGuidance(predictor, 0, 1, own, request.guided_steps)
        self.errors: list[float] = [0.0] * request.num_zero_steps  # in which nothing is predicted

    @torch.no_grad()
    def __call__(self, latents: Tensor, step: Step, velocities: Sequence[Tensor]) -> None:
        self._recorded.velocities = velocities
        exact = velocities[0] if self._exact is None else self._exact(velocities[0], velocities[1])
        self.errors.append(relative_error(self._guidance(latents, step), exact))


class _Recorded(Stateless):
    """Predictor that returns recorded velocities; its conditions are their numbers."""

    velocities: Sequence[Tensor] = ()

    def __call__(self, latents: Tensor, step: Step, conditions: Sequence[int]) -> Sequence[Tensor]:
        return [self.velocities[number] for number in conditions]
