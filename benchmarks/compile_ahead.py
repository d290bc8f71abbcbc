"""Compile, without a GPU, every Triton kernel that a decode and a forward ask for, as for one kind of card.

    PYTHONPATH=src python benchmarks/compile_ahead.py --capability 86 [--dtype bfloat16] [--brief] [--json]

The product's own code asks for them: a decode and a forward run on the meta device, which computes nothing, while Triton
takes the card from here (`CARDS`). A row for each kernel and form: bytes of shared memory beside the card's limit,
registers, and bytes of the stack, where values lie that found no register. Ends with 1 if a kernel does not compile or
does not fit.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from wanduet.kernels import device as devices

# Of a capability: bytes of shared memory that a program may have (CUDA C Programming Guide, table of technical
# specifications, less 1 KiB that the system keeps), and the multiprocessors of one of its cards.
CARDS = {80: (166_912, 108), 86: (101_376, 82), 89: (101_376, 128), 90: (232_448, 132), 120: (101_376, 170)}
# 480p, 720p, 1080p, and one whose latent pixels are no multiple of 16.
SIZES = ((480, 832), (720, 1280), (1088, 1920), (464, 848))
KEYS = (3, 40, 100, 127, 128, 129, 200, 512)  # of a text
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GPU = torch.device("cuda", 0)
META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel in one form."""

    kernel: str
    case: str
    dtype: str
    form: str
    warps: int
    stages: int
    shared: int | None = None
    limit: int = 0
    registers: int | None = None
    stack: int | None = None
    problem: str | None = None

    @property
    def fits(self) -> bool:
        """Whether the card can run it."""
        return self.problem is None and self.shared is not None and self.shared <= self.limit


class Utils:
    """What Triton's driver says of the card."""

    def __init__(self, shared: int) -> None:
        self._shared = shared

    def get_device_properties(self, index: int) -> dict[str, int]:
        """As Triton's own."""
        return {"max_shared_mem": self._shared, "max_num_regs": 65536, "warpSize": 32}


class Driver:
    """A card that is not there: kernels are compiled for it, and none is launched."""

    def __init__(self, capability: int) -> None:
        self.utils = Utils(CARDS[capability][0])
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        """An index, one for each capability: Triton keeps what it compiled by it."""
        return int(self._target.arch)

    def get_current_stream(self, device: int) -> int:
        """Any."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What is compiled for."""
        return self._target


