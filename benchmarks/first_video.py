"""From the start of the process to the first step and to the video: the command line itself, each time in a new process.

    PYTHONPATH=src python benchmarks/first_video.py [--steps 50] [--size 480p] [section ...]

Sections: machine (one process that only reads the libraries, so that none of the others finds them on a cold disk, or not
yet compiled to bytecode), eager (nothing is compiled: no Triton, no flash-attn-4, no quack), first (every kernel is
compiled, every attention measured), again (with what the first has left). Eager and first begin with empty caches.

The model is a folder as a checkpoint is, with transformer and VAE in the 1.3B model's true shapes, the transformer in
bfloat16 (2.65 GiB). Its text encoder has the true width but one layer: `text_encoder.py` measures the true one. Random
weights: time does not depend on their values. All seconds count from before the process was started.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _common import DEVICE, TINY, Report
from safetensors.torch import save_file
from torch import nn

from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE

SIZES = {"480p": (480, 832, 81), "720p": (720, 1280, 81), "1080p": (1080, 1920, 81)}
PROMPT = "a cat walks over a frozen lake at sunset, snow flies from its paws"
CLOCK = str(Path(__file__).with_name("_process_clock.py"))
# What a job imports on its way, if it is there.
IMPORTED = ("diffusers.schedulers.scheduling_unipc_multistep", "transformers.models.umt5.modeling_umt5", "triton",
            "flash_attn.cute", "quack.gemm_interface")  # fmt: skip
HIDDEN = ("triton", "flash_attn", "quack")  # what compiles, from an eager run
TRANSFORMER, VAE = WAN_1_3B.transformer, WAN_1_3B.vae
if TINY:
    SIZES = {"480p": (64, 96, 9)}
    TRANSFORMER = replace(WAN_1_3B.transformer, num_attention_heads=2, ffn_dim=96, num_layers=2, text_dim=32)
    VAE = replace(WAN_1_3B.vae, base_dim=8, num_res_blocks=1)


def write_model(folder: Path) -> None:
    """The model's files. What the bundled miniature has and is no matter of size is taken from there."""
    from transformers import UMT5Config, UMT5EncoderModel

    import wanduet.miniature

    source = Path(wanduet.miniature.__file__).parent / "model"
    skip = shutil.ignore_patterns("*.safetensors", "manifest.json", "training.json", "generation_defaults.json")
    shutil.copytree(source, folder, ignore=skip)
    torch.manual_seed(0)
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {"transformer": WanTransformer(TRANSFORMER), "vae": WanVAE(VAE)}
    for name, spec, dtype in (("transformer", TRANSFORMER, torch.bfloat16), ("vae", VAE, torch.float32)):
        path = folder / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | asdict(spec)))
        tensors = {n: random_weight(n, p).to("cpu", dtype) for n, p in modules[name].named_parameters()}
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    config |= {"d_model": TRANSFORMER.text_dim, "num_layers": 1}
    UMT5EncoderModel(UMT5Config(**config)).save_pretrained(folder / "text_encoder")


def random_weight(name: str, parameter: nn.Parameter) -> torch.Tensor:
    """Norms of one, small matrices: activations stay finite, and of the size that the check after loading wants."""
    if parameter.ndim == 1 or "gamma" in name:
        return torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, device=DEVICE)
    return torch.randn(parameter.shape, device=DEVICE) * parameter[0].numel() ** -0.5


def run(report: Report, options: argparse.Namespace, model: Path, section: str, caches: Path) -> None:
    """One process, and what it said of itself."""
    height, width, frames = SIZES[options.size]
    marks = caches / "marks.json"
    arguments = ["generate", PROMPT, "--model", str(model), "--height", str(height), "--width", str(width),
                 "--num-frames", str(frames), "--num-inference-steps", str(options.steps), "--seed", "1",
                 "--output", str(caches / f"{section}.mp4"), "--data-dir", str(caches / "data"), "--json"]  # fmt: skip
    environment = os.environ | {"TRITON_CACHE_DIR": str(caches / "triton")}
    began = time.time()
    clock = [sys.executable, CLOCK, str(began), str(marks), ",".join(HIDDEN) if section == "eager" else ""]
    done = subprocess.run([*clock, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    ended = round(time.time() - began, 2)
    if done.returncode:
        raise RuntimeError(done.stdout)
    result = json.loads(done.stdout)
    seconds = json.loads(marks.read_text())
    timings = {name: round(value, 2) for name, value in result["timings"].items()}
    report.add("first_video", run=section, size=options.size, steps=options.steps, **seconds, process_ends=ended, **timings,
               attention=result.get("attention"))  # fmt: skip


def machine(report: Report) -> None:
    """Reads what all runs read, without leaving anything of it in their caches."""
    code = "import wanduet.doors.cli.commands" + "".join(
        f"\ntry: import {name}\nexcept Exception: pass" for name in IMPORTED
    )
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    report.add("machine", seconds=round(time.perf_counter() - began, 2))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sections", nargs="*", default=["machine", "eager", "first", "again"])
    parser.add_argument("--steps", type=int, default=2 if TINY else 50)
    parser.add_argument("--size", default="480p")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model)
        sections: dict[str, Any] = {"machine": machine}
        for name in ("eager", "first", "again"):
            caches = Path(folder) / ("eager" if name == "eager" else "caches")
            caches.mkdir(exist_ok=True)
            sections[name] = partial(run, options=options, model=model, section=name, caches=caches)
        report = Report("first_video")
        report.run(sections, options.sections)
    report.print()


if __name__ == "__main__":
    main()
