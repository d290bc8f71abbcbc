"""An engine that only decodes latents which another worker denoised, for a GPU too small or too slow for the
transformer."""

from wanduet.engine import generate
from wanduet.engine.job import Job
from wanduet.engine.pipeline import Engine
from wanduet.errors import LatentsGoneError
from wanduet.planning.plan import Plan
from wanduet.planning.planner import make_decode_plan
from wanduet.request import GenerationRequest, ResolvedRequest


class Decoder(Engine):
    """Decodes jobs whose latents are saved beside their output. A job without them ends with LatentsGoneError."""

    def _plan(self, request: ResolvedRequest) -> Plan:
        return make_decode_plan(request, self.models.memory, self.config, self.hardware)

    def _check_input(self, request: GenerationRequest) -> None:
        """The latents need no input video: a request may name it by its hash, as records do."""

    def _encode_job(self, job: Job) -> None:
        latents = generate.kept_latents(self.models, job, any_precision=True)
        if latents is None:
            raise LatentsGoneError("The latents of this job are not where its denoise has left them.")
        self._decode_here(job, latents)
