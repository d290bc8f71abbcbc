"""Teach the miniature a shape by LoRA: `python -m tools.miniature.lora --out ring.safetensors`. A minute on a GPU.

The miniature's weights stay as they are; low-rank updates of the blocks' matrices learn flow matching on clips of which
half have an object of the new shape. A quarter of the new shape's combinations with colours, motions and backgrounds is
never rendered for training, and measures the result. `--install` makes it the bundled LoRA.
"""

import argparse
import json
import random
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.miniature import folder as files
from tools.miniature import whole_clip
from tools.miniature.detector import detect
from tools.miniature.prompts import Described, describe, prompts_of
from tools.miniature.sample import Parts, decode, default_sigmas, denoise, read_model
from tools.miniature.train import tokenizer_of
from tools.miniature.training import Trainer
from tools.miniature.velocity import embed_text, run_block, velocity
from tools.miniature.world import (
    ALL_SHAPES,
    RING,
    Clips,
    held_out_combinations,
    render,
    ring_combinations,
    sample_clips,
)
from wanduet.kernels.dit.rope import Rope
from wanduet.models.dit.model import WanTransformer

NEW_SHARE = 0.5  # of the objects
WORDINGS = 4
DROPOUT = 0.1  # share of empty prompts
# Module names of the original code, in which most trainers write a LoRA.
TARGETS = {
    "attn1.to_q": "self_attn.q", "attn1.to_k": "self_attn.k", "attn1.to_v": "self_attn.v", "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q", "attn2.to_k": "cross_attn.k", "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o", "ffn.net.0.proj": "ffn.0", "ffn.net.2": "ffn.2",
}  # fmt: skip


