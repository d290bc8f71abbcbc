"""The Wan2.1 denoising transformer, written for one device.

Parameter names are those of a Diffusers checkpoint (`WanTransformer3DModel`). The operations between the matrix
products (`kernels`), the attention function (`attention`) and the way a sequence is spread over devices (`sharding`)
are passed in by a `Runtime`; the model does not depend on which ones they are.

Precision, as in the official code: the residual stream, norms, modulation, gates, time embedding, patch embedding and
head are float32; the large matrix products run in the dtype of their biases, whatever the format of their weights.

Letters in names: B batch, L tokens on this device, C width, S text positions, H heads, D channels a head.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanduet.distributed.sequence.sharding import NoSharding, Sharding
from wanduet.family.spec import TransformerSpec
from wanduet.kernels.attention.backends import AttentionFn, sdpa
from wanduet.kernels.attention.call import AttentionCall, Step
from wanduet.kernels.dit.plain import TORCH_KERNELS, Kernels
from wanduet.kernels.dit.rope import Rope, rope_for_grid
from wanduet.kernels.dit.weight import Weight
from wanduet.kernels.precision import EXACT, PRODUCTS
from wanduet.kernels.views import side_by_side
from wanduet.models.dit.embeddings import ConditionEmbedder, PatchGrid
from wanduet.models.dit.linear import Linear
from wanduet.models.dit.workspace import Workspace


@dataclass(frozen=True, slots=True)
class TextContext:
    """A prompt's cross-attention keys and values `[B, S, H, D]` for every block, S at most text_len.

    Computed once a prompt, because the text does not change during a denoise. All padding positions have the same key
    and value; these are stored once, as the last position, which counts `repeats` times.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class Modulation:
    """One block's norm weights (1 + scale), biases (shift) and gates, each `[B, C]` float32."""

    attn_weight: Tensor
    attn_bias: Tensor
    attn_gate: Tensor
    ffn_weight: Tensor
    ffn_bias: Tensor
    ffn_gate: Tensor


@dataclass(frozen=True, slots=True)
class Runtime:
    """How blocks run: with which kernels, attention function and sharding.

    `share_first`: the prompts of one step share the first block's self-attention, whose result is then kept in memory
    from one prompt to the next.
    """

    kernels: Kernels = TORCH_KERNELS
    attention: AttentionFn = sdpa
    sharding: Sharding = field(default_factory=NoSharding)
    share_first: bool = True


@dataclass(slots=True)
class Residual:
    """The residual stream `x` `[B, L, C]` float32, and what is computed from it and not added yet.

    `pending`, in the compute dtype and of the same shape, is the modulated norm of x, then its self-attention.
    """

    x: Tensor
    pending: Tensor | None = None

    def pop_pending(self) -> Tensor:
        """Return `pending` and drop the reference, so that its memory is free after its last use."""
        pending, self.pending = self.pending, None
        assert pending is not None
        return pending


@dataclass(frozen=True, slots=True)
class EmbeddedStep:
    """A forward's timestep, embedded as `time` `[B, C]` and projected to `modulation` `[B, 6, C]`, both float32, and its
    first block's attention call."""

    time: Tensor
    modulation: Tensor
    call: AttentionCall