class Recorder:
    """Compiles what is launched instead of running it, and keeps a row of each new kernel."""

    def __init__(self, capability: int, dtype: str) -> None:
        self.rows: list[Row] = []
        self.case = ""
        self._limit, self._dtype = CARDS[capability][0], dtype
        self._seen: set[int] = set()
        self._run = JITFunction.run

    def __enter__(self) -> "Recorder":
        run, recorder = self._run, self

        def compile_only(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            try:
                kernel = run(function, *args, grid=grid, warmup=True, **options)
            except Exception as problem:  # a compiler's failure can be anything
                recorder.fail(function, options, problem)
                return None
            recorder.note(function, options, kernel)
            return kernel

        JITFunction.run = compile_only
        return self

    def __exit__(self, *error: object) -> None:
        JITFunction.run = self._run

    def note(self, function: Any, options: dict[str, Any], kernel: Any) -> None:
        """One that was compiled; the same one again is the same object."""
        if id(kernel) in self._seen:
            return
        self._seen.add(id(kernel))
        registers, stack = resources(kernel.asm["cubin"])
        self._add(function, options, shared=kernel.metadata.shared, registers=registers, stack=stack,
                  warps=kernel.metadata.num_warps, stages=kernel.metadata.num_stages)  # fmt: skip

    def fail(self, function: Any, options: dict[str, Any], problem: Exception) -> None:
        """One that was not."""
        self._add(function, options, problem=f"{type(problem).__name__}: {problem}"[:300],
                  warps=options.get("num_warps", 4), stages=options.get("num_stages", 3))  # fmt: skip

    def _add(self, function: Any, options: dict[str, Any], **found: Any) -> None:
        form = " ".join(f"{k}={v}" for k, v in options.items() if k.isupper() and isinstance(v, int | str))
        self.rows.append(Row(function.__name__, self.case, self._dtype, form, limit=self._limit, **found))


def resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers a thread and bytes of its stack, by the tool that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    registers, stack = (re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK"))
    return (int(registers[1]) if registers else None), (int(stack[1]) if stack else None)


def decodes(dtype: torch.dtype, brief: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Decodes in each order, whole and in strips; `brief`: whole ones of 480p and of the odd size, whose kernels are all
    that there are but for a few variants of the attention's products."""
    from wanduet.family.wan21 import WAN_1_3B
    from wanduet.kernels.vae.gpu import compiling_for
    from wanduet.models.vae.arena_size import compile_decode
    from wanduet.models.vae.rows import Tiling

    plans = (Tiling(), Tiling("frame", 2), Tiling("strip", 3))
    for height, width in (SIZES[0], SIZES[-1]) if brief else SIZES:
        for plan in plans[:1] if brief else plans:
            name = f"decode {width}x{height}, {plan.order}-major, {plan.num_tiles} strips"

            def decode(height: int = height, width: int = width, plan: Tiling = plan) -> None:
                compile_decode(WAN_1_3B.vae, height, width, plan, dtype, compiling_for(GPU))

            yield name, decode


def forwards(dtype: torch.dtype, brief: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """A forward with texts of many lengths, what prepares a text, the check before use, and the repair of attention."""
    from wanduet.family.wan21 import WAN_1_3B, WAN_14B
    from wanduet.kernels import check as kernel_checks
    from wanduet.kernels.attention import flash4_redo
    from wanduet.kernels.dit import plain
    from wanduet.kernels.dit.gpu import TRITON_KERNELS

    ours = replace(TRITON_KERNELS, linear=plain.linear, linear_gelu=plain.linear_gelu)  # those are cuBLAS's
    for name, spec in (("1.3B", WAN_1_3B), ("14B", WAN_14B))[: 1 if brief else 2]:
        t = spec.transformer
        heads, head_dim = t.num_attention_heads, t.attention_head_dim
        width = heads * head_dim
        for keys in KEYS:

            def text(keys: int = keys, width: int = width, heads: int = heads, head_dim: int = head_dim) -> None:
                q = torch.empty(1, 1024, width, dtype=dtype, device=META)
                k, v = torch.empty(2, 1, keys, heads, head_dim, dtype=dtype, device=META)
                ours.text_attention(q, torch.empty(width, dtype=dtype, device=META), 1e-6, k, v, 3)

            yield f"{name}, text of {keys} keys", text

        def check(heads: int = heads, head_dim: int = head_dim) -> None:
            kernel_checks.largest_error(ours, META, dtype, heads=heads, head_dim=head_dim)

        yield f"{name}, check before use", check

    def redo() -> None:
        q, k, v = torch.empty(3, 1, 4096, 12, 128, dtype=dtype, device=META)
        lse = torch.empty(1, 12, 4096, dtype=torch.float32, device=META)
        flash4_redo.redo(q, k, v, torch.empty_like(q), lse)

    yield "attention repaired", redo


def attentions(dtype: torch.dtype, brief: bool, shared: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Self-attention with 8-bit scores: of half of the channels and of all, and to blocks of keys; `brief`: the first."""
    from wanduet.kernels.attention import int8

    def attend(channels: int, head_dim: int, blocks: bool) -> None:
        q, k, v = torch.empty(1, 32_768, 36, head_dim, dtype=dtype, device=META).split(12, dim=2)
        index = torch.empty(1, 12, 256, 512, dtype=torch.int32, device=META)
        lists = int8.Blocks(index[..., 0], index) if blocks else None
        int8.attend(q, k, v, channels, lists, int8.tile_for(dtype.itemsize, shared, lists))

    cases = [(64, 128, False), (128, 128, False), (64, 128, True), (32, 64, False), (32, 32, False)]
    for channels, head_dim, blocks in cases[: 1 if brief else None]:
        name = f"{channels} of {head_dim} channels{' of listed blocks' if blocks else ''} in 8 bits"
        yield name, partial(attend, channels, head_dim, blocks)


def quantized(
    dtype: torch.dtype, capability: int, brief: bool, only: str = ""
) -> Iterator[tuple[str, Callable[[], None]]]:
    """What a forward with products in 8 bits asks for: the check before use, with each of our products; `brief`: with one.
    `only`: in this format of 8 bits."""
    from wanduet.family.wan21 import WAN_1_3B, WAN_14B
    from wanduet.kernels import check as kernel_checks
    from wanduet.kernels.dit.gpu_quantized import TILES, TRITON_QUANTIZED, products
    from wanduet.kernels.dit.quantized import DTYPES as FORMATS
    from wanduet.kernels.dit.quantized import QuantizedRows

    for name, spec in (("1.3B", WAN_1_3B), ("14B", WAN_14B))[: 1 if brief else 2]:
        t = spec.transformer
        for format, eight in FORMATS.items():
            if (format == "fp8" and capability < 89) or only not in ("", format):
                continue
            for product, multiply in products(eight).items():
                if not product.startswith("triton") or (brief and product != TILES[0].name):
                    continue  # PyTorch's, and other tiles
                kernels = replace(TRITON_QUANTIZED, quantized_linear=multiply)

                def check(kernels: Any = kernels, format: Any = format, t: Any = t) -> None:
                    heads = (t.num_attention_heads, t.attention_head_dim)
                    kernel_checks.largest_quantized_error(kernels, META, dtype, format, None, heads)
                    hidden = torch.empty(1, 1024, t.ffn_dim, dtype=dtype, device=META)
                    rows = QuantizedRows.empty(hidden.shape, FORMATS[format], META)
                    kernels.quantize_gelu(hidden, rows)
                    kernels.quantize(hidden, rows)  # as a matrix of weights

                yield f"{name}, {format}, {product}", check


def compile_all(capability: int, dtype_name: str, brief: bool = False, part: str = "all") -> list[Row]:
    """Every kernel for that capability in that dtype. To be called before any kernel is imported, for one capability.

    `brief`: those of the defaults, a VAE in float32 and a transformer of 1.3B in bfloat16; 8-bit attention, which is no
    default, with `part` "int8" only, which leaves out all others, as does "fp8": products of that format, and what they
    need, the one difference of 8.9 from 8.6."""
    shared, multiprocessors = CARDS[capability]

    def nowhere(x: object) -> AbstractContextManager[object]:
        return nullcontext()

    driver.set_active(Driver(capability))
    devices.multiprocessors = lambda device: multiprocessors
    devices.shared_memory = lambda device: shared
    devices.on_device_of = nowhere
    from wanduet.kernels import check as kernel_checks

    kernel_checks.relative = lambda got, expected: 0.0  # nothing was computed
    dtype = DTYPES[dtype_name]
    torch.backends.cudnn.allow_tf32 = True  # as PyTorch has it
    with torch.no_grad(), Recorder(capability, dtype_name) as recorder:
        of_vae = () if brief and dtype.itemsize == 2 else decodes(dtype, brief)
        cases = [*of_vae, *(forwards(dtype, brief) if dtype.itemsize == 2 else ())] if part == "all" else []
        if dtype.itemsize == 2 and part != "int8":
            cases += quantized(dtype, capability, brief, "" if part == "all" else part)
        if dtype.itemsize == 2 and (part == "int8" or (part == "all" and not brief)):
            cases += attentions(dtype, brief, shared)
        for recorder.case, run in cases:
            run()
    return recorder.rows


def table(rows: list[Row]) -> str:
    """For people."""
    lines = [f"{'kernel':<26} {'dtype':<9} {'shared':>7} {'limit':>7} {'registers':>9} {'stack':>6}  form"]
    for r in rows:
        note = "" if r.fits else f"  DOES NOT FIT {r.problem or ''}"
        lines.append(
            f"{r.kernel:<26} {r.dtype:<9} {r.shared or 0:>7} {r.limit:>7} {r.registers or 0:>9} {r.stack or 0:>6}  "
            f"{r.form} warps={r.warps} stages={r.stages}{note}"
        )
    return "\n".join(lines)


def main() -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, choices=sorted(CARDS), default=86)
    parser.add_argument("--dtype", choices=sorted(DTYPES), action="append", help="default: both")
    parser.add_argument("--brief", action="store_true", help="the forms of the default dtypes and of two sizes")
    parser.add_argument(
        "--part", choices=("all", "int8", "fp8"), default="all", help="int8: attention only; fp8: products only"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    options = parser.parse_args()
    rows = [
        row
        for name in options.dtype or sorted(DTYPES)
        for row in compile_all(options.capability, name, options.brief, options.part)
    ]
    found = {
        "capability": options.capability,
        "triton": triton.__version__,
        "limit": CARDS[options.capability][0],
        "rows": [asdict(row) | {"fits": row.fits} for row in rows],
    }
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found) if options.json else table(rows))
    return int(not all(row.fits for row in rows))


if __name__ == "__main__":
    sys.exit(main())