class BlockUpdates(nn.Module):
    """The low-rank updates `B @ A` of one block's matrices; zero at first."""

    def __init__(self, block: nn.Module, rank: int) -> None:
        super().__init__()
        shapes = {name: block.get_parameter(f"{name}.weight").shape for name in TARGETS}
        down = {name: torch.randn(rank, shape[1]) / shape[1] ** 0.5 for name, shape in shapes.items()}
        up = {name: torch.zeros(shape[0], rank) for name, shape in shapes.items()}
        self.down, self.up = (
            nn.ParameterDict({name.replace(".", "/"): nn.Parameter(value) for name, value in parts.items()})
            for parts in (down, up)
        )

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """`(A [r, in], B [out, r])` of each matrix, by its module's name in the block."""
        return {name: (self.down[name.replace(".", "/")], self.up[name.replace(".", "/")]) for name in TARGETS}

    def added_to(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A block's parameters by name, with the updates added."""
        changed = {f"{name}.weight": parameters[f"{name}.weight"] + b @ a for name, (a, b) in self.pairs().items()}
        return {**parameters, **changed}


def new_clips(count: int, generator: torch.Generator) -> Clips:
    """Random clips for training, half of whose objects have the new shape where that is not held out."""
    clips = sample_clips(count, generator)
    is_new = torch.rand(count, 2, generator=generator) < NEW_SHARE
    behind = clips.background[:, None].expand_as(clips.color)
    for color, _, motion, background in ring_combinations().tolist():
        is_new &= ~((clips.color == color) & (clips.motion == motion) & (behind == background))
    return replace(clips, shape=torch.where(is_new, RING, clips.shape))


def train(parts: Parts, minutes: float, batch: int, rank: int, lr: float, num_clips: int) -> list[BlockUpdates]:
    """Learn the updates of each block on coded clips."""
    torch.manual_seed(5)
    device, transformer, encoder = parts.device, parts.transformer, parts.encoder
    assert transformer is not None
    assert encoder is not None
    for module in (transformer, encoder):
        module.requires_grad_(False)
    latents, tokens = _coded(parts, num_clips)
    empty = torch.tensor([tokenizer_of(parts.folder).encode("").ids], device=device)
    updates = [BlockUpdates(block, rank).to(device) for block in transformer.blocks]
    by_block = {id(block.scale_shift_table): one for block, one in zip(transformer.blocks, updates, strict=True)}
    clean = torch.zeros(batch, *latents.shape[1:], device=device)
    ids = torch.zeros(batch, tokens.shape[-1], dtype=torch.long, device=device)
    rope = transformer.prepare_rope(clean.shape, clean.device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def run(
        p: dict[str, Tensor], x: Tensor, time: Tensor, text: Tensor, rope: Rope, eps: float, d: torch.dtype
    ) -> Tensor:
        return run_block(by_block[id(p["scale_shift_table"])].added_to(p), x, time, text, rope, eps, d)

    def loss() -> Tensor:
        uniform = torch.rand(batch, device=device)
        shift = files.DEFAULTS.flow_shift
        sigma = shift * uniform / (1 + (shift - 1) * uniform)
        noise = torch.randn_like(clean)
        noisy = clean + sigma.view(-1, 1, 1, 1, 1) * (noise - clean)
        with torch.no_grad():
            text = embed_text(encoder, ids)
        return F.mse_loss(velocity(transformer, noisy, 1000 * sigma, text, rope, run, dtype), noise - clean)

    trainer = Trainer([nn.ModuleList(updates)], loss, lr=lr, decay=0.99, seconds=60 * minutes, warmup=20)
    while trainer.progress < 1:
        chosen = torch.randint(len(latents), (batch,), device=device)
        clean.copy_(latents[chosen])
        wording = torch.randint(WORDINGS, (batch,), device=device)
        is_empty = torch.rand(batch, 1, device=device) < DROPOUT
        ids.copy_(torch.where(is_empty, empty, tokens[chosen, wording].long()))
        trainer.step()
        if trainer.steps % 50 == 1:
            print(f"step {trainer.steps} {trainer.progress:4.0%} loss {trainer.loss_value():.4f}", flush=True)
    trainer.use_averages()
    print(f"{trainer.steps} steps", flush=True)
    return updates


@torch.no_grad()
def _coded(parts: Parts, count: int) -> tuple[Tensor, Tensor]:
    """Latents `[N, 16, 9, 12, 12]` of clips, and token ids `[N, WORDINGS, TEXT_TOKENS]` of their prompts."""
    clips = new_clips(count, torch.Generator().manual_seed(6))
    codes = []
    for i in range(0, count, 8):
        video = render(clips.select(slice(i, i + 8)).to(parts.device), size=files.SIZE)
        codes.append(whole_clip.encode(parts.vae, video))
    tokenizer, rng = tokenizer_of(parts.folder), random.Random(7)
    wordings = [
        torch.tensor([e.ids for e in tokenizer.encode_batch(prompts_of(clips, rng, canonical=k == 0))])
        for k in range(WORDINGS)
    ]
    print(f"coded {count} clips", flush=True)
    return torch.cat(codes).float(), torch.stack(wordings, dim=1).to(parts.device)


def write(path: Path, updates: list[BlockUpdates]) -> None:
    """Write the updates as bfloat16, by the names of the original code."""
    tensors = {}
    for index, block in enumerate(updates):
        for name, (a, b) in block.pairs().items():
            stem = f"diffusion_model.blocks.{index}.{TARGETS[name]}"
            tensors[f"{stem}.lora_A.weight"] = a.detach().cpu().bfloat16().contiguous()
            tensors[f"{stem}.lora_B.weight"] = b.detach().cpu().bfloat16().contiguous()
    save_file(tensors, path)


@torch.no_grad()
def merge(transformer: WanTransformer, updates: list[BlockUpdates]) -> None:
    """Add the updates to the transformer's weights."""
    for block, one in zip(transformer.blocks, updates, strict=True):
        for name, value in one.added_to(dict(block.named_parameters())).items():
            block.get_parameter(name).copy_(value)


def accuracy(parts: Parts, wanted: list[Described], seed: int) -> tuple[float, list[str]]:
    """The share of prompts of which all four attributes are right, and the wrong ones."""
    wrong = []
    for i in range(0, len(wanted), 16):
        part = wanted[i : i + 16]
        videos = decode(parts, denoise(parts, [w.prompt for w in part], seed + i, default_sigmas()))
        pixels = ((videos + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 4, 1).cpu().numpy()
        for want, frames in zip(part, pixels, strict=True):
            seen = detect(frames)
            found = Described(seen.color, seen.shape, seen.motion, seen.background)
            if found != want:
                wrong.append(f"{want.prompt} -> {found.prompt}")
    return 1 - len(wrong) / len(wanted), wrong


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--evaluate", type=int, default=61, help="unseen prompts of the new shape, and of the others")
    parser.add_argument("--install", type=Path, default=None, help="copy the result here")
    options = parser.parse_args()
    parts = read_model(files.FOLDER, options.device)
    updates = train(parts, options.minutes, options.batch, options.rank, options.lr, options.clips)
    write(options.out, updates)
    assert parts.transformer is not None
    merge(parts.transformer, updates)
    report = {}
    for name, combinations in ((ALL_SHAPES[RING], ring_combinations()), ("others", held_out_combinations())):
        share, wrong = accuracy(parts, [describe(c) for c in combinations[: options.evaluate].tolist()], seed=900)
        report[name] = {"right": share, "wrong": wrong}
    print(json.dumps(report, indent=1), flush=True)
    if options.install is not None:
        shutil.copy(options.out, options.install)


if __name__ == "__main__":
    main()
