"""The Wan2.1 denoising transformer, written for one device.

Parameter names are those of a Diffusers checkpoint (`WanTransformer3DModel`). What runs between the
matrix products (`kernels`), how attention is computed (`attention`) and how a sequence is spread over
devices (`sharding`) are given to the model; it does not know which ones it has.

Precision, as in the official code: the residual stream, norms, modulation, gates, time embedding, patch
embedding and head are float32; the large matrix products run in the dtype of their weights.

Letters in names: B batch, L tokens on this device, C width, H heads, D channels a head.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanduet.distributed.sequence.sharding import NoSharding, Sharding
from wanduet.family.specs import TransformerSpec
from wanduet.kernels.attention.backends import AttentionFn, sdpa
from wanduet.kernels.dit.plain import TORCH_KERNELS, Kernels
from wanduet.kernels.dit.rope import Rope, rope_for_grid
from wanduet.kernels.precision import EXACT, PRODUCTS
from wanduet.kernels.views import side_by_side
from wanduet.models.dit.embeddings import ConditionEmbedder, PatchGrid
from wanduet.models.dit.workspace import Workspace


@dataclass(frozen=True, slots=True)
class TextContext:
    """A prompt as every block's cross-attention sees it: keys and values `[B, S, H, D]`, S at most text_len.

    The text does not change during a denoise, so this is computed once a prompt. All of a prompt's padding has the
    same key and value; they are kept once, as the last, which counts `repeats` times.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class Modulation:
    """One block's shifts, scales and gates `[B, C]` float32, for self-attention and feed-forward."""

    attn_weight: Tensor
    attn_bias: Tensor
    attn_gate: Tensor
    ffn_weight: Tensor
    ffn_bias: Tensor
    ffn_gate: Tensor


@dataclass(frozen=True, slots=True)
class Runtime:
    """How blocks run here: fused kernels, self-attention, sharding, and whether several prompts share the first
    block's self-attention, which must then be kept from one to the next."""

    kernels: Kernels = TORCH_KERNELS
    attention: AttentionFn = sdpa
    sharding: Sharding = field(default_factory=NoSharding)
    share_first: bool = True


@dataclass(slots=True)
class Residual:
    """What goes from block to block: the residual stream `x` `[B, L, C]` float32, and beside it `branch`, in the
    compute dtype: the modulated norm of x, then the self-attention of it, which will be added to x.

    Whoever needs the branch last takes it. So its memory is free for the attention's result, which is as large.
    """

    x: Tensor
    branch: Tensor | None = None

    def take(self) -> Tensor:
        """The branch, which the stream then holds no longer."""
        branch, self.branch = self.branch, None
        assert branch is not None
        return branch


