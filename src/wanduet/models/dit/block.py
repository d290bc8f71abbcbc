"""The transformer's blocks, and the `Runtime` that they run with. Letters in names are as in `models.dit.model`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from wanduet.distributed.sequence.sharding import NoSharding, Sharding
from wanduet.family.spec import TransformerSpec
from wanduet.kernels.attention.backends import AttentionFn, sdpa
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.attention.trained import TrainedSparse
from wanduet.kernels.dit.plain import TORCH_KERNELS, Kernels, Norm, QKNorm
from wanduet.kernels.dit.rope import Rope
from wanduet.kernels.dit.weight import Weight
from wanduet.kernels.views import side_by_side
from wanduet.models.dit.linear import Linear
from wanduet.models.dit.quantizer import Operand, QuantizedFeedForward, Quantizer
from wanduet.models.dit.trained_sparse import SLAttention, VSAttention
from wanduet.models.dit.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Modulation:
    """One block's modulated norms, and its gates, each `[B, C]` float32."""

    attn: Norm
    attn_gate: Tensor
    ffn: Norm
    ffn_gate: Tensor


@dataclass(frozen=True, slots=True)
class Runtime:
    """How blocks run: with which kernels, attention function and sharding. `quantizer`: of the large products in 8 bits, for
    forwards without gradients; None computes all products exactly.

    `share_first`: the prompts of one step share the first block's self-attention, whose result is then kept in memory
    from one prompt to the next. `token_block`: order the tokens such that those of each block of so many, consecutive in
    the sequence, are neighbours in the video (`models.dit.token_order`); None for the order by frame, row and column.
    `trained`: how self-attention runs that is trained to be sparse; it replaces `attention`.
    `before_block`: called before each block; raises to stop the forward. Ranks of a group must all stop at the same block.
    """

    kernels: Kernels = TORCH_KERNELS
    attention: AttentionFn = sdpa
    sharding: Sharding = field(default_factory=NoSharding)
    share_first: bool = True
    token_block: int | None = None
    quantizer: Quantizer | None = None
    trained: TrainedSparse = field(default_factory=TrainedSparse)
    before_block: Callable[[], None] | None = None

    def operand(self, x_BLC: Tensor) -> Operand:
        """`x_BLC` as an operand of a large product: in 8 bits if such products are."""
        return x_BLC if self.quantizer is None else self.quantizer.quantized(x_BLC)

    def norm(self, x_BLC: Tensor, norm: Norm, dtype: torch.dtype) -> Operand:
        """The norm of `x_BLC` in `dtype`, as an operand of a large product."""
        if self.quantizer is None:
            return self.kernels.norm(x_BLC, norm, dtype)
        return self.quantizer.norm(x_BLC, None, None, norm)


@dataclass(slots=True)
class Residual:
    """The residual stream `x` `[B, L, C]` float32, and what is computed from it and not added yet.

    `pending`, of the same shape, is the modulated norm of x, as an operand of a product, then its self-attention in the
    compute dtype.
    """

    x: Tensor
    pending: Operand | None = None

    def pop_pending(self) -> Operand:
        """Return `pending` and drop the reference, so that its memory is free after its last use."""
        pending, self.pending = self.pending, None
        assert pending is not None
        return pending

    def pop_tensor(self) -> Tensor:
        """Return `pending`, which is not in 8 bits, as `pop_pending` does."""
        pending = self.pop_pending()
        assert isinstance(pending, Tensor)
        return pending


