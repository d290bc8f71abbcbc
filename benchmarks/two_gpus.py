"""Two GPUs against one of them, in one run: 1.3B in its true shapes, random weights, through the engine itself.

    PYTHONPATH=src python benchmarks/two_gpus.py [--sizes 480p,720p] [--steps 8] [section ...]

Sections: guided unguided unequal whole batch latents exchanges diffusers (default: all). Each measures strategy
`parallel` or `placed` beside `single` on the first device; `ratio` is seconds on one device / seconds on both.
`exchanges` looks at the parts without an engine around them: one forward, by what is exchanged and how, and one decode,
with rows handed on or halos. `unequal` keeps the second device busy with something else, as if it were a slower one.
With `--without-peer-access` the driver seems to deny GPUs each other's memory, and NCCL copies through the host's.
TINY=1 runs every section on two CPU ranks with the miniature.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from _common import GIB, TINY, Report, clear_memory, random_vae, relative_error, synchronize
from whole_job import diffusers_denoise, diffusers_models

from wanduet.accelerate.packing import allocate_packed
from wanduet.config import EngineConfig
from wanduet.distributed.launch import run_on_ranks
from wanduet.distributed.mesh import Layout
from wanduet.distributed.rank import Rank
from wanduet.distributed.sequence.cfg import CfgSharding
from wanduet.distributed.sequence.hybrid import SequenceSharding
from wanduet.distributed.sequence.sharding import NoSharding, Sharding
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.engine.rank_decode import decode_share
from wanduet.engine.trace import overlap
from wanduet.family.spec import ModelSpec
from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.attention.choose import Shape, choose_attention
from wanduet.kernels.select import kernels_for
from wanduet.media.latents import load_latents
from wanduet.models.dit.block import Runtime
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.rows import Rows, split_rows
from wanduet.models.vae.stream import DecodePart, decode_stream
from wanduet.request import GenerationRequest
from wanduet.runtime.models import Models
from wanduet.runtime.peaks import look

SIZES = {"480p": (480, 832, 81), "720p": (720, 1280, 81)}
MODEL, DEVICES = "random:1.3b", ("cuda:0", "cuda:1")
if TINY:
    SIZES, MODEL, DEVICES = {"480p": (96, 96, 9)}, "miniature", ("cpu", "cpu")
PROMPT = "a red circle moving left on a black background"
RUNS, LOADING_STEPS = 3, 2  # the first run loads models, has so many steps, and is not counted


class Bench:
    """What the sections share: options, and a folder for what they write."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder

    @contextmanager
    def engine(self, strategy: str, **settings: Any) -> Iterator[Engine]:
        """An engine of a strategy; `single` on the first device, or that of `settings`."""
        devices = DEVICES[:1] if strategy == "single" else DEVICES
        if strategy == "placed" and TINY:
            settings["devices"] = "vae=cpu,transformer=cpu"
        settings = {"devices": ",".join(devices), "strategy": strategy, "data_dir": self.folder} | settings
        with Engine(EngineConfig(model=MODEL, cache_embeddings=False, checkpoint_seconds=1e9, **settings)) as engine:
            yield engine

    def request(self, size: str, guidance: float, seed: int = 1, steps: int | None = None) -> GenerationRequest:
        """A job of a size."""
        height, width, frames = SIZES[size]
        return GenerationRequest(
            prompt=PROMPT, height=height, width=width, num_frames=frames, seed=seed, guidance_scale=guidance,
            num_inference_steps=steps or self.options.steps,
        )  # fmt: skip

    def run(
        self, engine: Engine, request: GenerationRequest, name: str, runs: int = RUNS
    ) -> tuple[Job, dict[str, float]]:
        """The last of `runs` jobs, and the median of each timing; if there are several, without the first."""
        requests = [request] * runs
        if runs > 1:
            requests[0] = request.model_copy(update={"num_inference_steps": LOADING_STEPS})
        timings = []
        for one in requests:
            job = engine.submit(one, OutputOptions(self.folder / f"{name}.mp4", save_latents=True))
            timings.append(job.result().timings)
        counted = timings[1:] or timings
        return job, {key: statistics.median(t[key] for t in counted) for key in counted[0]}


