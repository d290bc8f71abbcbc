"""Make the miniature again: `python -m tools.miniature.train --out FOLDER`. About ten minutes on one H100.

Two stages, each with a wall-clock budget: first the VAE is trained on clips of the world, then the transformer together
with the text encoder on the clips' latents and prompts. Held-out combinations (world.held_out_combinations) are never
rendered for training.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.miniature import folder as files
from tools.miniature import whole_clip
from tools.miniature.prompts import prompts_of
from tools.miniature.sample import encoder_of, evaluate_model, read_model
from tools.miniature.training import Trainer
from tools.miniature.velocity import TEXT_TOKENS, embed_text, run_block, velocity
from tools.miniature.world import render, sample_clips
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE

PROMPT_DROPOUT = 0.1
WORDINGS = 6  # ways to say a clip's prompt that training chooses from; the first is the canonical one
POOL_CLIPS = 1024
# The posterior's initial log-variance: a deviation of 0.1, so that the decoder sees little noise at first.
START_LOG_VARIANCE = -4.6
KL_WEIGHT = 1e-5
CROPS_SHARE = 0.6  # of the VAE's time; a crop is an eighth of a clip, so there are more steps


def train_vae(out: Path, device: str, minutes: float, batch: int, lr: float, go_on: bool = False) -> float:
    """Stage 1: learn to reconstruct, first short crops, then whole clips; write vae/. Returns PSNR in dB.

    `go_on`: from the VAE that is there; its latents' statistics are measured anew.
    """
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    if device == "cuda":
        whole_clip.compile_norm()
    vae = WanVAE(files.VAE_SPEC).to(device).train()
    if go_on:
        vae.load_state_dict(files.read_tensors(out / "vae" / "diffusion_pytorch_model.safetensors"))
    else:
        with torch.no_grad():
            bias = vae.quant_conv.bias
            assert bias is not None
            bias.zero_()[files.VAE_SPEC.z_dim :] = START_LOG_VARIANCE
    steps = [
        _fit_vae(vae, device, CROPS_SHARE * minutes, batch, 17, files.SIZE // 2, lr),
        _fit_vae(vae, device, (1 - CROPS_SHARE) * minutes, max(1, batch // 4), files.NUM_FRAMES, files.SIZE, lr / 2),
    ]
    mean, std, psnr = _latent_statistics(vae.eval(), device)
    print(f"vae: {steps} steps, reconstruction {psnr:.2f} dB", flush=True)
    files.write_static(out)
    files.write_vae(out, vae, mean, std)
    report = {"steps": steps, "batch": batch, "lr": lr, "psnr_db": psnr, "minutes": minutes}
    files.write_json(out / "vae_report.json", report)
    return psnr


def _fit_vae(vae: WanVAE, device: str, minutes: float, batch: int, frames: int, crop: int, lr: float) -> int:
    """L1 of pixels and of their differences, a little KL, on random crops. Returns the steps made."""
    pool = _clip_pool(seed=frames, device=device)
    video = torch.zeros(batch, 3, frames, crop, crop, device=device)
    error = torch.zeros((), device=device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def loss() -> Tensor:
        mean, log_variance = whole_clip.encode_moments(vae, video.to(dtype)).float().chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 10)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        got = whole_clip.decode_raw(vae, z.to(dtype)).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        edges = sum(F.l1_loss(got.diff(dim=d), video.diff(dim=d)) for d in (2, 3, 4))
        squared = F.mse_loss(got, video)
        error.copy_(squared.detach())
        return F.l1_loss(got, video) + 0.5 * edges + squared + KL_WEIGHT * kl

    matrices = [p for p in vae.parameters() if p.ndim >= 4 and min(p.shape[:2]) >= 16]
    trainer = Trainer([vae], loss, lr=lr, decay=0.995, seconds=60 * minutes, matrices=matrices)
    while trainer.progress < 1:
        video.copy_(_random_crops(pool, batch, frames, crop))
        trainer.step()
        if trainer.steps % 400 == 1:
            quality = -10 * math.log10(float(error) / 4 + 1e-9)
            value = trainer.loss_value()
            print(f"vae step {trainer.steps} {trainer.progress:4.0%} loss {value:.4f} {quality:.1f} dB", flush=True)
        if trainer.steps % 2000 == 0:
            pool = _clip_pool(seed=frames + trainer.steps, device=device)
    trainer.use_averages()
    return trainer.steps


def train_transformer(
    out: Path, device: str, minutes: float, batch: int, lr: float, num_clips: int, go_on: bool = False
) -> None:
    """Stage 2: flow matching on coded clips; write transformer/ and text_encoder/. `go_on`: from what is there."""
    torch.manual_seed(2 if go_on else 1)
    parts = read_model(out, device, only_vae=True)
    latents, tokens = _coded_clips(parts.vae, out, device, num_clips)
    if go_on:
        parts = read_model(out, device)
        assert parts.transformer is not None
        assert parts.encoder is not None
        transformer, encoder = parts.transformer.train(), parts.encoder.train()
    else:
        transformer, encoder = (
            WanTransformer(files.TRANSFORMER_SPEC).to(device).train(),
            encoder_of(None, device).train(),
        )
        nn.init.zeros_(transformer.proj_out.weight)
    ids = torch.zeros(batch, TEXT_TOKENS, dtype=torch.long, device=device)
    clean = torch.zeros(batch, *latents.shape[1:], device=device)
    rope = transformer.prepare_rope(clean.shape, clean.device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    block = torch.compile(run_block) if device == "cuda" else run_block

    def loss() -> Tensor:
        uniform = torch.rand(batch, device=device)
        shift = files.DEFAULTS.flow_shift
        sigma = shift * uniform / (1 + (shift - 1) * uniform)
        noise = torch.randn_like(clean)
        noisy = clean + sigma.view(-1, 1, 1, 1, 1) * (noise - clean)
        got = velocity(transformer, noisy, 1000 * sigma, embed_text(encoder, ids), rope, block, dtype)
        return F.mse_loss(got, noise - clean)

    # Muon for the blocks' matrices; embeddings, norms, tables and the head are AdamW's.
    matrices = [p for m in _blocks(transformer, encoder) for p in m.parameters() if is_matrix(p)]
    trainer = Trainer([transformer, encoder], loss, lr=lr, decay=0.999, seconds=60 * minutes, matrices=matrices)
    empty = _empty_tokens(out, device)
    while trainer.progress < 1:
        chosen = torch.randint(len(latents), (batch,), device=device)
        which = torch.randint(tokens.shape[1], (batch,), device=device)
        clean.copy_(latents[chosen])
        drop = torch.rand(batch, 1, device=device) < PROMPT_DROPOUT
        ids.copy_(torch.where(drop, empty, tokens[chosen, which].long()))
        trainer.step()
        if trainer.steps % 500 == 1:
            rate = trainer.steps * batch / (time.perf_counter() - trainer.began)
            value = trainer.loss_value()
            print(f"step {trainer.steps} {trainer.progress:4.0%} loss {value:.4f} {rate:.0f}/s", flush=True)
    trainer.use_averages()
    files.write_transformer(out, transformer.eval())
    files.write_text_encoder(out, encoder.eval())
    report = {"steps": trainer.steps, "batch": batch, "lr": lr, "clips": num_clips, "minutes": minutes}
    files.write_json(out / "transformer_report.json", report)


def _blocks(transformer: WanTransformer, encoder: nn.Module) -> list[nn.Module]:
    return [transformer.blocks, encoder.get_submodule("encoder.block")]


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether Muon updates a parameter of a block."""
    return parameter.ndim == 2 and min(parameter.shape) >= 32