class Attention(nn.Module):
    """Multi-head attention with RMSNorm over all channels of q and k."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.to_out = nn.Sequential(Linear(dim, dim))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=eps) for _ in range(2))

    def project_qkv(self, n_BLC: Tensor, run: Runtime, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, L, C]`, before their norms; computed by one product if the weights are adjacent in memory."""
        linears = (self.to_q, self.to_k, self.to_v)
        weight = Weight.adjacent(*(linear.stored for linear in linears))
        bias = side_by_side(*(linear.bias for linear in linears))
        if weight is None or bias is None or torch.is_grad_enabled():
            q, k, v = (
                _project(n_BLC, linear, out, run) for linear, out in zip(linears, workspace.thirds(), strict=True)
            )
        else:
            q, k, v = run.kernels.linear(n_BLC, weight, bias, workspace.whole).chunk(3, dim=-1)
        return q, k, v

    def attend_self(
        self, residual: Residual, rope: Rope, run: Runtime, workspace: Workspace, call: AttentionCall
    ) -> Tensor:
        """Self-attention's heads `[B, L, C]`, before the output projection, of `residual.pending`, which is popped.

        `call`: of this block.
        """
        if run.sharding.overlaps_projections:
            q_BLHD, k_BLHD, v_BLHD = self.send_qkv(residual.pop_pending(), rope, run, workspace)
        else:
            q, k, v = self.project_qkv(residual.pop_pending(), run, workspace)
            q_BLHD, k_BLHD = run.kernels.qk_norm_rope_pair(
                q, k, self.norm_q.weight, self.norm_k.weight, self.eps, self.num_heads, rope
            )
            v_BLHD = v.unflatten(-1, (self.num_heads, -1))
        attend = run.sharding.attend_first_block if call.block == 0 else run.sharding.attend
        return attend(q_BLHD, k_BLHD, v_BLHD, run.attention, call).flatten(2)

    def send_qkv(self, n_BLC: Tensor, rope: Rope, run: Runtime, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, L, H, D]` after norms and rotation; each is sent to its devices before the next is computed."""
        qkv: dict[int, Tensor] = {}
        for index, linear, norm in ((2, self.to_v, None), (1, self.to_k, self.norm_k), (0, self.to_q, self.norm_q)):
            buffer = run.sharding.qkv_buffer(index, n_BLC)
            x = _project(n_BLC, linear, workspace.thirds()[index] if buffer is None else buffer, run)
            if norm is None:
                qkv[index] = x.unflatten(-1, (self.num_heads, -1))
            else:
                qkv[index] = run.kernels.qk_norm_rope(x, norm.weight, self.eps, self.num_heads, rope)
            run.sharding.send_qkv(index, qkv[index])
        return qkv[0], qkv[1], qkv[2]

    def attend_text(
        self, n_BLC: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, repeats: int, run: Runtime, workspace: Workspace
    ) -> Tensor:
        """Cross-attention's heads `[B, L, C]`, before the output projection; keys and values as in `TextContext`."""
        q = _project(n_BLC, self.to_q, workspace.part(n_BLC, n_BLC.shape[2]), run)
        return run.kernels.text_attention(q, self.norm_q.weight, self.eps, k_BSHD, v_BSHD, repeats)

    def project_text(self, text_BSC: Tensor, run: Runtime) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, S, H, D]` of a projected prompt `[B, S, C]`."""
        k = run.kernels.qk_norm_rope(self.to_k(text_BSC), self.norm_k.weight, self.eps, self.num_heads, None)
        return k, self.to_v(text_BSC).unflatten(-1, (self.num_heads, -1))

    def project_out(self, heads_BLC: Tensor, out_BLC: Tensor | None, run: Runtime) -> Tensor:
        """The output projection `[B, L, C]`; written into `out_BLC`, if given and gradients are disabled."""
        return _project(heads_BLC, cast(Linear, self.to_out[0]), out_BLC, run)


class _Up(nn.Module):
    """The widening projection, under its name in a Diffusers checkpoint."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = Linear(dim, ffn_dim)


class FeedForward(nn.Module):
    """`Linear → GELU (tanh) → Linear`; parameter names `net.0.proj` and `net.2` as in Diffusers."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(_Up(dim, ffn_dim), nn.Identity(), Linear(ffn_dim, dim))

    def forward(self, n_BLC: Tensor, run: Runtime, workspace: Workspace) -> Tensor:
        """`[B, L, C]` to `[B, L, C]`; with gradients disabled, the result overwrites `n_BLC`."""
        up, down = cast(_Up, self.net[0]).proj, cast(Linear, self.net[2])
        hidden = run.kernels.linear_gelu(n_BLC, up.stored, up.bias, workspace.part(n_BLC, up.out_features))
        return _project(hidden, down, n_BLC, run)


def _modulation(rows: int, dim: int) -> nn.Parameter:
    """A table `[1, rows, dim]` of shifts, scales and gates, initialised as in Wan2.1."""
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
        """This block's modulation for the projected timestep `[B, 6, C]` float32."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table.float() + time_B6C).unbind(1)
        return Modulation(1 + scale, shift, gate, 1 + ffn_scale, ffn_shift, ffn_gate)

    def attend(self, residual: Residual, rope: Rope, run: Runtime, workspace: Workspace, call: AttentionCall) -> None:
        """Replace `residual.pending` with its self-attention: the part of a block that does not depend on the text."""
        heads_BLC = self.attn1.attend_self(residual, rope, run, workspace, call)
        residual.pending = self.attn1.project_out(heads_BLC, workspace.part(heads_BLC, heads_BLC.shape[2]), run)

    def forward(
        self,
        residual: Residual,
        mod: Modulation,
        next_norm: tuple[Tensor, Tensor],
        text: tuple[Tensor, Tensor, int],
        run: Runtime,
        workspace: Workspace,
    ) -> None:
        """Run the rest of the block: add the pending self-attention, then cross-attention and feed-forward.

        `text`: keys, values and repeats, see `TextContext`. Updates `residual`, whose `pending` becomes the next
        block's norm, by `next_norm` (weight, bias `[B, C]`): each residual addition is fused with the norm after it.
        """
        residual_norm, eps = run.kernels.residual_norm, self.eps
        norm2 = (self.norm2.weight[None], self.norm2.bias[None])
        attended = residual.pop_pending()
        n_BLC = None if torch.is_grad_enabled() else torch.empty_like(attended)
        x_BLC, n_BLC = residual_norm(residual.x, attended, mod.attn_gate, *norm2, eps, n_BLC)
        heads_BLC = self.attn2.attend_text(n_BLC, *text, run, workspace)
        y_BLC = self.attn2.project_out(heads_BLC, n_BLC, run)
        x_BLC, n_BLC = residual_norm(x_BLC, y_BLC, None, mod.ffn_weight, mod.ffn_bias, eps, None)
        if torch.is_grad_enabled():
            y_BLC = self.ffn(n_BLC, run, workspace)
            residual.x, residual.pending = residual_norm(x_BLC, y_BLC, mod.ffn_gate, *next_norm, eps, None)
            return
        chunk = workspace.chunk_tokens(cast(_Up, self.ffn.net[0]).proj.out_features)
        for start in range(0, x_BLC.shape[1], chunk):
            rows = slice(start, start + chunk)
            residual_norm(x_BLC[:, rows], self.ffn(n_BLC[:, rows], run, workspace), mod.ffn_gate, *next_norm, eps, None)
        residual.x, residual.pending = x_BLC, n_BLC


