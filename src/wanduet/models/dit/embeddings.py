"""Embeddings of the transformer's inputs: patches of latents, the timestep, the text."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanduet.family.spec import TransformerSpec


@dataclass(frozen=True, slots=True)
class PatchGrid:
    """How latents `[B, C, T, h, w]` are divided into tokens, frame by frame, row by row.

    `tokens`: frames, rows and columns of tokens. `patch`: a token's latent frames, rows and columns.
    """

    tokens: tuple[int, int, int]
    patch: tuple[int, int, int]

    @classmethod
    def of(cls, latent_shape: tuple[int, ...], patch: tuple[int, int, int]) -> "PatchGrid":
        """The grid of latents `(..., frames, rows, columns)`. Raises ValueError if `patch` does not divide it."""
        sizes = latent_shape[-3:]
        if any(size % p for size, p in zip(sizes, patch, strict=True)):
            raise ValueError(f"Latents of shape {tuple(latent_shape)} cannot be cut into patches of {patch}.")
        frames, rows, columns = (size // p for size, p in zip(sizes, patch, strict=True))
        return cls((frames, rows, columns), patch)

    def patchify(self, latents: Tensor) -> Tensor:
        """`[B, C, T, h, w]` to `[B, L, C * patch volume]`, channels outermost (a strided Conv3d's order)."""
        (f, h, w), (pt, ph, pw) = self.tokens, self.patch
        batch, channels = latents.shape[:2]
        x = latents.reshape(batch, channels, f, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
        return x.reshape(batch, f * h * w, channels * pt * ph * pw)

    def unpatchify(self, patches: Tensor, channels: int, out: Tensor | None = None) -> Tensor:
        """`[B, L, patch volume * C]`, channels innermost (the head's order), to `[B, C, T, h, w]`; in `out`, if any."""
        (f, h, w), (pt, ph, pw) = self.tokens, self.patch
        x = patches.reshape(-1, f, h, w, pt, ph, pw, channels).permute(0, 7, 1, 4, 2, 5, 3, 6)
        if out is None:
            return x.reshape(-1, channels, f * pt, h * ph, w * pw)
        out.view(x.shape).copy_(x)
        return out


class MLP(nn.Module):
    """`linear_1 → activation → linear_2`, with Diffusers' parameter names; `activation` "silu" or "gelu"."""

    def __init__(self, in_dim: int, dim: int, activation: str) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(in_dim, dim), nn.Linear(dim, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_dim]` to `[..., dim]`."""
        hidden = self.linear_1(x)
        hidden = F.silu(hidden) if self.activation == "silu" else F.gelu(hidden, approximate="tanh")
        out: Tensor = self.linear_2(hidden)
        return out


class ConditionEmbedder(nn.Module):
    """Embeds the timestep and the text."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.freq_dim = spec.freq_dim
        self.time_embedder = MLP(spec.freq_dim, spec.dim, "silu")
        self.time_proj = nn.Linear(spec.dim, 6 * spec.dim)
        self.text_embedder = MLP(spec.text_dim, spec.dim, "gelu")

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps `[B]` in 0..1000 to their embedding `[B, C]` and its six modulations `[B, 6, C]`, float32."""
        weight = self.time_embedder.linear_1.weight
        time_BC: Tensor = self.time_embedder(sinusoid(timestep, self.freq_dim).to(weight.dtype))
        return time_BC.float(), self.time_proj(F.silu(time_BC)).float().unflatten(1, (6, -1))

    def embed_text(self, prompt_embeds: Tensor) -> Tensor:
        """Project text embeddings `[B, text_len, text_dim]`, including the padding's zeros, to `[B, text_len, C]`."""
        text: Tensor = self.text_embedder(prompt_embeds)
        return text


def sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """Cosines, then sines, of timesteps `[B]` at `dim / 2` frequencies: `[B, dim]` float32, computed in float64.

    Source: Wan2.1 wan/modules/model.py, `sinusoidal_embedding_1d`.
    """
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float64, device=timestep.device) * (-math.log(10_000) / half)
    )
    angles = timestep.double()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()
