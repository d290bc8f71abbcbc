"""A whole job with the tiles of a smaller card, beside the same as this GPU does it and beside diffusers': frames and seconds.

    PYTHONPATH=src python benchmarks/forced_tiles.py [--steps 8] [--size 480p] [form ...]

Forms, each in a process of its own:
- native: every kernel as this GPU gets it
- sdpa: the same without flash-attn-4 and quack; attention is PyTorch's `scaled_dot_product_attention`
- forced: as sdpa, with the tiles of compute capability 8.6, of which the convolutions' are measured as there
- diffusers: its own pipeline; its attention is the same

All make the same call on the same folder: transformer and VAE in the 1.3B model's true shapes, with random weights (see
`first_video.py`), bfloat16 and float32. Frames are compared with the first form's, as uint8.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import DEVICE, ON_GPU, TINY, Report, clear_memory, peak_memory, synchronize
from first_video import PROMPT, SIZES, write_model

SHARED_MEMORY_86 = 101_376  # bytes that a program may have there; see compile_ahead.py
FORMS = ("native", "sdpa", "forced", "diffusers")


def without_packages() -> None:
    """As where neither flash-attn-4 nor quack is installed, and PyTorch chooses what its attention runs."""
    for name in ("flash_attn", "quack"):
        sys.modules[name] = None  # type: ignore[assignment]
    from wanduet.kernels.attention import backends, choose

    choose.available_backends = lambda device: {"sdpa": backends.SDPA}


def force_tiles() -> None:
    """Let every kernel take the tile that it has on a card of capability 8.6."""
    from wanduet.kernels.attention import cross
    from wanduet.kernels.vae import attention as attention_triton
    from wanduet.kernels.vae import choose, conv

    for module in (attention_triton, choose, conv, cross):
        module.shared_memory = lambda device: SHARED_MEMORY_86


def pipeline(form: str, folder: Path) -> Any:
    """Ours or diffusers' of the folder's model."""
    if form == "diffusers":
        from diffusers import AutoencoderKLWan, WanPipeline

        vae = AutoencoderKLWan.from_pretrained(folder / "model" / "vae", torch_dtype=torch.float32)
        pipe = WanPipeline.from_pretrained(folder / "model", vae=vae, torch_dtype=torch.bfloat16).to(DEVICE)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    if form != "native":
        without_packages()
    if form == "forced" and ON_GPU:
        force_tiles()
    import wanduet

    pipe = wanduet.WanPipeline.from_pretrained(
        folder / "model", torch_dtype=torch.bfloat16, data_dir=folder / form, devices=str(DEVICE)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(form: str, folder: Path, size: tuple[int, int, int], steps: int) -> None:
    """Two steps, in which kernels are compiled and measured, then the job: its frames and what it took."""
    pipe = pipeline(form, folder)
    height, width, frames = size
    for count in (2, steps):
        ends: list[float] = []

        def step_ends(_pipe: Any, _step: int, _t: Any, tensors: dict[str, Any], ends: list[float] = ends) -> Any:
            synchronize()
            ends.append(time.perf_counter())
            return tensors

        clear_memory()
        began = time.perf_counter()
        video = pipe(
            PROMPT, height=height, width=width, num_frames=frames, num_inference_steps=count, guidance_scale=6.0,
            generator=torch.Generator().manual_seed(1), callback_on_step_end=step_ends,
        ).frames[0]  # fmt: skip
        done = time.perf_counter()
    found: dict[str, Any] = {"steps": steps, "step_s": (ends[-1] - ends[0]) / (len(ends) - 1)}
    found |= {"decode_s": done - ends[-1], "total_s": done - began}
    found = {name: round(value, 4) for name, value in found.items()} | peak_memory()
    if form != "diffusers":
        models = pipe._parts.models
        found |= {
            "kernels": models.transformer.loaded.transformer.runtime.kernels.name,
            "vae_kernels": models.vae.loaded.kernels.name,
        }
        found |= {"attention": models.transformer.loaded.attention} | tiles(folder / form / "measurements")
    (folder / f"{form}.json").write_text(json.dumps(found))
    np.save(folder / f"{form}.npy", (np.asarray(video) * 255).round().astype(np.uint8))


def tiles(measurements: Path) -> dict[str, Any]:
    """What was measured of the convolutions' tiles: milliseconds, or why one is not used, by width and dtype."""
    try:
        tables = json.loads((measurements / "convolutions.json").read_text())
    except OSError:
        return {}
    return {
        f"tiles {key.split('|')[1]} {key.split('|')[2]}": {r["name"]: r["milliseconds"] or r["problem"] for r in table}
        for key, table in tables.items()
    }


def compare(report: Report, form: str, first: str, folder: Path, options: argparse.Namespace) -> None:
    """Run one form, and hold its frames beside the first's."""
    command = [sys.executable, __file__, "--child", form, "--folder", str(folder)]
    subprocess.run([*command, "--size", options.size, "--steps", str(options.steps)], check=True)
    row = json.loads((folder / f"{form}.json").read_text())
    frames, expected = (np.load(folder / f"{name}.npy").astype(np.int16) for name in (form, first))
    error = frames - expected
    mse = float((error.astype(np.float64) ** 2).mean())
    report.add("forced_tiles", form=form, size=options.size, beside=first, max_abs=int(abs(error).max()),
               differing=round(float((error != 0).mean()), 6), psnr_db=round(10 * np.log10(255**2 / mse), 2) if mse else None,
               spread=round(float(expected.std()), 2), **row)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2 if TINY else 8)
    parser.add_argument("--size", choices=tuple(SIZES), default="480p")
    parser.add_argument("--child", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("forms", nargs="*", default=[], choices=(*FORMS, []))
    options = parser.parse_args()
    if options.child is not None:
        run(options.child, options.folder, SIZES[options.size], options.steps)
        return
    forms = options.forms or list(FORMS)
    report = Report("forced_tiles")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        chosen = {f: partial(compare, form=f, first=forms[0], folder=folder, options=options) for f in forms}
        report.run(chosen, forms)
    report.print()


if __name__ == "__main__":
    main()
