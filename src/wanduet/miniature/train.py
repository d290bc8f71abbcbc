"""Make the miniature again: `python -m wanduet.miniature.train --out FOLDER`. About ten minutes on one H100.

Two stages, each with a wall-clock budget: the VAE learns to code clips of the world; then the transformer
and the text encoder learn, together, to denoise the coded clips given their prompts. Held-out combinations
(world.held_out_combinations) are never rendered for training.
"""

import argparse
import contextlib
import json
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanduet.miniature import folder as files
from wanduet.miniature.prompts import prompt_of
from wanduet.miniature.sample import encoder_of, evaluate_model, read_model
from wanduet.miniature.training import Trainer
from wanduet.miniature.world import Clips, render, sample_clips
from wanduet.models.transformer import WanTransformer
from wanduet.models.vae import WanVAE
from wanduet.models.vae_layers import CausalConv3d
from wanduet.ops.vae_fused import VAE_TORCH_KERNELS, VAEKernels, causal_input, norm_silu

TEXT_TOKENS = 40  # longest prompt in training, in tokens; longer ones are cut
PROMPT_DROPOUT = 0.12


def train_vae(out: Path, device: str, minutes: float, batch: int, crop: int) -> float:
    """Stage 1: learn to reconstruct clips, first short crops, then whole clips; write vae/. Returns PSNR in dB."""
    torch.manual_seed(0)
    vae = WanVAE(files.VAE_SPEC).to(device).train()
    _initialise(vae)
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
        compiled = torch.compile(norm_silu, dynamic=True)
        CausalConv3d.kernels = VAEKernels("compiled", partial(causal_input, norm_silu=compiled))
    short = _fit_vae(vae, device, 0.55 * minutes, batch, 17, crop, peak_lr=2e-3)
    whole = max(1, batch // 8)
    long = _fit_vae(vae, device, 0.45 * minutes, whole, files.NUM_FRAMES, 2 * crop, peak_lr=1e-3)
    CausalConv3d.kernels = VAE_TORCH_KERNELS
    vae.eval()
    mean, std, psnr = _latent_statistics(vae, device)
    print(f"vae: {short} + {long} steps, reconstruction {psnr:.2f} dB", flush=True)
    files.write_static(out)
    files.write_vae(out, vae, mean, std)
    files.write_json(out / "vae_report.json", {"steps": [short, long], "psnr_db": psnr, "minutes": minutes})
    return psnr


def _fit_vae(vae: WanVAE, device: str, minutes: float, batch: int, frames: int, crop: int, peak_lr: float) -> int:
    """Train on random crops: L1 of pixels and of their differences, a little KL. Returns the steps made."""
    pool = _clip_pool(2048, seed=frames, device=device)
    video = torch.zeros(batch, 3, frames, crop, crop, device=device)

    def loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            mean, log_variance = vae.encode_moments(video).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-20, 10)
            z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            got = vae.decode(z).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        edges = sum(F.l1_loss(got.diff(dim=d), video.diff(dim=d)) for d in (2, 3, 4))
        return F.l1_loss(got, video) + 0.5 * edges + 2e-5 * kl

    trainer = Trainer([vae], loss, peak_lr=peak_lr, decay=0.995, seconds=60 * minutes)
    while trainer.progress < 1:
        video.copy_(_random_crops(pool, batch, frames, crop))
        trainer.step()
        if trainer.steps % 200 == 1:
            print(f"vae step {trainer.steps} {trainer.progress:5.0%} loss {trainer.loss_value():.4f}", flush=True)
        if trainer.steps % 1000 == 0:
            pool = _clip_pool(2048, seed=frames + trainer.steps, device=device)
    trainer.use_averages()
    return trainer.steps


