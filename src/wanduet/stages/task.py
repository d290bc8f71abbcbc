"""The input of a denoise, as plain data that can be sent to other processes."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from wanduet.media.embeddings import PromptEmbeds
from wanduet.request import ResolvedRequest
from wanduet.sampling.denoise import OnStep, Watch
from wanduet.sampling.predictor import OnPredict


@dataclass(frozen=True, slots=True)
class Conditions:
    """The data that a denoise is conditioned on, in host memory.

    Embeddings of the prompt, and of the negative prompt if guidance is on (else None). `video`: normalised latents
    `[16, T, h, w]` float32 of the video to start from; None to start from noise.
    """

    prompt: PromptEmbeds
    negative: PromptEmbeds | None
    video: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DenoiseTask:
    """The input of one denoise: video `index` of a request.

    `digest` is the key of its checkpoints; `about` is stored in them. `writer` is the job's id: the denoise always
    resumes from that job's own checkpoints, and from another job's only if `resume` is True. It saves a checkpoint
    every `checkpoint_seconds`. `watched` makes rank 0 of a group send each step to the engine's process.
    """

    request: ResolvedRequest
    index: int
    conditions: Conditions
    digest: str
    about: dict[str, Any]
    writer: str
    resume: bool
    checkpoint_seconds: float
    watched: bool = False

    @property
    def first_step(self) -> int:
        """The schedule's steps before this one are left out: an input video is less noisy than they expect."""
        return self.request.first_step


@dataclass(frozen=True, slots=True)
class StepHooks:
    """What is called after each step: `on_step` may replace the latents, `watch` only sees them; and `on_predict`, after
    each prediction."""

    on_step: OnStep | None = None
    watch: Watch | None = None
    on_predict: OnPredict | None = None
