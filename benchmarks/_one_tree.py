"""Jobs of one tree, of `two_trees.py`: by the tree that PYTHONPATH names, so it imports nothing else of this folder.

    PYTHONPATH=TREE/src python _one_tree.py SETTINGS

SETTINGS is a JSON object. The last line that is printed is a JSON list of the jobs that count.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from wanduet import Engine, EngineConfig, GenerationRequest, OutputOptions

PROMPT = "a red circle moving left on a black background"
WARM_STEPS = 2


def jobs(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a job that is not counted, then those that are."""
    folder, rows = Path(settings["folder"]), []
    config = EngineConfig(data_dir=folder, cache_embeddings=False, checkpoint_seconds=1e9, **settings["config"])
    with Engine(config) as engine:
        for number in range(settings["jobs"] + 1):
            fields = settings["request"] | {"num_inference_steps": settings["steps"]}
            if not number:
                fields |= {"num_inference_steps": WARM_STEPS}
                fields.pop("step_cache", None)  # not allowed for so few steps
            request = GenerationRequest(prompt=PROMPT, seed=1, **fields)
            output = OutputOptions(folder / f"{number}.mp4", save_latents=True)
            job = engine.submit(request, output)
            result = job.result()
            files = output.path, output.latents_path(0, 1)
            rows.append(
                {
                    "timings": result.timings,
                    "frames": frames_hash(files[0]),
                    "latents": latents_hash(files[1]),
                    "measured": result.peak_memory_bytes,
                    "predicted": {
                        device["name"]: max(device["phases"].values()) for device in job.plan.as_dict()["devices"]
                    },
                    "predicted_seconds": job.plan.as_dict()["predicted_seconds"],
                    "attention": job.attention,
                    "strategy": job.plan.strategy,
                    "warnings": list(result.warnings),
                }
            )
            for path in files:
                path.unlink(missing_ok=True)
    return rows[1:]


def latents_hash(path: Path) -> str:
    from safetensors.torch import load_file

    return hashlib.sha256(load_file(path)["latents"].float().numpy().tobytes()).hexdigest()


def frames_hash(path: Path) -> str:
    import av

    digest = hashlib.sha256()
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            digest.update(frame.to_ndarray(format="rgb24").tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    print(json.dumps(jobs(json.loads(sys.argv[1]))))