def _clip_pool(seed: int, device: str) -> Tensor:
    """Rendered clips `[N, 3, 33, 96, 96]` uint8 on the device."""
    count = POOL_CLIPS if device == "cuda" else 16
    clips = sample_clips(count, torch.Generator().manual_seed(seed)).to(device)
    parts = [_to_uint8(render(clips.select(slice(i, i + 64)), size=files.SIZE)) for i in range(0, count, 64)]
    return torch.cat(parts)


def _to_uint8(video: Tensor) -> Tensor:
    return ((video + 1) * 127.5).round().clamp(0, 255).byte()


def _to_float(video: Tensor) -> Tensor:
    return video.float() / 127.5 - 1


def _random_crops(pool: Tensor, batch: int, frames: int, crop: int) -> Tensor:
    """`[batch, 3, frames, crop, crop]` in [-1, 1], cut at one random place from random clips."""
    chosen = torch.randint(len(pool), (batch,), device=pool.device)
    begin = int(torch.randint(pool.shape[2] - frames + 1, ()))
    top, left = (int(torch.randint(pool.shape[3] - crop + 1, ())) for _ in range(2))
    return _to_float(pool[:, :, begin : begin + frames, top : top + crop, left : left + crop][chosen])


@torch.no_grad()
def _latent_statistics(vae: WanVAE, device: str) -> tuple[list[float], list[float], float]:
    """Mean and deviation of each latent channel over the world, and PSNR in dB of whole clips, step by step."""
    clips = sample_clips(64 if device == "cuda" else 4, torch.Generator().manual_seed(99)).to(device)
    codes, errors = [], []
    for i in range(0, len(clips.scene), 16):
        video = render(clips.select(slice(i, i + 16)), size=files.SIZE)
        z = vae.encode(video)
        errors.append(((vae.decode(z) - video) / 2).square().mean())
        codes.append(z)
    z = torch.cat(codes)
    psnr = -10 * torch.log10(torch.stack(errors).mean())
    return z.mean(dim=(0, 2, 3, 4)).tolist(), z.std(dim=(0, 2, 3, 4)).tolist(), float(psnr)


