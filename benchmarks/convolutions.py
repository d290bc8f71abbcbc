"""The VAE's convolutions in their true shapes (480p): our kernel by tile, beside PyTorch's (cuDNN).

    PYTHONPATH=src python benchmarks/convolutions.py [section ...]

Sections: float32 bfloat16 (float32 with TF32). Both sides do the same work: a step of up to four frames with a past of
two and a residual. PyTorch's side includes what it needs before and after the convolution (`with input`), and is
also shown alone (`convolution alone`). Tiles are pixels x channels x depth / warps / stages, then how many rows the
pixels are of, whether channels are the product's rows, and whether taps are added up square by square. One shape is
what half a frame has.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from _common import DEVICE, ON_GPU, TINY, Report, relative_error, timed

from wanduet.kernels.vae import plain
from wanduet.kernels.vae.plain import Epilogue, Filter, Fused


@dataclass(frozen=True)
class Shape:
    """One layer at a step: how often it runs for a latent frame, channels, frames, rows, columns."""

    count: int
    inputs: int
    outputs: int
    frames: int
    rows: int
    columns: int

    @property
    def tflop(self) -> float:
        return 2 * 27 * self.inputs * self.outputs * self.frames * self.rows * self.columns / 1e12


SHAPES = (
    Shape(6, 96, 96, 4, 480, 832), Shape(6, 192, 192, 4, 240, 416), Shape(1, 192, 384, 2, 120, 208),
    Shape(5, 384, 384, 2, 120, 208), Shape(5, 384, 384, 2, 60, 208), Shape(10, 384, 384, 1, 60, 104), Shape(1, 96, 3, 4, 480, 832),
)  # fmt: skip
if TINY:
    SHAPES = (Shape(1, 8, 16, 1, 4, 3),)


def tiles(shape: Shape, dtype: torch.dtype) -> Iterator[tuple[int, ...]]:
    """Pixels, first and second part of the channels, depth, warps, stages, swap, rows, and perhaps square."""
    narrow = dtype == torch.float32
    depth = 32 if narrow else 64
    if shape.outputs == 3:
        yield from product((128, 256), (16,), (0,), (32,), (4,), (3, 4), (0,), (1, 4, 8))
    elif shape.outputs == 96:
        for pixels, warps, stages in ((128, 4, 4), (128, 4, 3), (256, 8, 3)):
            yield from ((pixels, 64, 32, 32, warps, stages, 0, rows) for rows in (1, 4, 8))
        yield (128, 64, 32, 32, 4, 2, 0, 8)
    else:
        for swap in (0, 1):
            yield from ((128, 128, 64, depth, 8, 3, swap, rows) for rows in (1, 4, 8))
        yield from ((256, 128, 64, depth, 8, 2, 1, rows) for rows in (1, 8))
        if shape.outputs == 384:
            yield from ((128, 256, 0, depth, 8, 3, 0, rows) for rows in (1, 8))
            yield (128, 128, 64, depth, 8, 3, 0, 1, 1)


@torch.no_grad()
def measure(dtype: torch.dtype, report: Report) -> None:
    """Every shape in one dtype."""
    name = str(dtype)[6:]
    torch.backends.cudnn.allow_tf32 = True
    for shape in SHAPES:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def clip(channels: int, frames: int, s: Shape = shape, g: torch.Generator = generator) -> torch.Tensor:
            x = torch.randn(1, channels, frames, s.rows, s.columns, generator=g, device=DEVICE, dtype=dtype)
            return x.to(memory_format=torch.channels_last_3d)

        x, past, residual = clip(shape.inputs, shape.frames), clip(shape.inputs, 2), clip(shape.outputs, shape.frames)
        weight = torch.randn(shape.outputs, shape.inputs, 3, 3, 3, generator=generator, device=DEVICE, dtype=dtype)
        weight = (weight / (27 * shape.inputs) ** 0.5).to(memory_format=torch.channels_last_3d)
        bias = torch.randn(shape.outputs, generator=generator, device=DEVICE, dtype=dtype)
        filter = Filter(weight, bias, (1, 1))
        joined = torch.cat((past, x), dim=2)
        library = partial(plain.causal_conv, x, past, filter, Fused(residual=residual))
        expected = library()[0]

        def add(
            way: str, run: Callable[[], object], error: float | None = None, s: Shape = shape, **more: object
        ) -> None:
            ms = timed(run, 5, 2) * 1e3
            layer = f"{s.count} x {s.inputs} to {s.outputs}, {s.frames}x{s.rows}x{s.columns}"
            rate = round(s.tflop / ms * 1e3, 1)
            report.add(name, layer=layer, way=way, ms=round(ms, 4), tflops=rate, difference=error, **more)

        for search in (False, True):
            torch.backends.cudnn.benchmark = search
            alone = partial(torch.nn.functional.conv3d, joined, weight, bias, padding=(0, 1, 1))
            add("cuDNN, convolution alone", alone, search=search)
            add("cuDNN, with input and residual", library, search=search)
        torch.backends.cudnn.benchmark = False
        if not ON_GPU:
            continue
        from wanduet.kernels.vae.conv import convolve
        from wanduet.kernels.vae.conv_tiles import Tile

        for sides in tiles(shape, dtype):
            out = torch.full_like(residual, float("nan"))
            run = partial(convolve, x, past, filter, Epilogue(out, residual), tile=Tile(*sides))
            label = f"ours {sides[0]}x({sides[1]}+{sides[2]})x{sides[3]} /{sides[4]} /{sides[5]} rows {sides[7]} swap {sides[6]}{' square' * len(sides[8:])}"
            try:
                run()
                add(label, run, relative_error(out, expected))
            except Exception as problem:  # a tile may ask for more than the card has
                report.add(name, way=label, problem=f"{type(problem).__name__}: {problem}"[:120])


SECTIONS = {"float32": partial(measure, torch.float32), "bfloat16": partial(measure, torch.bfloat16)}


def main() -> None:
    report = Report("convolutions")
    report.run(SECTIONS, sys.argv[1:] or list(SECTIONS))
    report.print()


if __name__ == "__main__":
    main()