class Attention(nn.Module):
    """Multi-head attention with RMSNorm over all channels of q and k."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, eps
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.to_out = nn.Sequential(Linear(dim, dim))
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=eps) for _ in range(2))

    def project_qkv(self, n_BLC: Operand, run: Runtime, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, L, C]`, before their norms; computed by one product if the weights are adjacent in memory."""
        linears = (self.to_q, self.to_k, self.to_v)
        weight = Weight.adjacent(*(linear.stored for linear in linears))
        bias = side_by_side(*(linear.bias for linear in linears))
        if weight is None or bias is None or torch.is_grad_enabled():
            q, k, v = (
                _project(n_BLC, linear, out, run) for linear, out in zip(linears, workspace.thirds(), strict=True)
            )
        else:
            q, k, v = _multiply(n_BLC, linears, (weight, bias), workspace.whole, run).chunk(3, dim=-1)
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
            norm = QKNorm(self.eps, self.num_heads, rope)
            q_BLHD, k_BLHD = run.kernels.qk_norm_rope_pair(q, k, self.norm_q.weight, self.norm_k.weight, norm)
            v_BLHD = v.unflatten(-1, (self.num_heads, -1))
        # VSA also gathers heads itself, those of `attend`.
        shares = call.block == 0 and not isinstance(run.attention, VSAttention)
        attend = run.sharding.attend_first_block if shares else run.sharding.attend
        return attend(q_BLHD, k_BLHD, v_BLHD, run.attention, call).flatten(2)

    def send_qkv(self, n_BLC: Operand, rope: Rope, run: Runtime, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[B, L, H, D]` after norms and rotation; each is sent to its devices before the next is computed."""
        qkv: dict[int, Tensor] = {}
        norm = QKNorm(self.eps, self.num_heads, rope)
        for index, linear, own_norm in ((2, self.to_v, None), (1, self.to_k, self.norm_k), (0, self.to_q, self.norm_q)):
            third = workspace.thirds()[index]
            like = n_BLC if isinstance(n_BLC, Tensor) else cast(Tensor, third)  # in the compute dtype
            buffer = run.sharding.qkv_buffer(index, like)
            x = _project(n_BLC, linear, third if buffer is None else buffer, run)
            if own_norm is None:
                qkv[index] = x.unflatten(-1, (self.num_heads, -1))
            else:
                qkv[index] = run.kernels.qk_norm_rope(x, own_norm.weight, norm)
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
        k = run.kernels.qk_norm_rope(self.to_k(text_BSC), self.norm_k.weight, QKNorm(self.eps, self.num_heads))
        return k, self.to_v(text_BSC).unflatten(-1, (self.num_heads, -1))

    def project_out(self, heads_BLC: Operand, out_BLC: Tensor | None, run: Runtime) -> Tensor:
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

    def quantized(self, quantizer: Quantizer, workspace: Workspace) -> QuantizedFeedForward:
        """The same with products in 8 bits."""
        return QuantizedFeedForward(quantizer, cast(_Up, self.net[0]).proj, cast(Linear, self.net[2]), workspace)


def modulation_table(rows: int, dim: int) -> nn.Parameter:
    """A table `[1, rows, dim]` of shifts, scales and gates, initialised as in Wan2.1."""
    table = nn.Parameter(torch.empty(1, rows, dim))
    nn.init.normal_(table, std=dim**-0.5)
    return table


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward."""

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        dim, self.eps, self.spec = spec.dim, spec.eps, spec
        self.attn1 = Attention(dim, spec.num_attention_heads, spec.eps)
        self.attn2 = Attention(dim, spec.num_attention_heads, spec.eps)
        self.norm2 = nn.LayerNorm(dim, spec.eps)
        self.ffn = FeedForward(dim, spec.ffn_dim)
        self.scale_shift_table = modulation_table(6, dim)
        if spec.attention == "vsa":
            self.to_gate_compress = Linear(dim, dim)
        elif spec.attention == "sla":
            self.attn1.proj_l = nn.Linear(spec.attention_head_dim, spec.attention_head_dim)

    def modulation(self, time_B6C: Tensor) -> Modulation:
        """This block's modulation for the projected timestep `[B, 6, C]` float32."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table.float() + time_B6C).unbind(1)
        attn, ffn = Norm(1 + scale, shift, self.eps), Norm(1 + ffn_scale, ffn_shift, self.eps)
        return Modulation(attn, gate, ffn, ffn_gate)

    def attend(self, residual: Residual, rope: Rope, run: Runtime, workspace: Workspace, call: AttentionCall) -> None:
        """Replace `residual.pending` with its self-attention: the part of a block that does not depend on the text."""
        if self.spec.attention == "vsa":
            heads_BLC = self._attend_tiles(residual, rope, run, workspace, call)
        else:
            if self.spec.attention == "sla":
                projection = cast(nn.Linear, self.attn1.proj_l)
                run = replace(run, attention=SLAttention(run.trained, run.attention, self.spec, projection))
            heads_BLC = self.attn1.attend_self(residual, rope, run, workspace, call)
        out_BLC = workspace.part(heads_BLC, heads_BLC.shape[2])
        operand = run.operand(heads_BLC)
        del heads_BLC  # in 8 bits, its memory is free now
        residual.pending = self.attn1.project_out(operand, out_BLC, run)

    def _attend_tiles(
        self, residual: Residual, rope: Rope, run: Runtime, workspace: Workspace, call: AttentionCall
    ) -> Tensor:
        """`Attention.attend_self` by VSA, gated by the input of q, k and v, which is kept until the end."""
        n_BLC = residual.pending
        assert n_BLC is not None
        fine = VSAttention(run.trained, run.attention, self.spec)
        heads_BLC = self.attn1.attend_self(residual, rope, replace(run, attention=fine), workspace, call)
        _, gate_BLC, coarse_BLC = workspace.thirds()
        gate_BLC = _project(n_BLC, self.to_gate_compress, gate_BLC, run)
        return fine.add_coarse(heads_BLC, gate_BLC, call, run.sharding, coarse_BLC)

    def forward(
        self,
        residual: Residual,
        mod: Modulation,
        next_norm: Norm,
        text: tuple[Tensor, Tensor, int],
        run: Runtime,
        workspace: Workspace,
    ) -> None:
        """Run the rest of the block: add the pending self-attention, then cross-attention and feed-forward.

        `text`: keys, values and repeats, see `TextContext`. Updates `residual`, whose `pending` becomes the next
        block's norm, by `next_norm`: each residual addition is fused with the norm after it.
        """
        residual_norm = run.kernels.residual_norm
        norm2 = Norm(self.norm2.weight[None], self.norm2.bias[None], self.eps)
        attended = residual.pop_tensor()
        n_BLC = None if torch.is_grad_enabled() else torch.empty_like(attended)
        x_BLC, n_BLC = residual_norm(residual.x, attended, mod.attn_gate, norm2, n_BLC)
        heads_BLC = self.attn2.attend_text(n_BLC, *text, run, workspace)
        y_BLC = self.attn2.project_out(heads_BLC, n_BLC, run)
        if run.quantizer is not None:
            residual.x = x_BLC
            self.feed_forward_8_bits(residual, y_BLC, mod, next_norm, run, workspace)
            return
        x_BLC, n_BLC = residual_norm(x_BLC, y_BLC, None, mod.ffn, None)
        if torch.is_grad_enabled():
            y_BLC = self.ffn(n_BLC, run, workspace)
            residual.x, residual.pending = residual_norm(x_BLC, y_BLC, mod.ffn_gate, next_norm, None)
            return
        chunk = workspace.chunk_tokens(cast(_Up, self.ffn.net[0]).proj.out_features)
        for start in range(0, x_BLC.shape[1], chunk):
            rows = slice(start, start + chunk)
            residual_norm(x_BLC[:, rows], self.ffn(n_BLC[:, rows], run, workspace), mod.ffn_gate, next_norm, None)
        residual.x, residual.pending = x_BLC, n_BLC

    def feed_forward_8_bits(
        self, residual: Residual, y_BLC: Tensor, mod: Modulation, next_norm: Norm, run: Runtime, workspace: Workspace
    ) -> None:
        """Add the pending `y_BLC`, whose memory is used again, and the feed-forward with products in 8 bits."""
        quantizer, x_BLC = cast(Quantizer, run.quantizer), residual.x
        n_BLC = quantizer.norm(x_BLC, y_BLC, None, mod.ffn)
        feed_forward = self.ffn.quantized(quantizer, workspace)
        for start in range(0, x_BLC.shape[1], feed_forward.chunk):
            rows = slice(start, start + feed_forward.chunk)
            n_rows, y_rows = n_BLC.tokens(rows), y_BLC[:, rows]
            feed_forward(n_rows, y_rows)
            if next_norm.is_exact:
                run.kernels.residual_norm(x_BLC[:, rows], y_rows, mod.ffn_gate, next_norm, None)
            else:
                quantizer.kernels.quantize_norm(x_BLC[:, rows], y_rows, mod.ffn_gate, next_norm, n_rows)
        residual.pending = y_BLC if next_norm.is_exact else n_BLC


def _project(x: Operand, linear: Linear, out: Tensor | None, run: Runtime) -> Tensor:
    return _multiply(x, (linear,), (linear.stored, linear.bias), out, run)


def _multiply(
    x: Operand, linears: Sequence[Linear], joined: tuple[Weight, Tensor], out: Tensor | None, run: Runtime
) -> Tensor:
    """The product with the weight and bias of `linears`, `joined` if there are several; in 8 bits if `x` is."""
    if isinstance(x, Tensor):
        return run.kernels.linear(x, *joined, out)
    assert run.quantizer is not None
    return run.quantizer.linear(x, *joined, out, linears)
