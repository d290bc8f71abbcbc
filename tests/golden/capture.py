"""What the golden files hold, captured through public doors: the command line, `Engine`, `WanPipeline`, the server's schema."""

import hashlib
import io
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import internals
import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import wanduet
from wanduet.__main__ import main

Json = Any
SAMPLES = 64
PROMPT = "a red circle moving left on a black background"
SMALL = {"prompt": PROMPT, "height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3, "seed": 5}

# The command line.

MINIATURE = "--model miniature --devices cpu --height 32 --width 48 --num-frames 5 --steps 3 --seed 5"
PLANS = {
    "8 GiB": "--hardware 8",
    "12 GiB": "--hardware 12",
    "24 GiB": "--hardware 24",
    "2x24 GiB": "--hardware 2x24",
    "4x24 GiB": "--hardware 4x24",
    "24 and 12 GiB, 720p": "--hardware 24GiB+12GiB --resolution 720p",
    "RTX 4090, 33 frames": "--hardware=RTX_4090 --num-frames 33",
    "RTX 4090, 720p": "--hardware=RTX_4090 --resolution 720p",
    "2x3090 without guidance": "--hardware 2x3090 --guidance-scale 1",
    "8 GiB, a still": "--hardware 8 --num-frames 1 --steps 20 --sampler euler",
    "6 GiB and little host memory": "--hardware 6,ram=12GiB",
    "two GPUs with roles": "--hardware 2x24 --devices vae=cuda:0,transformer=cuda:1",
    "placed in float32 without TF32": "--hardware 2x24 --strategy placed --transformer-dtype float32 --no-tf32",
    "parallel by speeds": "--hardware 24,12 --strategy parallel --devices cuda:0,cuda:1 --device-speeds 2,1",
    "text encoder in memory": "--hardware 24 --text-encoder-hold resident --text-encoder-dtype float32",
    "a model with files": "--hardware 8 --model miniature",
    "CPU, 5 frames": "--hardware cpu --num-frames 5 --sampler dpm++2m",
    "CPU in two processes": "--hardware cpu --devices cpu,cpu --strategy parallel --model miniature",
    "2x6 GiB, parallel does not fit": "--hardware 2x6,ram=16GiB --strategy parallel",
}
# Half a second each, or more.
SLOW_PLANS = {
    "CPU": "--hardware cpu",
    "2x3090, 720p": "--hardware 2x3090 --resolution 720p",
    "four videos of 5 frames": "--hardware 12 --num-frames 5 --num-videos-per-prompt 4",
    "single with a limit": "--hardware 2x24 --strategy single --vram-limit 10GiB --vae-dtype bfloat16",
    "H100, 1080p, 129 frames": "--hardware h100 --resolution 1080p --num-frames 129",
    "8 GiB, 1080p, 129 frames": "--hardware 8 --resolution 1080p --num-frames 129",
    "2 GiB, 129 frames do not fit": "--hardware 2 --num-frames 129",
    "14B on 24 GiB": "--hardware 24 --model random:14b",
    "14B on 4x80 GiB, 720p": "--hardware 4x80,ram=256GiB --model random:14b --resolution 720p",
    "CPU, 81 frames do not fit": "--hardware cpu,ram=12GiB",
    "CPU, 81 frames of 720p do not fit": "--hardware cpu,ram=8GiB --resolution 720p",
}
TEXTS = ("8 GiB", "2x24 GiB", "24 and 12 GiB, 720p", "2x6 GiB, parallel does not fit", "CPU, 5 frames")
SLOW_TEXTS = ("8 GiB, 1080p, 129 frames", "2 GiB, 129 frames do not fit", "14B on 24 GiB")
REFUSED = {
    "frames": "plan --num-frames 80 --hardware 24 --model random:1.3b",
    "height": "plan --height 100 --hardware 24 --model random:1.3b",
    "hardware": "plan --hardware banana --model random:1.3b",
    "device": "plan --devices gpu7 --hardware 24 --model random:1.3b",
    "missing device": "plan --devices cuda:3 --hardware 24 --model random:1.3b",
    "attention": "plan --attention fastest --hardware 24 --model random:1.3b",
    "model": "plan --model random:99b --hardware 24",
    "flag": "plan --no-such-flag",
    "does not fit": f"generate x {MINIATURE} --ram-limit 100MiB",
    "file": "inspect no-such-file.mp4",
}
COMMANDS = (
    "", "batch", "bench", "cluster", "cluster drain", "cluster status", "cluster undrain", "decode", "doctor", "download",
    "encode", "generate", "inspect", "jobs", "jobs adopt", "jobs cancel", "jobs list", "jobs rm", "jobs show", "keys",
    "keys add", "keys list", "keys rm", "plan", "serve", "ui", "verify",
)  # fmt: skip


@contextmanager
def isolated(folder: Path) -> Iterator[None]:
    """An empty current folder, no settings but the defaults, two cores, 100 columns, one thread for each computation."""
    folder = folder.resolve()
    (folder / "work").mkdir(exist_ok=True)
    before, threads = Path.cwd(), torch.get_num_threads()
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    with patch.dict(os.environ), patch("os.cpu_count", return_value=2):
        for name in [name for name in os.environ if name.startswith("WANDUET_")]:
            del os.environ[name]
        os.environ |= {"WANDUET_DATA_DIR": str(folder / "data"), "COLUMNS": "100", "LINES": "40"}
        os.chdir(folder / "work")
        torch.set_num_threads(1)
        try:
            yield
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)
            root.handlers[:] = handlers
            root.setLevel(level)