def train_transformer(out: Path, device: str, minutes: float, batch: int, num_clips: int) -> None:
    """Stage 2: flow matching on coded clips; write transformer/ and text_encoder/."""
    torch.manual_seed(1)
    vae = read_model(out, device, only_vae=True).vae
    latents, tokens = _coded_clips(vae, out, device, num_clips)
    transformer = WanTransformer(files.TRANSFORMER_SPEC).to(device).train()
    _initialise(transformer)
    nn.init.zeros_(transformer.proj_out.weight)
    encoder = encoder_of(None, device).train()
    ids = torch.zeros(batch, TEXT_TOKENS, dtype=torch.long, device=device)
    clean = torch.zeros(batch, *latents.shape[1:], device=device)

    rope = transformer.prepare_rope(clean.shape, clean.device)
    if device == "cuda":
        for block in transformer.blocks:
            block.compile()

    def loss() -> Tensor:
        uniform = torch.rand(batch, device=device)
        shift = files.DEFAULTS.flow_shift
        sigma = shift * uniform / (1 + (shift - 1) * uniform)
        noise = torch.randn_like(clean)
        noisy = clean + sigma.view(-1, 1, 1, 1, 1) * (noise - clean)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            embeds = embed(encoder, ids)
            velocity = transformer(noisy, 1000 * sigma, embeds, rope)
        return F.mse_loss(velocity.float(), noise - clean)

    trainer = Trainer([transformer, encoder], loss, peak_lr=1.5e-3, decay=0.999, seconds=60 * minutes)
    empty = _empty_tokens(out, device)
    while trainer.progress < 1:
        chosen = torch.randint(len(latents), (batch,), device=device)
        which = torch.randint(tokens.shape[1], (batch,), device=device)
        clean.copy_(latents[chosen])
        drop = torch.rand(batch, 1, device=device) < PROMPT_DROPOUT
        ids.copy_(torch.where(drop, empty, tokens[chosen, which].long()))
        trainer.step()
        if trainer.steps % 250 == 1:
            seconds = time.perf_counter() - trainer.began
            rate = trainer.steps * batch / seconds
            print(f"step {trainer.steps} {trainer.progress:5.0%} loss {trainer.loss_value():.4f} {rate:.0f}/s", flush=True)
    trainer.use_averages()
    files.write_transformer(out, transformer.eval())
    files.write_text_encoder(out, encoder.eval())
    files.write_json(out / "transformer_report.json", {"steps": trainer.steps, "batch": batch, "minutes": minutes})


def embed(encoder: nn.Module, ids: Tensor) -> Tensor:
    """Token ids `[B, n]` (0 pads) to embeddings `[B, 512, d]`, zero beyond the true tokens, as the engine does."""
    mask = ids != 0
    bias = torch.zeros(ids.shape, device=ids.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    hidden: Tensor = encoder(input_ids=ids, attention_mask=bias[:, None, None]).last_hidden_state
    return F.pad(hidden * mask[..., None], (0, 0, 0, 512 - ids.shape[1]))


def _initialise(module: nn.Module) -> None:
    """Norm gains of one and small output projections are PyTorch's and the modules' own; biases start at zero."""
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)


def _clip_pool(count: int, seed: int, device: str) -> Tensor:
    """Rendered clips `[N, 3, 33, 128, 128]` uint8 on the device, to cut training crops from."""
    if device == "cpu":
        count = 16
    clips = sample_clips(count, torch.Generator().manual_seed(seed)).to(device)
    parts = [_to_uint8(render(clips.select(slice(i, i + 64)))) for i in range(0, count, 64)]
    return torch.cat(parts)


def _to_uint8(video: Tensor) -> Tensor:
    return ((video + 1) * 127.5).round().clamp(0, 255).byte()


def _random_crops(pool: Tensor, batch: int, frames: int, crop: int) -> Tensor:
    device = pool.device
    chosen = torch.randint(len(pool), (batch,), device=device)
    begin = int(torch.randint(pool.shape[2] - frames + 1, ()))
    top, left = (int(torch.randint(pool.shape[3] - crop + 1, ())) for _ in range(2))
    cut = pool[:, :, begin : begin + frames, top : top + crop, left : left + crop][chosen]
    return cut.float() / 127.5 - 1