def both(bench: Bench, report: Report, section: str, guidance: float, sizes: Sequence[str], **settings: Any) -> None:
    """Denoise and decode of one job on each device, and on both: cards of a kind differ by some percent."""
    for size in sizes:
        request, seconds = bench.request(size, guidance), []
        for strategy, devices in (*(("single", device) for device in DEVICES), ("parallel", ",".join(DEVICES))):
            with bench.engine(strategy, devices=devices, **settings) as engine:
                job, timings = bench.run(engine, request, f"{section}-{size}-{strategy}")
                forwards = bench.options.steps * (2 if guidance > 1 else 1)
                layout = next((c.value for c in job.plan.choices if c.setting == "layout"), None)
                seconds.append(timings)
                report.add(
                    section, size=size, strategy=strategy, devices=devices, layout=layout, attention=job.attention,
                    denoise_s=round(timings["denoise_s"], 3), step_s=round(timings["denoise_s"] / bench.options.steps, 4),
                    forward_s=round(timings["denoise_s"] / forwards, 4), decode_s=round(timings["decode_s"], 3),
                    rungs=job.notes,
                )  # fmt: skip
        *alone, shared = seconds
        ratios = {
            f"{phase}_against_{name}": round(which(t[f"{phase}_s"] for t in alone) / shared[f"{phase}_s"], 3)
            for phase in ("denoise", "decode")
            for name, which in (("faster", min), ("slower", max))
        }
        report.add(f"{section} ratio", size=size, **ratios)


def guided(bench: Bench, report: Report) -> None:
    """A branch of the guidance on each device."""
    both(bench, report, "guided", 6.0, bench.options.sizes[:1])


def unguided(bench: Bench, report: Report) -> None:
    """One sequence over both devices, heads exchanged."""
    both(bench, report, "unguided", 1.0, bench.options.sizes)


def unequal(bench: Bench, report: Report) -> None:
    """Jobs on two devices of which another process uses the second: with parts alike, and by the speeds as measured."""
    size = bench.options.sizes[0]
    for guidance, (way, speeds) in product((6.0, 1.0), (("parts alike", (1.0, 1.0)), ("by measured speed", None))):
        with rival(DEVICES[1]), bench.engine("parallel", speeds=speeds) as engine:
            job, timings = bench.run(engine, bench.request(size, guidance), "unequal")
        report.add("unequal", size=size, guidance=guidance, way=way, rungs=job.notes,
                   step_s=round(timings["denoise_s"] / bench.options.steps, 4), decode_s=round(timings["decode_s"], 3))  # fmt: skip


@contextmanager
def rival(device: str) -> Iterator[None]:
    """Another process that computes on a device without a pause."""
    context = get_context("spawn")
    started = context.Event()
    process = context.Process(target=keep_busy, args=(device, started), daemon=True)
    process.start()
    try:
        started.wait()
        yield
    finally:
        process.kill()
        process.join()


def keep_busy(device: str, started: Event) -> None:
    """What the other process does, until it is ended."""
    torch.set_num_threads(1)
    side = 4096 if device.startswith("cuda") else 512
    a = torch.randn(side, side, device=device)
    while True:
        a @ a
        synchronize(torch.device(device))
        started.set()


def whole(bench: Bench, report: Report) -> None:
    """A guided job of 50 steps on both devices, prompt to MP4; there is no text encoder with random weights."""
    size, steps = bench.options.sizes[0], 2 if TINY else 50
    with bench.engine("parallel") as engine:
        bench.run(engine, bench.request(size, 6.0, steps=2), "warm", runs=1)
        job, timings = bench.run(engine, bench.request(size, 6.0, steps=steps), "whole", runs=1)
    report.add("whole", size=size, steps=steps, attention=job.attention, rungs=job.notes,
               **{key: round(value, 3) for key, value in timings.items()})  # fmt: skip