def command(text: str, *more: str) -> tuple[int, str]:
    """Exit code and stdout of `wanduet TEXT MORE`, run in this process; `_` in a flag's value stands for a space."""
    arguments = [part.replace("_", " ") if part.startswith("--hardware=") else part for part in text.split()]
    out, code = io.StringIO(), 0
    with (
        redirect_stdout(out),
        redirect_stderr(io.StringIO()),
        patch.object(sys, "argv", ["wanduet", *arguments, *more]),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    return code, out.getvalue()


def as_json(text: str, *more: str) -> Json:
    """The JSON object of a command, normalised, with its exit code."""
    code, out = command(text, *more, "--json")
    return {"exit": code, **normalised(json.loads(out))}


def _plan_flags(name: str) -> str:
    flags = (PLANS | SLOW_PLANS)[name]
    flags += "" if "--model" in flags else " --model random:1.3b"
    # The host's memory is this machine's unless it is said.
    return re.sub(r"(--hardware[ =]\S+)", lambda m: m[0] if "ram=" in m[0] else f"{m[0]},ram=32GiB", flags)


def plan(name: str) -> Json:
    """A plan as JSON, without its sentences."""
    return without_sentences(as_json(f"plan {_plan_flags(name)}"))


def plan_text(name: str) -> Json:
    """A plan as people read it."""
    return [line.rstrip() for line in command(f"plan {_plan_flags(name)}")[1].splitlines()]


def refusal(name: str) -> Json:
    """What a command that cannot be done prints as JSON."""
    return as_json(REFUSED[name])


def flags_of(name: str) -> Json:
    """The flags in a command's help."""
    return sorted(set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", command(f"{name} --help")[1])))


def results() -> dict[str, Json]:
    """JSON of the commands that make and read files, one after the other, and the metadata in the files."""
    found: dict[str, Json] = {}
    out = f"{MINIATURE} --codec ffv1 -o a.mkv --save-latents"
    found["generate"] = without_sentences(as_json("generate", PROMPT, *out.split()))
    found["generate two"] = without_sentences(
        as_json("generate", PROMPT, *f"{MINIATURE} -o b.mp4 --num-videos-per-prompt 2 --guidance-scale 1".split())
    )
    found["generate dry run"] = without_sentences(as_json("generate", PROMPT, *f"{MINIATURE} --dry-run".split()))
    found["inspect"] = as_json("inspect a.mkv")
    found["inspect h264"] = as_json("inspect b-2.mp4")
    found["inspect latents"] = as_json("inspect a.mkv.latents.safetensors")
    found["encode"] = as_json("encode", PROMPT, "--model", "miniature", "-o", "text.safetensors")
    found["inspect embeddings"] = as_json("inspect text.safetensors")
    found["decode"] = as_json("decode a.mkv.latents.safetensors --devices cpu --codec ffv1 -o c.mkv")
    found["verify"] = as_json("verify a.mkv --devices cpu")
    Path("lines.txt").write_text("a green square\n# a remark\na blue star\n", encoding="utf-8")
    found["batch"] = as_json(f"batch lines.txt {MINIATURE} -o videos/")
    for name in ("a.mkv", "b-1.mp4", "c.mkv"):
        with av.open(name) as file:
            found[f"tags of {name}"] = normalised(_decoded({k.lower(): v for k, v in file.metadata.items()}))
    with safe_open("a.mkv.latents.safetensors", "pt") as file:
        found["header of latents"] = normalised(_decoded(file.metadata()))
    return found


def bench() -> Json:
    """What `wanduet bench` prints, without its measurements."""
    return as_json("bench", *MINIATURE.split(), "--runs", "1")


def _decoded(tags: Mapping[str, str]) -> Json:
    """Tags, those that are JSON as what they say."""
    found: dict[str, Json] = {}
    for name, text in sorted(tags.items()):
        found[name] = json.loads(text) if text.startswith("{") else text
    return found


# What varies from run to run, or from machine to machine. Of numbers, and of what holds them, only the names are kept.
_LEFT_OUT = {"versions", "versions_then", "versions_now", "created_at", "encoder", "latents_sha256"}
_VARIES = {
    "timings", "first_run", "runs", "seconds_per_step", "decoded_frames_per_second", "peak_memory_bytes", "profile", "num_bytes",
}  # fmt: skip


def normalised(value: Json, name: str = "") -> Json:
    """The same without what varies: times, measured memory, versions, names of this machine, absolute paths."""
    if name in _LEFT_OUT:
        return f"<{name}>"
    if name in _VARIES:
        return _kind(value)
    if isinstance(value, dict):
        if "schema" in value:  # metadata leave out what took no time
            value = {k: v for k, v in value.items() if k != "timings"}
        if "hardware" not in value and "host_limit_bytes" in value:  # a plan for this machine
            value = value | {"host_limit_bytes": "<here>"}
            value["devices"] = [one | {"limit_bytes": "<here>"} for one in value["devices"]]
        if "gpus" in value:
            return "<hardware>"
        return {k: normalised(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [normalised(one) for one in value]
    if isinstance(value, str):
        here = str(Path.cwd())
        return value.replace(here, "<here>").replace("\\", "/") if here in value else value
    return value


def _kind(value: Json) -> Json:
    if isinstance(value, dict):
        return {k: _kind(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_kind(one) for one in value]
    return "<number>" if isinstance(value, int | float) else value


def without_sentences(value: Json) -> Json:
    """A plan's choices as `setting: value`, without why: those are in the texts."""
    if isinstance(value, dict):
        chosen = {c["setting"]: c["value"] for c in value.get("choices", ())}
        return {k: chosen if k == "choices" else without_sentences(v) for k, v in value.items()}
    return value


# Numbers.


def summary(values: torch.Tensor | np.ndarray) -> Json:
    """A tensor's hash, which depends on the kind of CPU, and enough of its values to judge a difference by."""
    tensor = (
        torch.from_numpy(np.ascontiguousarray(values))
        if isinstance(values, np.ndarray)
        else values.detach().contiguous()
    )
    flat = tensor.flatten()
    picked = flat[torch.linspace(0, len(flat) - 1, SAMPLES, dtype=torch.float64).long()]
    wide = flat.double()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest(),
        "mean": float(f"{wide.mean():.9g}"),
        "std": float(f"{wide.std():.9g}"),
        "largest": float(f"{wide.abs().max():.9g}"),
        "sample": picked.tolist() if tensor.dtype == torch.uint8 else [float(f"{x:.9g}") for x in picked.double()],
    }


def frames_of(path: Path) -> np.ndarray:
    """`[t, H, W, 3]` uint8 of a lossless video."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


class Workshop:
    """Engines and pipelines in a folder, each made when a case first needs it, and kept for the cases after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._kept: dict[str, Any] = {}
        self._open = ExitStack()
        self._count = 0

    def __enter__(self) -> "Workshop":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gave at the first call with this name."""
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def engine(self, **settings: Any) -> "wanduet.Engine":
        """With these settings of `EngineConfig`."""
        chosen = {"model": "miniature", "devices": "cpu", "data_dir": self.folder / "data"} | settings
        return self.kept(
            f"engine {settings}", lambda: self._open.enter_context(wanduet.Engine(wanduet.EngineConfig(**chosen)))
        )

    def pipeline(self, **settings: Any) -> "wanduet.WanPipeline":
        """With these keywords of `from_pretrained`."""

        def make() -> "wanduet.WanPipeline":
            chosen = {"devices": "cpu", "data_dir": self.folder / "data"} | settings
            pipe = wanduet.WanPipeline.from_pretrained("miniature", **chosen)
            pipe.set_progress_bar_config(disable=True)
            return pipe

        return self.kept(f"pipeline {settings}", make)

    def path(self) -> Path:
        """A video's path that nothing else has."""
        self._count += 1
        return self.folder / f"{self._count}.mkv"

    def submit(self, engine: "wanduet.Engine", changes: Mapping[str, Any] | None = None, **call: Any) -> "wanduet.Job":
        """A small job, its video lossless and its latents kept."""
        path = call.pop("path", None) or self.path()
        request = wanduet.GenerationRequest(**(SMALL | dict(changes or {})))
        output = wanduet.OutputOptions(path, "ffv1", save_latents=True, resume=call.pop("resume", False))
        return engine.submit(request, output, **call)

    def run(
        self, settings: Mapping[str, Any] | None = None, changes: Mapping[str, Any] | None = None, **call: Any
    ) -> Json:
        """The numbers of a small job."""
        return numbers(self.submit(self.engine(**(settings or {})), changes, **call))


def numbers(job: "wanduet.Job") -> Json:
    """Latents and frames of a job's videos, and what it says of how they were made."""
    result = job.result(240)
    latents = torch.stack([load_file(video.latents_path)["latents"] for video in result.videos])
    frames = np.stack([frames_of(video.path) for video in result.videos])
    return {
        "strategy": job.plan.strategy,
        "seeds": [video.seed for video in result.videos],
        "rungs": job.notes,
        "latents": summary(latents),
        "frames": summary(frames),
    }


def _overlapping(shop: Workshop) -> Json:
    """Three jobs at once on strategy placed: one decodes while the next denoises."""
    engine = shop.engine(devices="vae=cpu,transformer=cpu")
    jobs = [shop.submit(engine, {"seed": seed}) for seed in (5, 6, 7)]
    return [numbers(job) for job in jobs]


def _resumed(
    shop: Workshop, settings: Mapping[str, Any] | None = None, changes: Mapping[str, Any] | None = None
) -> Json:
    """Cancelled after two of five steps, and gone on with by another job, which makes the last three."""
    path, changes = shop.path(), {"num_inference_steps": 5} | dict(changes or {})
    engine = shop.engine(checkpoint_seconds=0.0, **(settings or {}))
    submitted, jobs, steps = threading.Event(), [], []

    def stop(info: Any) -> None:
        if info.step == 1:
            submitted.wait(60)
            jobs[0].cancel()

    jobs.append(shop.submit(engine, changes, path=path, watch=stop))
    submitted.set()
    with suppress(wanduet.WanduetError):
        jobs[0].result(240)
    assert not path.exists()
    again = shop.submit(engine, changes, path=path, resume=True, watch=lambda info: steps.append(info.step))
    return {**numbers(again), "steps": steps}


def _only_decoded(shop: Workshop) -> Json:
    """The video is lost, its latents are not: the second job makes no step."""
    engine, path, steps = shop.engine(), shop.path(), []
    shop.submit(engine, path=path).result(240)
    path.unlink()
    again = shop.submit(engine, path=path, resume=True, watch=lambda info: steps.append(info.step))
    return {**numbers(again), "steps": steps}


def _embeddings(shop: Workshop) -> Json:
    """What `wanduet encode` writes."""
    path = shop.folder / "text.safetensors"
    code, _ = command("encode", PROMPT, "--model", "miniature", "-o", str(path))
    assert code == 0
    return {name: summary(tensor) for name, tensor in sorted(load_file(path).items())}


def _offloaded(num_resident: int) -> Callable[[Workshop], Json]:
    return lambda shop: summary(
        internals.denoise_streamed(shop.kept("transformer", internals.load_transformer), num_resident)
    )


def _in_parts(order: str, strips: int) -> Callable[[Workshop], Json]:
    return lambda shop: summary(internals.decode_in_parts(shop.kept("vae", internals.load_vae), order, strips))


def _called(settings: Mapping[str, Any] | None = None, **call: Any) -> Callable[[Workshop], Json]:
    """A call of `WanPipeline` as a program for diffusers makes it."""

    def run(shop: Workshop) -> Json:
        small = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3, "output_type": "latent"}
        given = {"prompt": PROMPT, "generator": torch.Generator().manual_seed(5)} | small | call
        frames = shop.pipeline(**(settings or {}))(**given).frames
        return summary(frames)

    return run


def _with_scheduler(shop: Workshop) -> Json:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = shop.pipeline()
    before, pipe.scheduler = pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=4.0)
    try:
        return _called()(shop)
    finally:
        pipe.scheduler = before


def _halve(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"latents": tensors["latents"] * 0.5}


def _job(settings: Mapping[str, Any] | None = None, **changes: Any) -> Callable[[Workshop], Json]:
    return lambda shop: shop.run(settings, changes)


TWO = {"strategy": "parallel", "devices": "cpu,cpu", "device_speeds": (1.0, 1.0)}  # a busy machine would measure others
BY_SPEED = {"strategy": "parallel", "devices": "cpu,cpu", "device_speeds": (2.0, 1.0)}
FOUR = {"strategy": "parallel", "devices": "cpu,cpu,cpu,cpu", "device_speeds": (1.0,) * 4}
PLAIN = {"guidance_scale": 1.0}
ONE_STEP = {"num_inference_steps": 1}  # of bfloat16: more steps would make the differences between CPUs larger
SAMPLERS = ("unipc", "unipc-official", "dpm++2m", "euler")

ENGINE: dict[str, Callable[[Workshop], Json]] = {
    **{f"{sampler}, guided": _job(sampler=sampler) for sampler in SAMPLERS},
    **{f"{sampler}, not guided": _job(sampler=sampler, **PLAIN) for sampler in SAMPLERS},
    "negative prompt": _job(negative_prompt="a blue square", guidance_scale=5.0),
    "flow shift": _job(flow_shift=8.0),
    "a still": _job(num_frames=1),
    "two videos": _job(num_videos_per_prompt=2),
    "more steps and frames, upright": _job(height=32, width=16, num_frames=9, num_inference_steps=5),
    "transformer in bfloat16": _job({"transformer_dtype": "bfloat16"}, **ONE_STEP),
    "transformer in bfloat16, not guided": _job({"transformer_dtype": "bfloat16"}, **ONE_STEP, **PLAIN),
    "VAE in bfloat16": _job({"vae_dtype": "bfloat16"}, height=16, width=32),
    "text encoder in bfloat16": _job({"text_encoder_dtype": "bfloat16", "cache_embeddings": False}),
    "text encoder layer by layer": _job({"text_encoder_hold": "streamed", "cache_embeddings": False}),
    "a callback": lambda shop: shop.run(on_step=lambda info: info.latents * 0.9),
    "placed, three jobs at once": _overlapping,
    "resumed": _resumed,
    "resumed, dpm++2m": lambda shop: _resumed(shop, changes={"sampler": "dpm++2m"}),
    "resumed with latents": _only_decoded,
    "embeddings": _embeddings,
    **{f"{blocks} of 6 blocks resident": _offloaded(blocks) for blocks in (6, 2, 0)},
    **{f"decoded frame by frame, {strips} strips": _in_parts("frame", strips) for strips in (1, 2, 4)},
    **{f"decoded strip by strip, {strips} strips": _in_parts("strip", strips) for strips in (2, 3, 6)},
}
PIPELINE: dict[str, Callable[[Workshop], Json]] = {
    "latents": _called(),
    "latents, not guided": _called(guidance_scale=1.0),
    "negative prompt": _called(negative_prompt="a blue square"),
    "two prompts, two videos": _called(prompt=["a red circle", "a blue star"], num_videos_per_prompt=2),
    "own embeddings": _called(
        prompt=None, prompt_embeds=torch.ones(1, 8, 128), negative_prompt_embeds=torch.zeros(1, 8, 128)
    ),
    "own latents": _called(latents=torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(9))),
    "a callback": _called(callback_on_step_end=_halve),
    "another scheduler": _with_scheduler,
    "frames": _called(output_type="np"),
    "bfloat16": _called({"torch_dtype": torch.bfloat16}, num_inference_steps=1),
}
RANKS: dict[str, Callable[[Workshop], Json]] = {
    "two, guided": _job(TWO),
    "two, not guided: one sequence": _job(TWO, **PLAIN),
    "two, two videos": _job(TWO, num_videos_per_prompt=2, num_frames=9),
    "two, in bfloat16": _job(TWO | {"transformer_dtype": "bfloat16"}, **ONE_STEP),
    "two, resumed": lambda shop: _resumed(shop, TWO),
    "two of unlike speed": _job(BY_SPEED),
    "two of unlike speed, not guided": _job(BY_SPEED, **PLAIN),
    "four": _job(FOUR, height=64),
    "four, not guided": _job(FOUR, height=64, **PLAIN),
}
