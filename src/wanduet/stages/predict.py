"""The predictor of a denoise: a loaded transformer behind `sampling.predictor.Predictor`, and what it is conditioned on.

A predictor that skips work (a cache between steps, for example) wraps the transformer's in `make_predictor`, the only
place that makes one.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wanduet.kernels.attention.call import Step
from wanduet.models.dit.model import TextContext
from wanduet.models.text.umt5 import pad_embeddings
from wanduet.runtime.context import RunContext
from wanduet.runtime.loaded import LoadedTransformer
from wanduet.sampling.guidance import Guidance, NoGuidance, ParallelGuidance, SequentialGuidance
from wanduet.sampling.predictor import Predictor
from wanduet.sampling.samplers import State
from wanduet.stages.fallback import DenoiseFallback
from wanduet.stages.task import Conditions

Forward = Callable[[], Any]
TextPredictor = Predictor[TextContext]


class TransformerPredictor:
    """Predictor of one transformer, without state. `forward` runs each forward, and may rerun it with less memory."""

    def __init__(
        self, denoiser: LoadedTransformer, latent_shape: tuple[int, ...], forward: Callable[[Forward], Any]
    ) -> None:
        """`latent_shape`: `(B, 16, T, h, w)`."""
        self._denoiser, self._forward = denoiser, forward
        self._rope = denoiser.transformer.prepare_rope(latent_shape, denoiser.device)

    def __call__(self, latents: Tensor, step: Step, conditions: Sequence[TextContext]) -> Sequence[Tensor]:
        """See Predictor."""
        timestep = torch.full((1,), step.timestep, dtype=torch.float32, device=latents.device)
        transformer, rope = self._denoiser.transformer, self._rope
        velocities: list[Tensor] = self._forward(
            lambda: transformer.forward_cfg(latents, timestep, conditions, rope, step)
        )
        return velocities

    def state(self) -> State:
        """See Predictor."""
        return {}

    def restore(self, state: State) -> None:
        """See Predictor."""


def forward_of(denoiser: LoadedTransformer, context: RunContext) -> Callable[[Forward], Any]:
    """Return what runs each forward. On one device, it reruns with less memory where that has run out. In a rank it
    does not: ranks must run the same forwards, so the group fails, and starts again."""
    return DenoiseFallback(context, denoiser) if denoiser.mesh is None else _run


def make_predictor(
    denoiser: LoadedTransformer, latent_shape: tuple[int, ...], forward: Callable[[Forward], Any]
) -> TextPredictor:
    """Return the predictor of a denoise, see `TransformerPredictor`."""
    return TransformerPredictor(denoiser, latent_shape, forward)


def make_guidance(
    predictor: TextPredictor,
    conditions: Conditions,
    scale: float,
    denoiser: LoadedTransformer,
    forward: Callable[[Forward], Any],
) -> Guidance:
    """Project the prompts' embeddings to the keys and values that this process needs, and return the guidance.

    Where a group of ranks divides the two prompts, each rank needs only its own.
    """
    prompts = [p.embeds for p in (conditions.prompt, conditions.negative) if p is not None]

    def context(embeds: Tensor) -> TextContext:
        padded = pad_embeddings(embeds, denoiser.spec.text_len).to(denoiser.device)
        projected: TextContext = forward(lambda: denoiser.transformer.prepare_text(padded))
        return projected

    mesh = denoiser.mesh
    if len(prompts) == 1:
        return NoGuidance(predictor, context(prompts[0]))
    if mesh is not None and mesh.layout.cfg > 1:
        return ParallelGuidance(predictor, context(prompts[mesh.cfg_rank]), scale, mesh.cfg)
    positive, negative = map(context, prompts)
    return SequentialGuidance(predictor, positive, negative, scale)


def _run(forward: Forward) -> Any:
    return forward()