def batch(bench: Bench, report: Report) -> None:
    """Eight short jobs, `placed`: what the whole batch takes beyond its denoises, first encode and last decode."""
    size = bench.options.sizes[0]
    with bench.engine("placed") as engine:
        bench.run(engine, bench.request(size, 6.0, steps=2), "warm", runs=1)
        began, first = time.perf_counter(), len(engine.trace.spans)
        requests = [bench.request(size, 6.0, seed) for seed in range(8)]
        jobs = [engine.submit(r, OutputOptions(bench.folder / f"batch-{r.seed}.mp4")) for r in requests]
        for job in jobs:
            job.result()
        total, spans = time.perf_counter() - began, engine.trace.spans[first:]
        peaks = {k: round(v / GIB, 3) for k, v in look().items()}
    seconds = {stage: [s.end - s.begin for s in spans if s.stage == stage] for stage in ("encode", "denoise", "decode")}
    denoise = sum(seconds["denoise"])
    beyond = total - denoise - seconds["encode"][0] - seconds["decode"][-1]
    report.add(
        "batch", size=size, jobs=len(jobs), total_s=round(total, 3), denoise_s=round(denoise, 3),
        first_encode_s=round(seconds["encode"][0], 3), last_decode_s=round(seconds["decode"][-1], 3),
        decode_beside_denoise_s=round(overlap(spans, "decode", "denoise"), 3), overhead_percent=round(100 * beyond / denoise, 2),
    )  # fmt: skip
    report.add("batch memory", size=size, peak_gib=peaks)


def latents(bench: Bench, report: Report) -> None:
    """How far the latents of each strategy are from those of one device, same seed."""
    size, steps = bench.options.sizes[0], min(bench.options.steps, 8)
    for guidance in (6.0, 1.0):
        expected = None
        for strategy in ("single", "placed", "parallel"):
            with bench.engine(strategy) as engine:
                request = bench.request(size, guidance, steps=steps)
                job, _ = bench.run(engine, request, f"latents-{guidance}-{strategy}", runs=1)
                found, _ = load_latents(job.latents_path(0))
            expected = found if expected is None else expected
            report.add(
                "latents", size=size, steps=steps, guidance=guidance, strategy=strategy,
                bit_equal=torch.equal(found, expected), relative_difference=relative_error(found, expected),
            )  # fmt: skip


@torch.no_grad()
def diffusers(bench: Bench, report: Report) -> None:
    """diffusers' ways on the same machine: its models on a GPU each, one step after another; its Ulysses."""
    layers = 1 if TINY else 30
    for size in bench.options.sizes:
        transformer, _ = diffusers_models(torch.device(DEVICES[1]), layers)
        seconds = diffusers_denoise(transformer, SIZES[size], 3) / 3
        report.add("diffusers", way="VAE and transformer on a GPU each", size=size, step_s=round(seconds, 4))
        del transformer
        clear_memory()
    if TINY:  # diffusers' parallel code wants accelerators
        return
    sizes = {size: SIZES[size] for size in bench.options.sizes}
    for row in run_on_ranks(shared_forward, DEVICES, sizes, layers)[0]:
        report.add("diffusers", way="Ulysses", **row)


@torch.no_grad()
def shared_forward(rank: Rank, sizes: dict[str, tuple[int, int, int]], layers: int) -> list[dict[str, Any]]:
    """On every rank: seconds of one forward of diffusers' transformer over all of them."""
    from diffusers import ContextParallelConfig

    transformer, _ = diffusers_models(rank.device, layers)
    if rank.device.type == "cuda":
        transformer.set_attention_backend("_native_cudnn")
    transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=len(DEVICES)))
    rows = []
    for name, size in sizes.items():
        latents = torch.randn(1, *WAN_1_3B.latent_shape(*size), device=rank.device, dtype=torch.bfloat16)
        text = torch.randn(1, 512, 4096, device=rank.device, dtype=torch.bfloat16)
        step = torch.full((1,), 500, device=rank.device)
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            transformer(latents, step, text, return_dict=False)
            synchronize(rank.device)
            seconds.append(time.perf_counter() - began)
        rows.append({"size": name, "forward_s": round(statistics.median(seconds[1:]), 4)})
    return rows


def exchanges(bench: Bench, report: Report) -> None:
    """One forward and one decode, alone and shared, in the ranks themselves."""
    sizes = {size: SIZES[size] for size in bench.options.sizes}
    for section, row in run_on_ranks(parts_on_rank, DEVICES, sizes)[0]:
        report.add(section, **row)


