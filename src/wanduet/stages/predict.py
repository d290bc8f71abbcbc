"""The predictor of a denoise: a loaded transformer behind `sampling.predictor.Predictor`, and what it is conditioned on.

A predictor that skips work (a cache between steps, for example) wraps the transformer's in `make_predictor`, the only
place that makes one.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wanduet.accelerate.step_cache import Stateless, StepCache, make_rule
from wanduet.distributed.collectives import broadcast_
from wanduet.distributed.sequence.sharding import Sharding
from wanduet.kernels.attention.call import Step
from wanduet.kernels.precision import EXACT, PRODUCTS
from wanduet.media.embeddings import PromptEmbeds
from wanduet.models.dit.model import TextContext
from wanduet.models.text.umt5 import pad_embeddings
from wanduet.request import ResolvedRequest
from wanduet.runtime.context import RunContext
from wanduet.runtime.loaded import LoadedTransformer
from wanduet.runtime.release import release_memory
from wanduet.sampling.guidance import Combination, Guidance, NoGuidance, PairedPredictor, SequentialGuidance
from wanduet.sampling.predictor import OnPredict, Predictor
from wanduet.sampling.samplers import State
from wanduet.stages.fallback import DenoiseFallback
from wanduet.stages.task import Conditions

Forward = Callable[[], Any]
TextPredictor = Predictor[TextContext]


class TransformerPredictor(Stateless):
    """Predictor of one transformer, without state. `forward` runs each forward, and may rerun it with less memory."""

    def __init__(
        self, denoiser: LoadedTransformer, latent_shape: tuple[int, ...], forward: Callable[[Forward], Any]
    ) -> None:
        """`latent_shape`: `(B, 16, T, h, w)` of the first step; a later step may have another."""
        self._denoiser, self._forward = denoiser, forward
        self._shape, self._rope = latent_shape, denoiser.transformer.prepare_rope(latent_shape, denoiser.device)

    def __call__(self, latents: Tensor, step: Step, conditions: Sequence[TextContext]) -> Sequence[Tensor]:
        """See Predictor."""
        timestep = torch.full((1,), step.timestep, dtype=torch.float32, device=latents.device)
        transformer = self._denoiser.transformer
        if latents.shape != self._shape:
            release_memory()  # the allocator's blocks have the sizes of the steps before
            self._shape, self._rope = latents.shape, transformer.prepare_rope(latents.shape, latents.device)
        rope = self._rope
        velocities: list[Tensor] = self._forward(
            lambda: transformer.forward_cfg(latents, timestep, conditions, rope, step)
        )
        return velocities


class ShardedPredictor(Stateless):
    """`TransformerPredictor` in which ranks share the work in another way than in the transformer's other forwards."""

    def __init__(
        self,
        denoiser: LoadedTransformer,
        latent_shape: tuple[int, ...],
        forward: Callable[[Forward], Any],
        sharding: Sharding,
    ) -> None:
        """See TransformerPredictor."""
        self._transformer, self._sharding = denoiser.transformer, sharding
        with self._shared():
            self._predictor = TransformerPredictor(denoiser, latent_shape, forward)

    def __call__(self, latents: Tensor, step: Step, conditions: Sequence[TextContext]) -> Sequence[Tensor]:
        """See Predictor."""
        with self._shared():
            return self._predictor(latents, step, conditions)

    @contextmanager
    def _shared(self) -> Iterator[None]:
        transformer, usual = self._transformer, self._transformer.runtime.sharding
        transformer.runtime = replace(transformer.runtime, sharding=self._sharding)
        try:
            yield
        finally:
            transformer.runtime = replace(transformer.runtime, sharding=usual)


def forward_of(denoiser: LoadedTransformer, context: RunContext) -> Callable[[Forward], Any]:
    """Return what runs each forward. On one device, it reruns with less memory where that has run out. In a rank it
    does not: ranks must run the same forwards, so the group fails, and starts again."""
    return DenoiseFallback(context, denoiser) if denoiser.mesh is None else _run


def make_predictor(
    denoiser: LoadedTransformer,
    latent_shape: tuple[int, ...],
    forward: Callable[[Forward], Any],
    request: ResolvedRequest,
) -> TextPredictor:
    """Return the predictor of a denoise: `TransformerPredictor`, whose two prompts are computed by two ranks where a group
    divides them, and whose steps are skipped by the request's step cache, if it has one."""
    predictor: TextPredictor = TransformerPredictor(denoiser, latent_shape, forward)
    mesh = denoiser.mesh
    if mesh is not None and mesh.layout.cfg > 1:
        after = denoiser.unguided
        alone = None if after is None else ShardedPredictor(denoiser, latent_shape, forward, after)
        predictor = PairedPredictor(predictor, mesh.cfg, alone)
    rule = make_rule(request, denoiser.spec, time_embedding(denoiser))
    if rule is None:
        return predictor
    return StepCache(predictor, rule, bool if mesh is None else _as_rank_0, denoiser.device)