class Attention(nn.Module):
    """Multi-head attention with RMSNorm over all channels of q and k."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(dim, dim))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=eps) for _ in range(2))

    def project_qkv(self, n_BLC: Tensor, run: Runtime, scratch: Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, L, C]`, before norms; one product where the weights are packed."""
        parts = (self.to_q, self.to_k, self.to_v)
        weight = side_by_side(*(part.weight for part in parts))
        bias = side_by_side(*(part.bias for part in parts))
        if weight is None or bias is None or torch.is_grad_enabled():
            q, k, v = (_project(n_BLC, part, out, run) for part, out in zip(parts, scratch.thirds(), strict=True))
        else:
            q, k, v = run.kernels.linear(n_BLC, weight, bias, scratch.whole).chunk(3, dim=-1)
        return q, k, v

    def attend_self(self, stream: Residual, rope: Rope, run: Runtime, scratch: Workspace, first: bool) -> Tensor:
        """Self-attention's heads `[B, L, C]`, before the output projection. Takes the stream's branch. `first`: of the
        first block."""
        if run.sharding.sends_ahead:
            q_BLHD, k_BLHD, v_BLHD = self.send_qkv(stream.take(), rope, run, scratch)
        else:
            q, k, v = self.project_qkv(stream.take(), run, scratch)
            q_BLHD, k_BLHD = run.kernels.qk_norm_rope_pair(
                q, k, self.norm_q.weight, self.norm_k.weight, self.eps, self.num_heads, rope
            )
            v_BLHD = v.unflatten(-1, (self.num_heads, -1))
        attend = run.sharding.attend_first if first else run.sharding.attend
        return attend(q_BLHD, k_BLHD, v_BLHD, run.attention).flatten(2)

    def send_qkv(self, n_BLC: Tensor, rope: Rope, run: Runtime, scratch: Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, L, H, D]` after norms and rotation, each sent to other devices before the next is computed."""
        found: dict[int, Tensor] = {}
        for index, linear, norm in ((2, self.to_v, None), (1, self.to_k, self.norm_k), (0, self.to_q, self.norm_q)):
            room = run.sharding.room(index, n_BLC)
            x = _project(n_BLC, linear, scratch.thirds()[index] if room is None else room, run)
            if norm is None:
                found[index] = x.unflatten(-1, (self.num_heads, -1))
            else:
                found[index] = run.kernels.qk_norm_rope(x, norm.weight, self.eps, self.num_heads, rope)
            run.sharding.send(index, found[index])
        return found[0], found[1], found[2]

    def attend_text(
        self, n_BLC: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, repeats: int, run: Runtime, scratch: Workspace
    ) -> Tensor:
        """Cross-attention's heads `[B, L, C]`, before the output projection."""
        q = _project(n_BLC, self.to_q, scratch.part(n_BLC, n_BLC.shape[2]), run)
        return run.kernels.text_attention(q, self.norm_q.weight, self.eps, k_BSHD, v_BSHD, repeats)

    def project_text(self, text_BSC: Tensor, run: Runtime) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, S, H, D]` of a projected prompt `[B, S, C]`."""
        k = run.kernels.qk_norm_rope(self.to_k(text_BSC), self.norm_k.weight, self.eps, self.num_heads, None)
        return k, self.to_v(text_BSC).unflatten(-1, (self.num_heads, -1))

    def project_out(self, heads_BLC: Tensor, out_BLC: Tensor | None, run: Runtime) -> Tensor:
        """The output projection; without gradients in `out_BLC`, if it is given."""
        return _project(heads_BLC, cast(nn.Linear, self.to_out[0]), out_BLC, run)


class _Up(nn.Module):
    """Holds the widening projection under the name it has in a Diffusers checkpoint."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)


class FeedForward(nn.Module):
    """`Linear → GELU (tanh) → Linear`; parameter names `net.0.proj` and `net.2` as in Diffusers."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(_Up(dim, ffn_dim), nn.Identity(), nn.Linear(ffn_dim, dim))

    def forward(self, n_BLC: Tensor, run: Runtime, scratch: Workspace) -> Tensor:
        """`[B, L, C]` to `[B, L, C]`; without gradients in place."""
        up, down = cast(_Up, self.net[0]).proj, cast(nn.Linear, self.net[2])
        hidden = run.kernels.linear_gelu(n_BLC, up.weight, up.bias, scratch.part(n_BLC, up.out_features))
        return _project(hidden, down, n_BLC, run)


def _modulation(rows: int, dim: int) -> nn.Parameter:
    """A table `[1, rows, dim]` of shifts, scales and gates, drawn as Wan2.1's are."""
    table = nn.Parameter(torch.empty(1, rows, dim))
    nn.init.normal_(table, std=dim**-0.5)
    return table


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        dim, self.eps = spec.dim, spec.eps
        self.attn1 = Attention(dim, spec.num_attention_heads, spec.eps)
        self.attn2 = Attention(dim, spec.num_attention_heads, spec.eps)
        self.norm2 = nn.LayerNorm(dim, spec.eps)
        self.ffn = FeedForward(dim, spec.ffn_dim)
        self.scale_shift_table = _modulation(6, dim)

    def modulation(self, time_B6C: Tensor) -> Modulation:
        """Shifts, scales and gates of this block for the projected timestep `[B, 6, C]` float32."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table.float() + time_B6C).unbind(1)
        return Modulation(1 + scale, shift, gate, 1 + ffn_scale, ffn_shift, ffn_gate)

    def attend(self, stream: Residual, rope: Rope, run: Runtime, scratch: Workspace, first: bool) -> None:
        """Self-attention, in the stream's branch: all of a block that does not depend on the text."""
        heads_BLC = self.attn1.attend_self(stream, rope, run, scratch, first)
        stream.branch = self.attn1.project_out(heads_BLC, scratch.part(heads_BLC, heads_BLC.shape[2]), run)

    def forward(
        self,
        stream: Residual,
        mod: Modulation,
        next_norm: tuple[Tensor, Tensor],
        text: tuple[Tensor, Tensor, int],
        run: Runtime,
        scratch: Workspace,
    ) -> None:
        """Bring the stream from this block's self-attention to the next block's norm.

        That norm is by `next_norm` (weight, bias `[B, C]`): each residual addition is fused with the norm that
        follows it, also across blocks.
        """
        residual_norm, eps = run.kernels.residual_norm, self.eps
        norm2 = (self.norm2.weight[None], self.norm2.bias[None])
        attended = stream.take()
        n_BLC = None if torch.is_grad_enabled() else torch.empty_like(attended)
        x_BLC, n_BLC = residual_norm(stream.x, attended, mod.attn_gate, *norm2, eps, n_BLC)
        heads_BLC = self.attn2.attend_text(n_BLC, *text, run, scratch)
        y_BLC = self.attn2.project_out(heads_BLC, n_BLC, run)
        x_BLC, n_BLC = residual_norm(x_BLC, y_BLC, None, mod.ffn_weight, mod.ffn_bias, eps, None)
        if torch.is_grad_enabled():
            y_BLC = self.ffn(n_BLC, run, scratch)
            stream.x, stream.branch = residual_norm(x_BLC, y_BLC, mod.ffn_gate, *next_norm, eps, None)
            return
        chunk = scratch.rows(cast(_Up, self.ffn.net[0]).proj.out_features)
        for start in range(0, x_BLC.shape[1], chunk):
            rows = slice(start, start + chunk)
            residual_norm(x_BLC[:, rows], self.ffn(n_BLC[:, rows], run, scratch), mod.ffn_gate, *next_norm, eps, None)
        stream.x, stream.branch = x_BLC, n_BLC


