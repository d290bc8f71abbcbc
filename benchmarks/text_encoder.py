"""The UMT5-XXL text encoder in its true shape (random weights on disk): host memory and seconds of each way to hold it.

    PYTHONPATH=src python benchmarks/text_encoder.py [--dtype float32] [--folder FOLDER]

Needs 12 GB of disk for bfloat16 files (23 GB for float32). Each way runs in a process of its own; its peak
is what the system counted (VmHWM), pages of the mapped files included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from _common import TINY, Report
from safetensors.torch import save_file

from wanduet.family.spec import TextEncoderSpec
from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.text.umt5 import EMBEDDING, FINAL_NORM, TextEncoder
from wanduet.planning.host import process_peak_bytes
from wanduet.weights.safetensors import TensorFiles

SPEC = (
    replace(WAN_1_3B.text_encoder, vocab_size=600, d_model=64, d_kv=8, d_ff=96, num_layers=3, num_heads=8)
    if TINY
    else WAN_1_3B.text_encoder
)
EVERY_UMT5 = {"feed_forward_proj": "gated-gelu", "is_encoder_decoder": False, "model_type": "umt5"}
CONFIG = asdict(SPEC) | EVERY_UMT5
LAYERS_A_FILE = 5
PROMPT, NEGATIVE = [*range(3, 82), 1], [*range(3, 128), 1]  # 80 and 126 tokens


def write(folder: Path, dtype: torch.dtype, spec: TextEncoderSpec = SPEC) -> None:
    """Random weights of the encoder's shapes. A block of noise is repeated: drawing all of it would take minutes."""
    noise = torch.randn(2**22).mul_(0.02).to(dtype)

    def tensor(*shape: int) -> torch.Tensor:
        count = torch.Size(shape).numel()
        return noise.repeat(-(-count // noise.numel()))[:count].view(shape)

    inner = spec.num_heads * spec.d_kv
    for start in range(0, spec.num_layers, LAYERS_A_FILE):
        tensors = {}
        for index in range(start, min(start + LAYERS_A_FILE, spec.num_layers)):
            prefix = f"encoder.block.{index}.layer."
            for part in "qkv":
                tensors[f"{prefix}0.SelfAttention.{part}.weight"] = tensor(inner, spec.d_model)
            tensors[f"{prefix}0.SelfAttention.o.weight"] = tensor(spec.d_model, inner)
            tensors[f"{prefix}0.SelfAttention.relative_attention_bias.weight"] = tensor(32, spec.num_heads)
            for part in ("wi_0", "wi_1"):
                tensors[f"{prefix}1.DenseReluDense.{part}.weight"] = tensor(spec.d_ff, spec.d_model)
            tensors[f"{prefix}1.DenseReluDense.wo.weight"] = tensor(spec.d_model, spec.d_ff)
            for layer in (0, 1):
                tensors[f"{prefix}{layer}.layer_norm.weight"] = torch.ones(spec.d_model, dtype=dtype)
        if start == 0:
            tensors[EMBEDDING] = tensor(spec.vocab_size, spec.d_model)
            tensors[FINAL_NORM] = torch.ones(spec.d_model, dtype=dtype)
        save_file(tensors, folder / f"model-{start:03d}.safetensors")


def measure(folder: Path, hold: str, dtype: str) -> None:
    """In a process of its own: prints one JSON line."""
    files = TensorFiles("text encoder", sorted(folder.glob("*.safetensors")))
    before = process_peak_bytes() / 2**30
    encoder = TextEncoder(CONFIG, files, getattr(torch, dtype), hold)  # type: ignore[arg-type]
    seconds = []
    for prompts in ([PROMPT, NEGATIVE], [PROMPT]):
        began = time.perf_counter()
        embeds = encoder.encode(prompts)
        seconds.append(round(time.perf_counter() - began, 2))
    peak = process_peak_bytes() / 2**30
    row = {"hold": hold, "compute": dtype, "both_prompts_s": seconds[0], "one_prompt_s": seconds[1]}
    print(
        json.dumps(
            row | {"peak_rss_gib": round(peak, 2), "before_gib": round(before, 2), "shape": list(embeds[0].shape)}
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the files")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the files")
    parser.add_argument("--measure", nargs=2, metavar=("HOLD", "DTYPE"), default=None)
    parser.add_argument("--ways", nargs="*", default=["streamed:float32", "streamed:bfloat16"])
    options = parser.parse_args()
    if options.measure:
        measure(options.folder, *options.measure)
        return
    report = Report("text_encoder")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        began = time.perf_counter()
        write(folder, getattr(torch, options.dtype))
        size = sum(p.stat().st_size for p in folder.iterdir())
        report.add(
            "files", dtype=options.dtype, gb=round(size / 1e9, 2), written_s=round(time.perf_counter() - began, 1)
        )
        for way in options.ways:
            command = [sys.executable, __file__, "--folder", str(folder), "--measure", *way.split(":")]
            done = subprocess.run(command, capture_output=True, text=True)
            report.add("ways", **(json.loads(done.stdout) if done.returncode == 0 else {"failed": done.stderr[-300:]}))
    report.write()
    report.print()


if __name__ == "__main__":
    main()