def time_embedding(denoiser: LoadedTransformer) -> Callable[[Tensor], Tensor]:
    """Return the transformer's time embedding, from timesteps `[steps]` to `[steps, C]`, both float32 on the host."""

    @PRODUCTS.at(EXACT)
    def embed_time(timesteps: Tensor) -> Tensor:
        return denoiser.transformer.condition_embedder.embed_time(timesteps.to(denoiser.device))[0].cpu()

    return embed_time


def observed(predictor: TextPredictor, on_predict: OnPredict | None) -> TextPredictor:
    """Return the predictor, with a call of `on_predict` (None: no call) after each of its predictions."""
    return predictor if on_predict is None else _Observed(predictor, on_predict)


class _Observed:
    def __init__(self, predictor: TextPredictor, on_predict: OnPredict) -> None:
        self._predictor, self._on_predict = predictor, on_predict
        self.state, self.restore = predictor.state, predictor.restore

    def __call__(self, latents: Tensor, step: Step, conditions: Sequence[TextContext]) -> Sequence[Tensor]:
        velocities = self._predictor(latents, step, conditions)
        self._on_predict(latents, step, velocities)
        return velocities


def skipped_steps(predictor: TextPredictor) -> list[int]:
    """Return the steps that a predictor has skipped so far, as indices in the schedule."""
    return list(predictor.skipped) if isinstance(predictor, StepCache) else []


def make_guidance(
    predictor: TextPredictor,
    conditions: Conditions,
    request: ResolvedRequest,
    denoiser: LoadedTransformer,
    forward: Callable[[Forward], Any],
) -> Guidance:
    """Project the prompts' embeddings to the keys and values that this process needs, and return the guidance.

    Where a group of ranks divides the two prompts, each rank needs only its own, but in steps without guidance: there all
    ranks compute the prompt.
    """

    def context(prompt: PromptEmbeds) -> TextContext:
        padded = pad_embeddings(prompt.embeds, denoiser.spec.text_len).to(denoiser.device)
        projected: TextContext = forward(lambda: denoiser.transformer.prepare_text(padded))
        return projected

    prompt, negative, mesh = conditions.prompt, conditions.negative, denoiser.mesh
    if negative is None:
        return NoGuidance(predictor, context(prompt))
    combination = Combination(request.guidance_scale, request.guidance_mode)
    steps = request.guided_steps, request.num_zero_steps
    if mesh is not None and mesh.layout.cfg > 1:
        own = context((prompt, negative)[mesh.cfg_rank])
        # Of the pair, a rank reads its own only, so that may stand in for the other.
        first = context(prompt) if request.ends_guidance and mesh.cfg_rank == 1 else own
        return SequentialGuidance(predictor, first, own, combination, *steps)
    return SequentialGuidance(predictor, context(prompt), context(negative), combination, *steps)


class GuidanceBySteps:
    """Guidance of a transformer whose weights change between steps: `adapt` sets those of a step, by its index, and returns
    whether they changed; `make` then projects the prompts anew. What guidance remembers of earlier steps goes on."""

    def __init__(self, make: Callable[[], Guidance], adapt: Callable[[int], bool]) -> None:
        self._make, self._adapt = make, adapt
        self._guidance: Guidance | None = make()
        self._state: State = {}  # while there is no guidance

    def __call__(self, latents: Tensor, step: Step) -> Tensor:
        """See Guidance."""
        if self._adapt(step.index) and self._guidance is not None:
            # Dropped first: its keys and values, before there are new ones.
            self._state, self._guidance = self._guidance.state(), None
        if self._guidance is None:
            guidance = self._make()
            guidance.restore(self._state)
            self._guidance = guidance
        return self._guidance(latents, step)

    def state(self) -> State:
        """See Guidance."""
        return self._state if self._guidance is None else self._guidance.state()

    def restore(self, state: State) -> None:
        """See Guidance."""
        self._state = state
        if self._guidance is not None:
            self._guidance.restore(state)


def _as_rank_0(decision: bool) -> bool:
    """Return rank 0's decision; all ranks must call this together."""
    flag = torch.tensor([decision], dtype=torch.int32)
    broadcast_(flag)
    return bool(flag.item())


def _run(forward: Forward) -> Any:
    return forward()