@torch.no_grad()
def parts_on_rank(rank: Rank, sizes: dict[str, tuple[int, int, int]]) -> list[tuple[str, dict[str, Any]]]:
    """Rows of `exchanges`. A part alone runs on both ranks at once, each for itself."""
    torch.backends.cudnn.allow_tf32 = True
    spec = Models(EngineConfig(model=MODEL, devices=str(rank.device))).spec
    rows = [("exchanges: forward", row) for row in forwards(rank, spec, sizes)]
    clear_memory()
    return rows + [("exchanges: decode", row) for row in decodes(rank, spec, sizes)]


def forwards(rank: Rank, spec: ModelSpec, sizes: dict[str, tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    """One forward: alone, with the first self-attention shared by ranks of other prompts, and with heads exchanged in
    groups."""
    t, model = spec.transformer, random_transformer(spec, rank.device)
    sequence, prompts = rank.mesh(Layout(ulysses=rank.world_size)), rank.mesh(Layout(cfg=rank.world_size))
    ways: dict[str, Sharding] = {"alone": NoSharding(), "first attention shared": CfgSharding.from_group(prompts.cfg)}
    collectives = dataclasses.replace(sequence, peer_memory=None)
    for groups in (1, 2, 3):
        if t.num_attention_heads // rank.world_size % groups == 0:
            ways[f"heads by collectives, in {groups} groups"] = SequenceSharding(collectives, head_groups=groups)
    if sequence.peer_memory is not None:
        layout = Layout(ulysses=rank.world_size)
        ways["heads by copies"] = SequenceSharding(rank.mesh(layout), always_ulysses=True)
        ways["by copies, as the engine does"] = SequenceSharding(sequence)
    text = torch.ones(1, 80, t.text_dim, device=rank.device)
    step = torch.full((1,), 500.0, device=rank.device)
    for name, size in sizes.items():
        latents = torch.randn(1, *spec.latent_shape(*size), device=rank.device)
        tokens = spec.num_tokens(*size)
        shape = Shape(tokens, tokens, t.num_attention_heads, t.attention_head_dim)
        attention = choose_attention(rank.device, shape, torch.bfloat16, cache_folder=Path(tempfile.gettempdir()))
        plain = Runtime(kernels_for(rank.device, torch.bfloat16), attention.fn)
        alone = None
        for way, sharding in ways.items():
            model.runtime = dataclasses.replace(plain, sharding=sharding)
            context, rope = model.prepare_text(text), model.prepare_rope(latents.shape, rank.device)
            # So long that the power limit holds for all of them.
            seconds = together(rank, partial(model, latents, step, context, rope), 12 if tokens < 2**15 else 4)
            alone = alone or seconds
            row = {"size": name, "way": way, "seconds": seconds, "ratio": round(alone / seconds, 3)}
            yield row | by_rank(rank, partial(model, latents, step, context, rope))


def decodes(rank: Rank, spec: ModelSpec, sizes: dict[str, tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    """One decode: alone, in halves with halos, and with rows handed on."""
    for dtype, (name, size) in product((torch.float32, torch.bfloat16), sizes.items()):
        vae, z = random_vae(spec.vae, dtype, rank.device), torch.randn(spec.latent_shape(*size))
        torch.distributed.broadcast(z, src=0)
        ways: dict[str, Callable[[], Iterator[Any]]] = {
            "alone": partial(decode_stream, vae, z),
            "halos": partial(decode_stream, vae, z, part=DecodePart(half(rank, size[0]))),
            "rows handed on": partial(decode_share, rank, vae, z, (1.0,) * rank.world_size),
        }
        alone = None
        for way, frames in ways.items():
            seconds = together(rank, lambda frames=frames: [None for _ in frames()])
            alone = alone or seconds
            kind = str(dtype).removeprefix("torch.")
            row = {"size": name, "dtype": kind, "way": way, "seconds": seconds, "ratio": round(alone / seconds, 3)}
            yield row | by_rank(rank, lambda frames=frames: [None for _ in frames()])


# What a kernel does, by a part of its name in small letters; the first that fits.
KINDS = (("nccl", "exchanging"), ("mem", "copying"), ("wait", "waiting"), ("flash", "attention"), ("attn", "attention"),
         ("attention", "attention"), ("conv", "convolution"), ("gemm", "products"), ("nvjet", "products"))  # fmt: skip


def by_rank(rank: Rank, work: Callable[[], object]) -> dict[str, Any]:
    """Milliseconds of each rank's GPU by what it does in `work`; of rank 0 also its longest kernels, and the host's part.

    `launching` is how long the host takes until everything is queued: as long as the whole where the host is too slow.
    """
    if rank.device.type != "cuda":
        return {}
    torch.distributed.barrier()
    synchronize(rank.device)
    began = time.perf_counter()
    work()
    launching = time.perf_counter() - began
    synchronize(rank.device)
    torch.distributed.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        synchronize(rank.device)
    busy: dict[str, float] = {}
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events:
        kind = next((kind for part, kind in KINDS if part in event.key.lower()), "other")
        busy[kind] = busy.get(kind, 0.0) + event.self_device_time_total / 1e3
    mine = {kind: round(value, 2) for kind, value in busy.items() if value} | {"launching": round(launching * 1e3, 2)}
    ranks: list[Any] = [None] * rank.world_size
    torch.distributed.all_gather_object(ranks, mine)
    longest = {event.key[:60]: [event.count, round(event.self_device_time_total / 1e3, 2)] for event in events[:14]}
    return {"milliseconds_by_rank": ranks, "longest_kernels": longest}


def half(rank: Rank, height: int) -> Rows:
    """This rank's equal part of a frame's rows."""
    return split_rows(Rows.whole(height), [1.0] * rank.world_size)[rank.index]


def together(rank: Rank, work: Callable[[], object], runs: int = 3) -> float:
    """Median seconds until the last rank has done its work, after one run that is not counted."""
    seconds = []
    for _ in range(runs + 1):
        torch.distributed.barrier()
        synchronize(rank.device)
        began = time.perf_counter()
        work()
        synchronize(rank.device)
        torch.distributed.barrier()
        synchronize(rank.device)
        seconds.append(time.perf_counter() - began)
    return round(statistics.median(seconds[1:]), 4)


def random_transformer(spec: ModelSpec, device: torch.device) -> WanTransformer:
    """In bfloat16, its weights in one buffer a block."""
    with torch.device("meta"):
        model = WanTransformer(spec.transformer).eval().requires_grad_(False)
    allocate_packed(model, device, torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    return model


SECTIONS = {
    "guided": guided, "unguided": unguided, "unequal": unequal, "whole": whole, "batch": batch, "latents": latents, "exchanges": exchanges,
    "diffusers": diffusers,
}  # fmt: skip


def deny_peer_access(folder: Path) -> None:
    """Let the driver say, to this process and to those that it starts, that GPUs cannot reach each other's memory."""
    # Every interpreter imports this file at its start.
    (folder / "sitecustomize.py").write_text("import torch\ntorch.cuda.can_device_access_peer = lambda *_: False\n")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    torch.cuda.can_device_access_peer = lambda *_: False


def main() -> None:
    global DEVICES
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2 if TINY else 8)
    parser.add_argument("--sizes", type=lambda text: text.split(","), default=list(SIZES))
    parser.add_argument("--devices", type=lambda text: tuple(text.split(",")), default=DEVICES)
    parser.add_argument("--without-peer-access", action="store_true", help="as where a driver denies it")
    parser.add_argument("sections", nargs="*", default=[], choices=(*SECTIONS, []))
    options = parser.parse_args()
    DEVICES = options.devices
    if not TINY and torch.cuda.device_count() < len(DEVICES):
        print(f"# nothing is measured: this machine has {torch.cuda.device_count()} GPUs (TINY=1 tries it on the CPU)")
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("WANDUET_DATA_DIR", folder)
        bench = Bench(options, Path(folder))
        if options.without_peer_access:
            deny_peer_access(Path(folder))
        count = {2: "two", 4: "four", 8: "eight"}.get(len(DEVICES), str(len(DEVICES)))
        report = Report(f"{count}_gpus" + "_without_peer_access" * options.without_peer_access)
        chosen = options.sections or list(SECTIONS)
        report.run({name: lambda r, f=SECTIONS[name]: f(bench, r) for name in SECTIONS}, chosen)
    report.print()


if __name__ == "__main__":
    main()
