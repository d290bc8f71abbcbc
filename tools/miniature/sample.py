"""Sampling and evaluation during training, in batches and without the engine. `evaluate.py` uses the engine."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.miniature import folder as files
from tools.miniature.detector import ATTRIBUTES, detect
from tools.miniature.prompts import describe
from tools.miniature.world import held_out_combinations
from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE


@dataclass(frozen=True, slots=True)
class Parts:
    """The model's parts on one device, in float32."""

    vae: WanVAE
    transformer: WanTransformer | None
    encoder: nn.Module | None
    folder: Path
    device: str


def read_model(folder: Path, device: str, only_vae: bool = False) -> Parts:
    """Read a folder that `folder.py` wrote."""
    vae = WanVAE(WAN_1_3B.vae.with_config(json.loads((folder / "vae" / "config.json").read_text())))
    vae.load_state_dict(files.read_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors"))
    vae.to(device).eval().requires_grad_(False)
    if only_vae:
        return Parts(vae, None, None, folder, device)
    return Parts(vae, read_transformer(folder, device), encoder_of(folder, device).eval(), folder, device)


def read_transformer(folder: Path, device: str) -> WanTransformer:
    """Read the transformer of a folder that `folder.py` wrote."""
    config = json.loads((folder / "transformer" / "config.json").read_text())
    transformer = WanTransformer(WAN_1_3B.transformer.with_config(config))
    transformer.load_state_dict(files.read_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    return transformer.to(device).eval()


def encoder_of(folder: Path | None, device: str) -> nn.Module:
    """The UMT5 encoder with the weights of a folder; None: with random weights."""
    from transformers import UMT5Config, UMT5EncoderModel

    encoder = UMT5EncoderModel(UMT5Config(**files.text_encoder_config()))
    if folder is not None:
        tensors = files.read_tensors(folder / "text_encoder" / "model.safetensors")
        encoder.load_state_dict(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]})
    module: nn.Module = encoder.to(device)
    return module


def default_sigmas() -> list[float]:
    """The noise levels of the default settings, 1 to 0."""
    d = files.DEFAULTS
    time = torch.linspace(1, 0, d.num_inference_steps + 1)
    sigmas: list[float] = (d.flow_shift * time / (1 + (d.flow_shift - 1) * time)).tolist()
    return sigmas


@torch.no_grad()
def denoise(
    parts: Parts,
    prompts: list[str],
    seed: int,
    sigmas: Sequence[float],
    guidance: float = files.DEFAULTS.guidance_scale,
) -> Tensor:
    """Latents `[B, 16, T, h, w]` for prompts: Euler steps on noise levels from 1 to 0."""
    assert parts.transformer is not None
    d = files.DEFAULTS
    positive, negative = (_embed(parts, texts) for texts in (prompts, [""] * len(prompts)))
    shape = (len(prompts), 16, (d.num_frames - 1) // 4 + 1, d.height // 8, d.width // 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(parts.device)
    for sigma, following in itertools.pairwise(sigmas):
        timestep = torch.full((len(prompts),), 1000 * sigma, device=parts.device)
        step = parts.transformer(x, timestep, positive)
        if guidance != 1.0:
            unconditional = parts.transformer(x, timestep, negative)
            step = unconditional + guidance * (step - unconditional)
        x = x + (following - sigma) * step
    return x


@torch.no_grad()
def decode(parts: Parts, latents: Tensor) -> Tensor:
    """Videos `[B, 3, T, H, W]` in [-1, 1]."""
    return torch.cat([parts.vae.decode(part) for part in latents.split(8)])


def evaluate_model(
    parts: Parts,
    count: int,
    sheet: Path | None,
    sigmas: Sequence[float] | None = None,
    guidance: float = files.DEFAULTS.guidance_scale,
) -> dict[str, Any]:
    """The fraction of correct attributes over `count` held-out combinations. `sigmas`: see `denoise`."""
    sigmas = default_sigmas() if sigmas is None else sigmas
    wanted = [describe(c) for c in held_out_combinations()[:count].tolist()]
    videos = []
    for i in range(0, count, 70):
        texts = [w.prompt for w in wanted[i : i + 70]]
        videos.append(decode(parts, denoise(parts, texts, 1000 + i, sigmas, guidance)).cpu())
    pixels = ((torch.cat(videos) + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).numpy()
    right = dict.fromkeys(ATTRIBUTES, 0)
    mistakes = []
    for want, frames in zip(wanted, pixels, strict=True):
        seen = detect(frames)
        for name in ATTRIBUTES:
            right[name] += getattr(seen, name) == getattr(want, name)
        if any(getattr(seen, n) != getattr(want, n) for n in ATTRIBUTES):
            mistakes.append(f"{want.prompt} -> {seen.color} {seen.shape} {seen.motion} {seen.background}")
    if sheet is not None:
        _write_sheet(pixels[:24], sheet)
    shares = {name: right[name] / count for name in ATTRIBUTES}
    return {"prompts": count, "all": sum(shares.values()) / len(shares), **shares, "mistakes": mistakes}


def _embed(parts: Parts, texts: list[str]) -> Tensor:
    from tokenizers import Tokenizer

    assert parts.encoder is not None
    tokenizer = Tokenizer.from_file(str(parts.folder / "tokenizer" / "tokenizer.json"))
    tokenizer.enable_padding()
    ids = torch.tensor([e.ids for e in tokenizer.encode_batch(texts)], device=parts.device)
    mask = ids != 0
    hidden: Tensor = parts.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return F.pad(hidden * mask[..., None], (0, 0, 0, 512 - ids.shape[1]))


def _write_sheet(videos: Any, path: Path) -> None:
    """Five frames of each clip, in three columns."""
    import numpy as np
    from PIL import Image

    rows = [np.concatenate([v[t] for t in (0, 8, 16, 24, 32)], axis=1) for v in videos]
    third = -(-len(rows) // 3)
    columns = [np.concatenate(rows[i : i + third], axis=0) for i in range(0, len(rows), third)]
    height = min(c.shape[0] for c in columns)
    Image.fromarray(np.concatenate([c[:height] for c in columns], axis=1)).save(path)