@torch.no_grad()
def _coded_clips(vae: WanVAE, out: Path, device: str, count: int) -> tuple[Tensor, Tensor]:
    """Latents `[N, 16, 9, 12, 12]` and, for each, token ids `[N, WORDINGS, TEXT_TOKENS]` of its prompt's wordings."""
    began = time.perf_counter()
    clips = sample_clips(count, torch.Generator().manual_seed(torch.initial_seed()))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    codes, part = [], 32
    for i in range(0, count, part):
        video = render(clips.select(slice(i, i + part)).to(device), size=files.SIZE).to(dtype)
        codes.append(whole_clip.encode(vae, video).to(dtype))
    print(f"coded {count} clips in {time.perf_counter() - began:.1f} s", flush=True)
    rng = random.Random(torch.initial_seed())
    tokenizer = tokenizer_of(out)
    wordings = []
    for k in range(WORDINGS):
        ids = [e.ids for e in tokenizer.encode_batch(prompts_of(clips, rng, canonical=k == 0))]
        wordings.append(torch.tensor(ids, dtype=torch.int16))
    print(f"coded and tokenised in {time.perf_counter() - began:.1f} s", flush=True)
    return torch.cat(codes), torch.stack(wordings, dim=1).to(device)


def tokenizer_of(out: Path) -> Any:
    """The tokenizer of a folder, which makes TEXT_TOKENS ids of every text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    tokenizer.enable_padding(length=TEXT_TOKENS)
    tokenizer.enable_truncation(TEXT_TOKENS)
    return tokenizer


def _empty_tokens(out: Path, device: str) -> Tensor:
    return torch.tensor([tokenizer_of(out).encode("").ids], device=device)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=files.FOLDER)
    parser.add_argument("--stage", choices=("all", "vae", "transformer", "evaluate"), default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes-vae", type=float, default=1.7)
    parser.add_argument("--minutes-transformer", type=float, default=4.1)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--vae-lr", type=float, default=8e-3)
    parser.add_argument("--require-psnr", type=float, default=0.0, help="stop after the VAE if it is below this, in dB")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--clips", type=int, default=24000)
    parser.add_argument("--go-on", action="store_true", help="train the models that are there further")
    parser.add_argument("--evaluate", type=int, default=210, help="unseen prompts to evaluate at the end")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    if options.stage in ("all", "vae"):
        budget = (options.minutes_vae, options.vae_batch, options.vae_lr)
        psnr = train_vae(options.out, options.device, *budget, go_on=options.go_on)
        if psnr < options.require_psnr:
            raise SystemExit(f"The VAE reconstructs at {psnr:.1f} dB only; not worth a transformer.")
    if options.stage in ("all", "transformer"):
        schedule = (options.minutes_transformer, options.batch, options.lr, options.clips)
        train_transformer(options.out, options.device, *schedule, go_on=options.go_on)
    if options.evaluate and options.stage != "vae":
        report = evaluate_model(read_model(options.out, options.device), options.evaluate, options.out / "sheet.png")
        print(json.dumps(report | {"mistakes": report["mistakes"][:30]}, indent=1), flush=True)
        files.write_json(options.out / "evaluation.json", report)


if __name__ == "__main__":
    main()