class WanTransformer(nn.Module):
    """Predicts the velocity (noise - video) of latents at a timestep, given a prompt's embeddings.

    Passes in `accelerate/` replace `runtime` and `fetch_blocks` after construction.
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
        """A parameter's dtype in a model that computes in `dtype`: float32 outside the large products.

        Source: the official code's amp.autocast(float32) around time MLP, modulation and head.
        """
        large = ".to_" in name or ".ffn." in name or "text_embedder" in name
        return dtype if large and not name.endswith(".weight_scale") else torch.float32

    @staticmethod
    def is_block_matrix(name: str) -> bool:
        """Whether a parameter is the matrix of a `Linear`, which may be in another format (kernels/dit/weight.py)."""
        return name.startswith("blocks.") and name.endswith(".weight") and (".to_" in name or ".ffn." in name)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the large matrix products."""
        return next(iter(self._blocks())).attn1.to_q.bias.dtype

    def _blocks(self) -> Iterable[Block]:
        return (cast(Block, block) for block in self.blocks)

    def fetch_blocks(self) -> Iterable[Block]:
        """Yield the blocks in order, each ready to run on the device (accelerate/offload.py replaces this)."""
        return self._blocks()

    @PRODUCTS.at(EXACT)
    def prepare_text(self, prompt_embeds: Tensor) -> TextContext:
        """Compute all blocks' keys and values for zero-padded embeddings `[B, text_len, text_dim]`."""
        true_tokens = prompt_embeds.ne(0).any(dim=-1).any(dim=0).nonzero()
        length = min(int(true_tokens[-1]) + 1 if len(true_tokens) else 0, prompt_embeds.shape[1] - 1) + 1
        text = self.condition_embedder.embed_text(prompt_embeds[:, :length].to(self.compute_dtype))
        pairs = [block.attn2.project_text(text, self.runtime) for block in self.fetch_blocks()]
        repeats = prompt_embeds.shape[1] - length + 1
        return TextContext(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), repeats)

    def prepare_rope(self, latent_shape: tuple[int, ...], device: torch.device) -> Rope:
        """Rotation angles of this device's tokens, for latents of shape `[..., frames, rows, columns]`."""
        grid = PatchGrid.of(latent_shape, self.spec.patch_size)
        rope = rope_for_grid(grid.tokens, self.spec.attention_head_dim, device)
        shard = self.runtime.sharding.shard_sequence
        return Rope(shard(rope.cos, 0), shard(rope.sin, 0))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        rope: Rope | None = None,
        step: Step | None = None,
    ) -> Tensor:
        """Predict the velocity `[B, 16, T, h, w]` float32 of latents of that shape.

        `timestep` `[B]` in 0..1000; `text`: embeddings `[B, text_len, text_dim]`, or the result of `prepare_text`;
        `rope`: the result of `prepare_rope`, by default computed here. `step` is passed on to the attention function,
        for which `timestep` would have to be copied to the host.
        """
        if isinstance(text, Tensor):
            text = self.prepare_text(text)
        if rope is None:
            rope = self.prepare_rope(latents.shape, latents.device)
        return self.forward_cfg(latents, timestep, (text,), rope, step)[0]

    @PRODUCTS.at(EXACT)
    def forward_cfg(
        self, latents: Tensor, timestep: Tensor, texts: Sequence[TextContext], rope: Rope, step: Step | None = None
    ) -> list[Tensor]:
        """Predict a velocity, as `forward` does, for each of several prompts (classifier-free guidance has two).

        Equal bit for bit to one `forward` a prompt, but the first block's self-attention, which does not depend on the
        text, is computed once (`Runtime.share_first`).
        """
        velocities: list[Tensor] = []
        # Results are allocated before temporary tensors, which then fit into the same holes for each prompt.
        grid = PatchGrid.of(latents.shape, self.spec.patch_size)
        call = AttentionCall(grid.tokens, step=step)
        outs: list[Tensor | None] = [None] * len(texts)
        if not torch.is_grad_enabled():
            shape = (latents.shape[0], self.spec.out_channels, *latents.shape[2:])
            outs = [torch.empty(shape, dtype=torch.float32, device=latents.device) for _ in texts]
        workspace = first_attention = None
        for text, out in zip(texts, outs, strict=True):
            x_BLC, time_BC, time_B6C = self.embed(latents, timestep)
            workspace = workspace or Workspace.allocate_for(x_BLC, self.compute_dtype)
            residual, first_attention = Residual(x_BLC, first_attention), None
            del x_BLC
            keep = self.runtime.share_first and text is not texts[-1]
            n_BLC, first_attention = self.run_blocks(
                residual, EmbeddedStep(time_BC, time_B6C, call), text, rope, workspace, keep_first=keep
            )
            del residual  # frees its memory for the next prompt's
            velocities.append(self.head(n_BLC, grid, out))
            del n_BLC
        return velocities

    def embed(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed this device's patches as tokens `[B, L, C]`, and the timestep as `[B, C]` and `[B, 6, C]`; float32."""
        patches = PatchGrid.of(latents.shape, self.spec.patch_size).patchify(latents.float())
        patches = self.runtime.sharding.shard_sequence(patches, 1)
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        x_BLC = F.linear(patches, weight.flatten(1).float(), None if bias is None else bias.float())
        time_BC, time_B6C = self.condition_embedder.embed_time(timestep)
        return x_BLC, time_BC, time_B6C

    def run_blocks(
        self,
        residual: Residual,
        step: EmbeddedStep,
        text: TextContext,
        rope: Rope,
        workspace: Workspace,
        *,
        keep_first: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run all blocks; returns the head's modulated norm `[B, L, C]` of the result. Overwrites `residual`.

        If `residual.pending` is set, it is the first block's self-attention, which is not computed again. With
        `keep_first`, a copy of that is returned too, for the same latents with another text; else None.
        """
        modulations = [block.modulation(step.modulation) for block in self._blocks()]
        norms = [(mod.attn_weight, mod.attn_bias) for mod in modulations]
        shift, scale = (self.scale_shift_table.float() + step.time[:, None]).unbind(1)
        norms.append((1 + scale, shift))
        run, dtype = self.runtime, self.compute_dtype
        first_attention = torch.empty_like(residual.x, dtype=dtype) if keep_first else None
        attended = residual.pending is not None
        if not attended:
            residual.pending = run.kernels.norm(residual.x, *norms[0], self.spec.eps, dtype)
        for index, block in enumerate(self.fetch_blocks()):
            if index > 0 or not attended:
                block.attend(residual, rope, run, workspace, replace(step.call, block=index))
            if index == 0 and first_attention is not None and residual.pending is not None:
                first_attention.copy_(residual.pending)
            keys_values = (text.keys[index], text.values[index], text.repeats)
            block(residual, modulations[index], norms[index + 1], keys_values, run, workspace)
        return residual.pop_pending(), first_attention

    def head(self, n_BLC: Tensor, grid: PatchGrid, out: Tensor | None) -> Tensor:
        """Project this device's normed tokens to velocities `[B, 16, T, h, w]` float32, in `out` if given."""
        bias = self.proj_out.bias
        weight = self.proj_out.weight.to(n_BLC.dtype)
        patches = F.linear(n_BLC, weight, bias.to(n_BLC.dtype)).float()
        patches = self.runtime.sharding.gather_sequence(patches, 1)
        return grid.unpatchify(patches, self.spec.out_channels, out)


def _project(x: Tensor, linear: Linear, out: Tensor | None, run: Runtime) -> Tensor:
    return run.kernels.linear(x, linear.stored, linear.bias, out)
