"""Self-attention with 8-bit scores by tile, beside the exact kernels: speed, and the error against float64.

    PYTHONPATH=src python benchmarks/attention_8bit.py [section ...]

Sections: tiles others peaky long lists steps. 12 heads of 128 channels, q, k and v as slices of one buffer, at the token
counts of 480p and 720p. Times are of a whole call, codes included. `error`: of 512 queries spread over the sequence,
relative. Tiles are queries x keys / warps / stages, and the limit of registers if there is one. In `peaky`, tokens are
like their neighbours, channels differ in size, a channel of the keys is far from zero, and scores are large.
sageattention (1.0.6 changes the caller's keys, so it gets a copy) is compared if it can be imported.

Tiles are compiled in processes side by side first; `COMPILERS=0` compiles them where they are measured.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

from _common import DEVICE, ON_GPU, TINY, Report, clear_memory, timed  # isort: skip

if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from torch import Tensor

from wanduet.kernels.attention import int8
from wanduet.kernels.attention.backends import available_backends
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.attention.int8 import Blocks, Tile
from wanduet.kernels.attention.int8_codes import encode

HEADS, HEAD_DIM, QUERIES = 12, 128, 512
TOKENS, LONG = 32_760, 75_600
CHANNELS = (64, 128)
TILES: tuple[Tile, ...] = (
    Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 128, 8, 2), Tile(128, 32, 8, 4, 128), Tile(64, 64, 4, 3),
)  # fmt: skip
DTYPE = torch.bfloat16
COMPILERS = int(os.environ.get("COMPILERS", "10"))
if TINY:
    HEADS, HEAD_DIM, QUERIES, TOKENS, LONG, CHANNELS, TILES = 1, 64, 16, 70, 90, (32, 64), (Tile(32, 32, 4, 2),)
    DTYPE = torch.float16

QKV = tuple[Tensor, Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@lru_cache(maxsize=1)
def inputs(tokens: int, kind: str = "random") -> QKV:
    """q, k and v `[1, L, H, D]` of one buffer."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, generator=generator)

    qkv = draw(1, tokens, 3, HEADS, HEAD_DIM)
    if kind == "peaky":
        alike = draw(1, -(-tokens // 16), 1, HEADS, HEAD_DIM).repeat_interleave(16, 1)[:, :tokens]
        sizes = torch.exp(0.7 * draw(HEADS, HEAD_DIM))
        qkv[:, :, :2] = 0.7 * (alike + 0.5 * qkv[:, :, :2]) * sizes
        qkv[:, :, 1] += 3 * draw(HEADS, HEAD_DIM)
        qkv[:, :, 1, :, 7] += 20
    return tuple(qkv.to(DTYPE).unbind(2))  # type: ignore[return-value]


@lru_cache(maxsize=1)
def expected(tokens: int, kind: str) -> Tensor:
    """Attention of some queries in float64, a head at a time."""
    q, k, v = inputs(tokens, kind)
    heads = []
    for head in range(HEADS):
        queries, keys, values = (x[0, :, head].double() for x in (q[:, rows(tokens)], k, v))
        heads.append((queries @ keys.T * HEAD_DIM**-0.5).softmax(-1) @ values)
    return torch.stack(heads, 1)[None]


def rows(tokens: int) -> slice:
    """The queries that are compared."""
    return slice(None, None, max(1, tokens // QUERIES))


def error(out: Tensor, tokens: int, kind: str) -> float:
    """Relative error of the compared queries."""
    reference = expected(tokens, kind)
    return float((out[:, rows(tokens)].double() - reference).norm() / reference.norm())


def name_of(tile: Tile) -> str:
    limit = f" {tile.registers} registers" if tile.registers else ""
    return f"{tile.queries}x{tile.keys}/{tile.warps}/{tile.stages}{limit}"


def eight_bits(channels: int, tile: Tile | None = None) -> Attend:
    """Our kernel."""
    return lambda q, k, v: int8.attend(q, k, v, channels, tile=tile)[0]


def row(
    report: Report, section: str, attend: Attend, tokens: int, kind: str, qkv: QKV | None = None, **about: Any
) -> None:
    """Add the speed and the error of one kernel, or why there are none."""
    try:
        q, k, v = qkv or inputs(tokens, kind)
        found = error(attend(q, k, v), tokens, kind)
        seconds = timed(partial(attend, q, k, v), runs=7, warmup=2)
    except Exception as problem:
        if TINY:
            raise
        report.add(section, **about, tokens=tokens, inputs=kind, problem=f"{type(problem).__name__}: {problem}"[:200])
        return
    rate = 4 * tokens**2 * HEADS * HEAD_DIM / seconds / 1e12
    report.add(
        section, **about, tokens=tokens, inputs=kind, ms=round(seconds * 1e3, 3), tflops=round(rate, 1), error=found
    )


def tiles(report: Report) -> None:
    """Every tile; float16, which cannot subtract one tile's largest score only, with the best one."""
    for channels in CHANNELS:
        for tile in TILES:
            row(report, "tiles", eight_bits(channels, tile), TOKENS, "random", channels=channels, tile=name_of(tile))
        half: QKV = tuple(x.half() for x in inputs(TOKENS))  # type: ignore[assignment]
        best = best_tile(report, channels)
        about = {"channels": channels, "tile": f"{name_of(best)} float16"}
        row(report, "tiles", eight_bits(channels, best), TOKENS, "random", half, **about)


def best_tile(report: Report, channels: int) -> Tile:
    """The fastest one so far; the first if none was timed."""
    found = {r["tile"]: r["ms"] for r in report.sections.get("tiles", []) if r["channels"] == channels and "ms" in r}
    return min(TILES, key=lambda tile: found.get(name_of(tile), float("inf")))


def compared(report: Report, section: str, tokens: int, kind: str) -> None:
    """Ours with their best tiles, and all others that are here."""
    for channels in CHANNELS:
        best = best_tile(report, channels)
        about = {"kernel": f"ours, {channels} of {HEAD_DIM} channels in 8 bits", "tile": name_of(best)}
        row(report, section, eight_bits(channels, best), tokens, kind, **about)
    call = AttentionCall((1, 1, tokens))
    for backend in available_backends(DEVICE).values():
        if backend.exact and backend.name not in ("sdpa", "sdpa_efficient"):
            row(report, section, lambda q, k, v, b=backend: b.attend(q, k, v, call), tokens, kind, kernel=backend.name)
    if ON_GPU:
        row(report, section, sage, tokens, kind, kernel="sageattention, a copy of k included")


def sage(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from sageattention import sageattn

    out: Tensor = sageattn(q, k.clone(), v, tensor_layout="NHD")
    return out


def others(report: Report) -> None:
    compared(report, "others", TOKENS, "random")
    with suppressed(report, "sageattention"):  # without the copy
        from sageattention import sageattn

        q, k, v = (x.clone() for x in inputs(TOKENS))
        seconds = timed(lambda: sageattn(q, k, v, tensor_layout="NHD"), runs=7, warmup=2)
        rate = 4 * TOKENS**2 * HEADS * HEAD_DIM / seconds / 1e12
        report.add(
            "others", kernel="sageattention alone", tokens=TOKENS, ms=round(seconds * 1e3, 3), tflops=round(rate, 1)
        )


def lists(report: Report) -> None:
    """Random lists of blocks, beside all keys."""
    q, k, v = inputs(TOKENS)
    tile = best_tile(report, CHANNELS[0])
    queries, keys = tile.queries, max(64, tile.keys)
    shape = (1, HEADS, -(-TOKENS // queries), -(-TOKENS // keys))
    whole = timed(partial(eight_bits(CHANNELS[0], tile), q, k, v))
    index = torch.rand(shape, device=DEVICE).argsort(-1).int()
    for share in (1.0, 0.5, 0.2, 0.1):
        count = torch.full(shape[:3], max(1, round(share * shape[3])), dtype=torch.int32, device=DEVICE)
        with suppressed(report, f"share {share}"):
            blocks = Blocks(count, index, queries, keys)
            seconds = timed(lambda b=blocks: int8.attend(q, k, v, CHANNELS[0], b, tile))
            report.add("lists", share=share, ms=round(seconds * 1e3, 3), times_faster=round(whole / seconds, 2))


def steps(report: Report) -> None:
    """How long the codes take."""
    for tokens in (TOKENS, LONG):
        q, k, _ = inputs(tokens)
        for channels in CHANNELS:
            seconds = timed(lambda q=q, k=k, c=channels: encode(q, k, c), runs=7, warmup=2)
            report.add("steps", tokens=tokens, channels=channels, codes_ms=round(seconds * 1e3, 4))


@contextmanager
def suppressed(report: Report, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as problem:
        if ON_GPU:
            report.add("failed", what=what, problem=f"{type(problem).__name__}: {problem}"[:200])


def compile_tiles(part: int, parts: int) -> None:
    """Compile every `parts`-th form, on short inputs: the kernels are those of long ones."""
    q, k, v = inputs(512)
    for channels, tile in [(c, t) for c in CHANNELS for t in TILES][part::parts]:
        try:
            int8.attend(q, k, v, channels, tile=tile)
        except Exception as problem:
            print(f"# {channels} {name_of(tile)}: {type(problem).__name__}: {problem}"[:200], flush=True)


def compile_side_by_side() -> None:
    start = time.perf_counter()
    command = [sys.executable, __file__, "--compile"]
    running = [subprocess.Popen([*command, str(i)]) for i in range(COMPILERS)]
    for process in running:
        process.wait()
    print(f"# compiled: {time.perf_counter() - start:.1f} s", flush=True)


SECTIONS: dict[str, Callable[[Report], None]] = {
    "tiles": tiles,
    "others": others,
    "peaky": lambda report: compared(report, "peaky", TOKENS, "peaky"),
    "long": lambda report: compared(report, "long", LONG, "random"),
    "lists": lists,
    "steps": steps,
}


@torch.no_grad()
def main() -> None:
    if sys.argv[1:2] == ["--compile"]:
        compile_tiles(int(sys.argv[2]), COMPILERS)
        return
    report = Report("attention_8bit")
    if ON_GPU and COMPILERS:
        compile_side_by_side()
        clear_memory()
    report.run(SECTIONS, sys.argv[1:] or list(SECTIONS))
    report.print()


if __name__ == "__main__":
    main()