@torch.no_grad()
def _latent_statistics(vae: WanVAE, device: str) -> tuple[list[float], list[float], float]:
    """Mean and deviation of each latent channel over the world, and PSNR in dB of whole clips."""
    clips = sample_clips(64 if device == "cuda" else 4, torch.Generator().manual_seed(99)).to(device)
    codes, errors = [], []
    for i in range(0, len(clips.scene), 4):
        video = render(clips.select(slice(i, i + 4)))
        z = vae.encode(video)
        errors.append(((vae.decode(z) - video) / 2).square().mean())
        codes.append(z)
    z = torch.cat(codes)
    psnr = -10 * torch.log10(torch.stack(errors).mean())
    return z.mean(dim=(0, 2, 3, 4)).tolist(), z.std(dim=(0, 2, 3, 4)).tolist(), float(psnr)


@torch.no_grad()
def _coded_clips(vae: WanVAE, out: Path, device: str, count: int) -> tuple[Tensor, Tensor]:
    """Latents `[N, 16, 9, 16, 16]` and, for each, token ids `[N, 4, 40]` of four ways to say its prompt."""
    began = time.perf_counter()
    clips: Clips = sample_clips(count, torch.Generator().manual_seed(7))
    autocast = torch.autocast(device, torch.bfloat16) if device == "cuda" else contextlib.nullcontext()
    codes, part = [], 32
    with autocast:
        for i in range(0, count, part):
            codes.append(vae.encode(render(clips.select(slice(i, i + part)).to(device))).float())
    print(f"coded {count} clips in {time.perf_counter() - began:.1f} s", flush=True)
    rng = random.Random(7)
    tokenizer = _tokenizer(out)
    texts = [prompt_of(clips, i, rng, canonical=k == 0) for i in range(count) for k in range(4)]
    ids = [e.ids for e in tokenizer.encode_batch(texts)]
    tokens = torch.tensor(ids, dtype=torch.int16).view(count, 4, TEXT_TOKENS).to(device)
    print(f"coded and tokenised in {time.perf_counter() - began:.1f} s", flush=True)
    return torch.cat(codes).to(torch.bfloat16 if device == "cuda" else torch.float32), tokens


def _tokenizer(out: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    tokenizer.enable_padding(length=TEXT_TOKENS)
    tokenizer.enable_truncation(TEXT_TOKENS)
    return tokenizer


def _empty_tokens(out: Path, device: str) -> Tensor:
    return torch.tensor([_tokenizer(out).encode("").ids], device=device)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=files.FOLDER)
    parser.add_argument("--stage", choices=("all", "vae", "transformer", "evaluate"), default="all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes-vae", type=float, default=3.0)
    parser.add_argument("--minutes-transformer", type=float, default=6.0)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--vae-crop", type=int, default=64)
    parser.add_argument("--require-psnr", type=float, default=0.0, help="stop after the VAE if it is below this, in dB")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--clips", type=int, default=40000)
    parser.add_argument("--evaluate", type=int, default=210, help="unseen prompts to evaluate at the end")
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = True
    if options.stage in ("all", "vae"):
        psnr = train_vae(options.out, options.device, options.minutes_vae, options.vae_batch, options.vae_crop)
        if psnr < options.require_psnr:
            raise SystemExit(f"The VAE reconstructs at {psnr:.1f} dB only; not worth a transformer.")
    if options.stage in ("all", "transformer"):
        train_transformer(options.out, options.device, options.minutes_transformer, options.batch, options.clips)
    if options.evaluate and options.stage != "vae":
        report = evaluate_model(read_model(options.out, options.device), options.evaluate, options.out / "sheet.png")
        print(json.dumps(report, indent=2), flush=True)
        files.write_json(options.out / "evaluation.json", report)


if __name__ == "__main__":
    main()