class WanTransformer(nn.Module):
    """Predicts the velocity (noise - video) of latents at a timestep, given a prompt's embeddings.

    `runtime` and `fetch_blocks` may be replaced after construction: passes in `accelerate/` do.
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.spec = spec
        dim = spec.dim
        self.patch_embedding = nn.Conv3d(spec.in_channels, dim, spec.patch_size, spec.patch_size)
        self.condition_embedder = ConditionEmbedder(spec)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        patch_volume = spec.patch_size[0] * spec.patch_size[1] * spec.patch_size[2]
        self.proj_out = nn.Linear(dim, spec.out_channels * patch_volume)
        self.scale_shift_table = _modulation(2, dim)
        self.runtime = Runtime()

    @staticmethod
    def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype a parameter is held in when the model computes in `dtype`: float32 outside the blocks'
        large products (official code: amp.autocast(float32) around time MLP, modulation, head)."""
        large = ".to_" in name or ".ffn." in name or "text_embedder" in name
        return dtype if large else torch.float32

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the large matrix products."""
        return next(iter(self._blocks())).attn1.to_q.weight.dtype

    def _blocks(self) -> Iterable[Block]:
        return (cast(Block, block) for block in self.blocks)

    def fetch_blocks(self) -> Iterable[Block]:
        """The blocks in order, each ready on the device when it is yielded (see accelerate/offload.py)."""
        return self._blocks()

    @PRODUCTS.at(EXACT)
    def prepare_text(self, prompt_embeds: Tensor) -> TextContext:
        """Keys and values of all blocks for `[B, text_len, text_dim]` zero-padded embeddings."""
        true_tokens = prompt_embeds.ne(0).any(dim=-1).any(dim=0).nonzero()
        kept = min(int(true_tokens[-1]) + 1 if len(true_tokens) else 0, prompt_embeds.shape[1] - 1) + 1
        text = self.condition_embedder.embed_text(prompt_embeds[:, :kept].to(self.compute_dtype))
        pairs = [block.attn2.project_text(text, self.runtime) for block in self.fetch_blocks()]
        repeats = prompt_embeds.shape[1] - kept + 1
        return TextContext(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), repeats)

    def prepare_rope(self, latent_shape: tuple[int, ...], device: torch.device) -> Rope:
        """Rotation angles of this device's tokens for latents `[..., frames, rows, columns]`."""
        grid = PatchGrid.of(latent_shape, self.spec.patch_size)
        rope = rope_for_grid(grid.tokens, self.spec.attention_head_dim, device)
        shard = self.runtime.sharding.shard_sequence
        return Rope(shard(rope.cos, 0), shard(rope.sin, 0))

    def forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor | TextContext, rope: Rope | None = None
    ) -> Tensor:
        """Velocity `[B, 16, T, h, w]` float32 for latents of that shape.

        `timestep` `[B]` in 0..1000; `text` embeddings or what `prepare_text` made of them; `rope` from
        `prepare_rope`, computed here if it is left out.
        """
        if isinstance(text, Tensor):
            text = self.prepare_text(text)
        if rope is None:
            rope = self.prepare_rope(latents.shape, latents.device)
        return self.forward_cfg(latents, timestep, (text,), rope)[0]

    @PRODUCTS.at(EXACT)
    def forward_cfg(self, latents: Tensor, timestep: Tensor, texts: Sequence[TextContext], rope: Rope) -> list[Tensor]:
        """A velocity for each of several prompts: bit for bit those of `forward`, one after the other, but the first
        block's self-attention, which comes before any text is seen, is computed once."""
        velocities: list[Tensor] = []
        # What stays is allocated before what comes and goes, which then fits the same holes with each prompt.
        grid = PatchGrid.of(latents.shape, self.spec.patch_size)
        outs: list[Tensor | None] = [None] * len(texts)
        if not torch.is_grad_enabled():
            shape = (latents.shape[0], self.spec.out_channels, *latents.shape[2:])
            outs = [torch.empty(shape, dtype=torch.float32, device=latents.device) for _ in texts]
        scratch = kept = None
        for text, out in zip(texts, outs, strict=True):
            x_BLC, time_BC, time_B6C = self.embed(latents, timestep)
            scratch = scratch or Workspace.allocate_for(x_BLC, self.compute_dtype)
            stream, kept = Residual(x_BLC, kept), None
            del x_BLC
            keep = self.runtime.share_first and text is not texts[-1]
            n_BLC, kept = self.run_blocks(stream, time_BC, time_B6C, text, rope, scratch, keep=keep)
            del stream  # its memory is the next one's
            velocities.append(self.head(n_BLC, grid, out))
            del n_BLC
        return velocities

    def embed(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches of this device as tokens `[B, L, C]`, and the timestep `[B, C]` and `[B, 6, C]`; float32."""
        patches = PatchGrid.of(latents.shape, self.spec.patch_size).patchify(latents.float())
        patches = self.runtime.sharding.shard_sequence(patches, 1)
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        x_BLC = F.linear(patches, weight.flatten(1).float(), None if bias is None else bias.float())
        time_BC, time_B6C = self.condition_embedder.embed_time(timestep)
        return x_BLC, time_BC, time_B6C

    def run_blocks(
        self,
        stream: Residual,
        time_BC: Tensor,
        time_B6C: Tensor,
        text: TextContext,
        rope: Rope,
        scratch: Workspace,
        *,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """All blocks; returns the head's modulated norm `[B, L, C]` of the result. Overwrites the stream.

        The first block's self-attention may be in the stream already. With `keep` a copy of it is returned too, for
        the same latents with another text.
        """
        modulations = [block.modulation(time_B6C) for block in self._blocks()]
        norms = [(mod.attn_weight, mod.attn_bias) for mod in modulations]
        shift, scale = (self.scale_shift_table.float() + time_BC[:, None]).unbind(1)
        norms.append((1 + scale, shift))
        run, like, kind = self.runtime, stream.x, self.compute_dtype
        kept = torch.empty_like(like, dtype=kind) if keep else None
        attended = stream.branch is not None
        if not attended:
            stream.branch = run.kernels.norm(stream.x, *norms[0], self.spec.eps, kind)
        for index, block in enumerate(self.fetch_blocks()):
            if index > 0 or not attended:
                block.attend(stream, rope, run, scratch, first=index == 0)
            if index == 0 and kept is not None and stream.branch is not None:
                kept.copy_(stream.branch)
            keys_values = (text.keys[index], text.values[index], text.repeats)
            block(stream, modulations[index], norms[index + 1], keys_values, run, scratch)
        return stream.take(), kept

    def head(self, n_BLC: Tensor, grid: PatchGrid, out: Tensor | None) -> Tensor:
        """Velocity `[B, 16, T, h, w]` float32 from the normed tokens of this device; in `out`, if it is given."""
        bias = self.proj_out.bias
        weight = self.proj_out.weight.to(n_BLC.dtype)
        patches = F.linear(n_BLC, weight, bias.to(n_BLC.dtype)).float()
        patches = self.runtime.sharding.gather_sequence(patches, 1)
        return grid.unpatchify(patches, self.spec.out_channels, out)


def _project(x: Tensor, linear: nn.Linear, out: Tensor | None, run: Runtime) -> Tensor:
    return run.kernels.linear(x, linear.weight, linear.bias, out)
