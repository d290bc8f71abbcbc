"""`wanduet bench`: measures how long a job takes on this machine, by phase."""

import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from wanduet.config import EngineConfig
from wanduet.doors.cli.commands import check_attention, predicted, settings
from wanduet.doors.cli.progress import follow, stoppable_engine
from wanduet.engine.job import OutputOptions
from wanduet.engine.roofline import where_it_went
from wanduet.errors import CancelledError, InvalidRequestError
from wanduet.media.provenance import versions
from wanduet.request import GenerationRequest

MOST_RUNS = 100


def run_bench(request: GenerationRequest, config: EngineConfig, runs: int) -> dict[str, Any]:
    """Return medians over `runs` equal jobs. Nothing is kept. Raises InvalidRequestError.

    A job before them loads the models and selects kernels; its times are reported separately.
    """
    if not 1 <= runs <= MOST_RUNS:
        raise InvalidRequestError("runs", runs, f"1 to {MOST_RUNS}", min(max(runs, 1), MOST_RUNS))
    check_attention(config)
    config = replace(config, cache_embeddings=False)  # else only the first run would encode the text
    request = request if request.seed is not None else request.model_copy(update={"seed": 0})
    timings: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder, stoppable_engine(config) as engine:
        for number in range(runs + 1):
            print(f"run {number} of {runs}" if number else "warming up", file=sys.stderr)
            job = engine.submit(request, OutputOptions(Path(folder) / "bench.mp4"))
            interrupted = follow(job)
            result = job.result()
            if interrupted:  # this run has ended already, the next must not start
                raise CancelledError("Interrupted.")
            timings.append({name: round(seconds, 4) for name, seconds in result.timings.items()})
        measured = timings[1:]
        medians = {name: round(statistics.median(one[name] for one in measured), 4) for name in measured[0]}
        resolved, plan, hardware = job.request, job.plan, engine.hardware
        made = resolved.num_videos_per_prompt
        steps = made * max(1, resolved.num_denoising_steps)
        return {
            "model": config.model,
            "settings": settings(resolved),
            "strategy": plan.strategy,
            "hardware": {"cpu": hardware.host, "gpus": [device.model for device in hardware.gpus]},
            "timings": medians,
            "first_run": timings[0],
            "runs": measured,
            "seconds_per_step": round(medians["denoise_s"] / steps, 5),
            "decoded_frames_per_second": round(made * resolved.num_frames / max(medians["decode_s"], 1e-9), 2),
            "peak_memory_bytes": result.peak_memory_bytes,
            "predicted_peak_bytes": predicted(plan),
            "predicted_seconds": round(plan.prediction.seconds.total, 1),
            "attention": job.attention,
            "kernels": job.videos[-1].record.kernels,  # None for jobs on several ranks
            "vae_kernels": job.videos[-1].record.vae_kernels,
            "rungs": job.notes,
            "profile": where_it_went(job, engine.models.memory),
            "versions": versions(),
        }
