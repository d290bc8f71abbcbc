"""Files of every form in the 1.3B model's true shapes, LoRA, and the 14B model: seconds to load, seconds of a step, peaks.

    PYTHONPATH=src python benchmarks/weight_forms.py [--files Q4_K.gguf ...] [section ...]

Sections: transformer text lora large (default: all). `--files`: of the transformer's, those alone. The files are written first, so they are in the page cache; random
values. `peak_ratio` is predicted / measured. A job of two steps loads, a second of six is counted.
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from _common import GIB, ON_GPU, TINY, Report, clear_memory
from safetensors.torch import save_file
from text_encoder import EVERY_UMT5
from text_encoder import write as write_encoder
from torch import Tensor
from whole_job import SIZES

from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.family.wan21 import WAN_1_3B
from wanduet.media.latents import load_latents
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE
from wanduet.request import GenerationRequest
from wanduet.weights.hub import open_model
from wanduet.weights.keymaps import TRANSFORMER, Pairs, renamed
from wanduet.weights.safetensors import TensorFiles

SPEC = replace(WAN_1_3B.transformer, num_layers=2) if TINY else WAN_1_3B.transformer
TEXT = replace(WAN_1_3B.text_encoder, num_layers=2, vocab_size=700, d_ff=64) if TINY else WAN_1_3B.text_encoder
SMALL_TEXT = replace(WAN_1_3B.text_encoder, num_layers=2, vocab_size=700, d_ff=64)
SIZE = SIZES["480p"] if ON_GPU else (64, 64, 5)
STEPS = 6 if ON_GPU else 2
Q8_BLOCK, Q4_K_BLOCK, Q4_K_VALUES = 34, 144, 256  # bytes, and values
_NOISE = torch.randn(2**22).mul_(0.02)


def noise(*shape: int) -> Tensor:
    """Values `[*shape]` float32: a block of noise, repeated."""
    count = torch.Size(shape).numel()
    return _NOISE.repeat(-(-count // _NOISE.numel()))[:count].reshape(shape)


def shapes() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in WanTransformer(SPEC).state_dict().items()}


def write_base(folder: Path) -> Path:
    """A Diffusers folder: the transformer in bfloat16, the VAE in float32, a small text encoder."""
    miniature = open_model("miniature").path
    shutil.copytree(miniature / "tokenizer", folder / "tokenizer")
    for name in ("transformer", "vae", "text_encoder"):
        (folder / name).mkdir()
    (folder / "text_encoder" / "config.json").write_text(json.dumps(asdict(SMALL_TEXT) | EVERY_UMT5))
    write_encoder(folder / "text_encoder", torch.bfloat16, SMALL_TEXT)
    (folder / "vae" / "config.json").write_text("{}")
    save_file(WanVAE(WAN_1_3B.vae).state_dict(), folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "transformer" / "config.json").write_text(json.dumps({"num_layers": SPEC.num_layers, "num_attention_heads": 12,
                                                                    "ffn_dim": 8960, "text_dim": 4096}))  # fmt: skip
    state = {name: noise(*shape).bfloat16() for name, shape in shapes().items()}
    save_file(state, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return folder


def official(names: Mapping[str, Any], pairs: Pairs) -> dict[str, str]:
    return renamed(names, [(theirs, ours) for ours, theirs in pairs])


def is_matrix(name: str, value: Tensor) -> bool:
    return value.ndim == 2 and name.endswith(".weight") and min(value.shape) >= 64


def scaled_fp8(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's scaled fp8: matrices in 8 bits with one scale each, the rest in float16."""
    found = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, value in state.items():
        if is_matrix(name, value):
            scale = value.abs().max().float() / 448
            found[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            found[f"{name.removesuffix('.weight')}.scale_weight"] = scale.reshape(1)
        else:
            found[name] = value.half()
    return found


def plain_fp8(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices cast to 8 bits without a scale, the rest in float16."""
    return {n: v.to(torch.float8_e4m3fn) if is_matrix(n, v) else v.half() for n, v in state.items()}


def rows_in_8_bits(state: Mapping[str, Tensor], dtype: torch.dtype, highest: float) -> dict[str, Tensor]:
    """LightX2V's form: matrices in 8 bits with a scale for each row, the rest in bfloat16."""
    found = {}
    for name, value in state.items():
        if is_matrix(name, value):
            scale = value.float().abs().amax(1, keepdim=True) / highest
            stored = value.float() / scale
            found[name] = (stored if dtype.is_floating_point else stored.round()).to(dtype)
            found[f"{name.removesuffix('.weight')}.weight_scale"] = scale
        else:
            found[name] = value
    return found


def write_gguf(path: Path, state: Mapping[str, Tensor], kind: str, architecture: str) -> None:
    """Blocks of random numbers with small scales for matrices; the rest in float32."""
    writer = gguf.GGUFWriter(path, architecture)
    draw = np.random.default_rng(0)
    block = draw.integers(0, 255, (4096, Q8_BLOCK if kind == "Q8_0" else Q4_K_BLOCK), dtype=np.uint8)
    # Of Q4_K the scale and that of the minima, which random 6-bit factors of up to 63 enlarge.
    for at, scale in ((0, 2e-4),) if kind == "Q8_0" else ((0, 4e-5), (2, 4e-5)):
        block[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    values = 32 if kind == "Q8_0" else Q4_K_VALUES
    for name, value in state.items():
        if value.ndim == 2 and value.shape[1] % values == 0 and min(value.shape) >= 64:
            count = value.numel() // values
            data = np.resize(block, (count, block.shape[1])).reshape(value.shape[0], -1)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            data = value.float().numpy()
            if data.ndim == 5:
                writer.add_array(f"comfy.gguf.orig_shape.{name}", list(data.shape))
                data = data.reshape(data.shape[0], -1)
            writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def jobs(config: EngineConfig, steps: tuple[int, ...] = (2, STEPS), **fields: Any) -> list[dict[str, Any]]:
    """Jobs one after the other on one engine."""
    clear_memory()
    found = []
    with Engine(config) as engine:
        for number, count in enumerate(steps):
            request = GenerationRequest(
                prompt=f"a cat walks {number}", seed=1, height=SIZE[0], width=SIZE[1], num_frames=SIZE[2],
                num_inference_steps=count, **fields,
            )  # fmt: skip
            found.append(one_job(engine, request, config.data_folder))
    return found


def one_job(engine: Engine, request: GenerationRequest, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    job = engine.submit(request, OutputOptions(folder / "video.mp4", save_latents=True))
    result = job.result()
    peaks = {device: value for device, value in result.peak_memory_bytes.items() if value}
    predicted = {one.name: one.peak for one in job.plan.prediction.devices if one.name in peaks}
    return {
        "seconds": round(time.perf_counter() - began, 3), **{k: round(v, 3) for k, v in result.timings.items()},
        "step_s": round(result.timings["denoise_s"] / request.num_inference_steps, 4), "attention": job.attention,
        "resident_blocks": job.plan.transformer.resident_blocks, "notes": job.notes,
        "peak_gib": {k: round(v / GIB, 3) for k, v in peaks.items()},
        "peak_ratio": {k: round(v / peaks[k], 3) for k, v in predicted.items()},
        "latents": load_latents(job.latents_path(0))[0],
    }  # fmt: skip


def shown(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "latents"}


def transformer(report: Report, base: Path, folder: Path, files: Collection[str] = ()) -> None:
    """Each form of the transformer's file, and each form in memory; of `files`, if there are any, those alone."""
    source = TensorFiles("transformer", [base / "transformer" / "diffusion_pytorch_model.safetensors"])
    state = dict(source.iterate(list(source.tensors)))
    names = official(state, TRANSFORMER)
    theirs = {names[name]: value for name, value in state.items()}
    prefixed = {f"model.diffusion_model.{name}": value for name, value in theirs.items()}
    writers: dict[str, Callable[[Path], object]] = {
        "diffusers-bf16.safetensors": lambda path: save_file(state, path),
        "diffusers-fp32.safetensors": lambda path: save_file({n: v.float() for n, v in state.items()}, path),
        "comfy-fp16.safetensors": lambda path: save_file({n: v.half() for n, v in prefixed.items()}, path),
        "comfy-fp8-scaled.safetensors": lambda path: save_file(scaled_fp8(prefixed), path),
        "comfy-fp8.safetensors": lambda path: save_file(plain_fp8(prefixed), path),
        "lightx2v-int8.safetensors": lambda path: save_file(rows_in_8_bits(theirs, torch.int8, 127), path),
        "lightx2v-fp8.safetensors": lambda path: save_file(rows_in_8_bits(theirs, torch.float8_e4m3fn, 448), path),
        "original.pth": lambda path: torch.save(theirs, path),
        "Q8_0.gguf": lambda path: write_gguf(path, theirs, "Q8_0", "wan"),
        "Q4_K.gguf": lambda path: write_gguf(path, theirs, "Q4_K", "wan"),
    }
    memory = {
        "diffusers-bf16.safetensors": ("bf16", "q8", "fp8"),
        "comfy-fp8-scaled.safetensors": ("auto", "fp8"),
        "lightx2v-int8.safetensors": ("auto", "q8"),
        "Q8_0.gguf": ("auto", "q8"),
    }
    for name, write in writers.items():
        if files and name not in files:
            continue
        path = folder / name
        write(path)
        for weights in memory.get(name, ("auto",)):
            config = EngineConfig(
                model=str(base), transformer=path, weights=weights, data_dir=folder / "data", cache_embeddings=False
            )
            first, again = jobs(config)
            report.add("transformer", file=name, gib=round(path.stat().st_size / GIB, 2), weights=weights, first_s=first["seconds"], **shown(again | {key: first[key] for key in ("load_s", "verify_s") if key in first}))  # fmt: skip
        path.unlink()


def text(report: Report, base: Path, folder: Path) -> None:
    """Each form of the text encoder, read into host memory, and on the device."""
    source_folder = folder / "umt5"
    source_folder.mkdir()
    write_encoder(source_folder, torch.bfloat16, TEXT)
    (source_folder / "config.json").write_text(json.dumps(asdict(TEXT) | EVERY_UMT5))
    source = TensorFiles("text encoder", sorted(source_folder.glob("*.safetensors")))

    def comfy() -> Path:
        path = folder / "umt5_fp8_e4m3fn_scaled.safetensors"
        save_file(scaled_fp8(dict(source.iterate(list(source.tensors)))), path)
        return path

    def blocks() -> Path:
        path = folder / "umt5-Q8_0.gguf"
        state = dict(source.iterate(list(source.tensors)))
        names = GGUF_UMT5(state)
        write_gguf(path, {names[name]: value for name, value in state.items()}, "Q8_0", "t5encoder")
        return path

    device = "cuda:0" if ON_GPU else "cpu"
    for make, where, dtype in (
        (lambda: source_folder, "cpu", "auto"), (lambda: source_folder, "cpu", "q8"), (lambda: source_folder, device, "auto"),
        (comfy, "cpu", "auto"), (comfy, "cpu", "fp8"), (blocks, "cpu", "auto"), (blocks, "cpu", "q8"),
    ):  # fmt: skip
        path = make()
        config = EngineConfig(
            model=str(base), text_encoder=path, text_encoder_device=where, text_encoder_dtype=dtype, text_encoder_hold="resident",
            data_dir=folder / "data", cache_embeddings=False,
        )  # fmt: skip
        first, again = jobs(config, (1, 1))
        report.add("text", file=path.name, device=where, dtype=dtype, load_and_encode_s=first["encode_s"], encode_s=again["encode_s"],
                   peak_gib=again["peak_gib"])  # fmt: skip


def GGUF_UMT5(state: Mapping[str, Tensor]) -> dict[str, str]:  # noqa: N802
    """llama.cpp's names of UMT5's tensors, by transformers'."""
    parts = {
        "layer.0.SelfAttention.q": "attn_q", "layer.0.SelfAttention.k": "attn_k", "layer.0.SelfAttention.v": "attn_v",
        "layer.0.SelfAttention.o": "attn_o", "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b",
        "layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm", "layer.1.DenseReluDense.wi_0": "ffn_gate",
        "layer.1.DenseReluDense.wi_1": "ffn_up", "layer.1.DenseReluDense.wo": "ffn_down",
    }  # fmt: skip
    found = {}
    for name in state:
        if name.startswith("encoder.block."):
            _, _, index, *rest, last = name.split(".")
            found[name] = f"enc.blk.{index}.{parts['.'.join(rest)]}.{last}"
        else:
            found[name] = "token_embd.weight" if name.startswith("shared") else "enc.output_norm.weight"
    return found


def lora_file(path: Path, rank: int, seed: int) -> Path:
    """A LoRA of all matrices of the blocks, by the original names."""
    torch.manual_seed(seed)
    found = {}
    for name, shape in shapes().items():
        if name.startswith("blocks.") and name.endswith(".weight") and len(shape) == 2:
            stem = "diffusion_model." + official({name: 0}, TRANSFORMER)[name].removesuffix(".weight")
            found[f"{stem}.lora_A.weight"] = (torch.randn(rank, shape[1]) / rank).bfloat16()
            found[f"{stem}.lora_B.weight"] = (torch.randn(shape[0], rank) * 0.01).bfloat16()
    save_file(found, path)
    return path


def lora(report: Report, base: Path, folder: Path) -> None:
    """Jobs without, with one, with two, and again without LoRA on one engine: seconds of the change, and the base restored."""
    one, two = (lora_file(folder / f"{name}.safetensors", 32, seed) for seed, name in enumerate(("a", "b")))
    for weights in ("auto", "q8"):
        config = EngineConfig(model=str(base), weights=weights, data_dir=folder / "data", cache_embeddings=False)
        expected = None
        with Engine(config) as engine:
            for name, files in (
                ("none", []),
                ("a", [one]),
                ("b", [two]),
                ("a and b", [one, two]),
                ("none", []),
                ("a", [one]),
            ):
                request = GenerationRequest(
                    prompt="a cat walks", seed=1, height=SIZE[0], width=SIZE[1], num_frames=SIZE[2], num_inference_steps=2,
                    loras=[{"name": str(path)} for path in files],
                )  # fmt: skip
                row = one_job(engine, request, folder)
                if name == "none":
                    expected = row["latents"] if expected is None else expected
                equal = torch.equal(row["latents"], expected)
                report.add(
                    "lora",
                    weights=weights,
                    loras=name,
                    mib=round(one.stat().st_size / 2**20),
                    base_bit_equal=equal,
                    **shown(row),
                )


def large(report: Report, base: Path, folder: Path) -> None:
    """The 14B model: resident, in 8 bits within 24 GiB, streamed within 12 GiB."""
    if TINY:
        return
    for weights, limit in (("bf16", None), ("q8", 24), ("fp8", 24), ("bf16", 12)):
        config = EngineConfig(
            model="random:14b",
            weights=weights,
            vram_limit=limit and limit * GIB,
            data_dir=folder / "data",
            cache_embeddings=False,
        )
        if limit:
            torch.cuda.set_per_process_memory_fraction(limit * GIB / torch.cuda.get_device_properties(0).total_memory)
        try:
            first, again = jobs(config, (1, 2))
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        report.add(
            "large",
            weights=weights,
            limit_gib=limit,
            first_s=first["seconds"],
            **shown(again | {key: first[key] for key in ("load_s", "verify_s") if key in first}),
        )


SECTIONS = {"transformer": transformer, "text": text, "lora": lora, "large": large}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", default=[], choices=(*SECTIONS, []))
    parser.add_argument("--files", nargs="+", default=[], metavar="NAME")
    options = parser.parse_args()
    report = Report("weight_forms" + ("_some" if options.files else ""))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "base").mkdir()
        base = write_base(folder / "base")
        sections = SECTIONS | {"transformer": partial(transformer, files=options.files)}
        chosen = {name: lambda r, run=run: run(r, base, folder) for name, run in sections.items()}
        report.run(chosen, options.sections or list(SECTIONS))
    report.print()


if __name__ == "__main__":
    main()
