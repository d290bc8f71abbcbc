"""Self-attention of weights that are trained to read some of the key blocks: VSA (FastWan) and SLA (TurboDiffusion).

Sources: VSA, arXiv 2505.13389 and FastVideo; SLA, arXiv 2509.24006 and TurboDiffusion. Unlike `sparse_steps`, they are sparse
in every block and step, and have a part that reads all keys coarsely. All heads are independent of each other.

Letters in names: B batch, L tokens, H heads, D channels of a head, M blocks of queries, N blocks of keys.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from wanduet.family.sparsity import SLA_KEYS, SLA_QUERIES, TILE_TOKENS, kept_blocks, sla_kept
from wanduet.kernels.attention.backends import AttentionFn
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.attention.choose import Shape
from wanduet.kernels.attention.key_lists import block_scores, highest_blocks, pool_blocks
from wanduet.kernels.attention.sparse import PLAIN_BYTES, Blocks, KeyLists, ListedFn, sparse_attention_with_lse

LINEAR_TOKENS = 4096  # that the linear part computes at a time
QKV: TypeAlias = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class TrainedSparse:
    """How attention that is trained to be sparse runs.

    `listed`: the kernel for lists of key blocks. `share`: of the key blocks, in place of the weights' own; None for that.
    Methods get the weights' own share, and `dense`, the attention that runs where no block is left out.
    """

    listed: ListedFn = sparse_attention_with_lse
    share: float | None = None

    def vsa(
        self, qkv: QKV, tiles: Blocks, share: float, dense: AttentionFn, call: AttentionCall
    ) -> tuple[Tensor, Tensor]:
        """Return VSA's fine part `[B, L, H, D]`, and its coarse part `[B, H, M, D]` float32, which is the same for all
        tokens of a tile. The output is `coarse * gate + fine`.

        `qkv`: of all tokens, each `[B, L, H, D]`; `tiles`: of the sequence, M of them.
        """
        q_BHMD, k_BHMD, v_BHMD = (pool_blocks(x, TILE_TOKENS, tiles.starts).contiguous() for x in qkv)
        scores_BHMN = block_scores(q_BHMD, k_BHMD)
        kept = kept_blocks(self.share or share, scores_BHMN.shape[3])
        if kept == scores_BHMN.shape[3]:
            fine = dense(*qkv, call)
        else:
            lists = KeyLists(*highest_blocks(scores_BHMN, kept), TILE_TOKENS, TILE_TOKENS, tiles, tiles)
            fine = self.listed(*qkv, lists)[0]
        return fine, (scores_BHMN * qkv[0].shape[3] ** -0.5).softmax(dim=-1) @ v_BHMD

    def sla(
        self, qkv: QKV, projection: tuple[Tensor, Tensor], share: float, dense: AttentionFn, call: AttentionCall
    ) -> Tensor:
        """Return SLA's output `[B, L, H, D]`: attention to some key blocks, and `projection` of linear attention to all.

        `qkv`: of all tokens, each `[B, L, H, D]`; `projection`: the weight `[D, D]` and bias `[D]` of all heads, float32.
        """
        # SLA chooses by keys minus their mean over all tokens. That changes all scores of a row alike, so not their order.
        q_BHMD, k_BHND = pool_blocks(qkv[0], SLA_QUERIES), pool_blocks(qkv[1], SLA_KEYS)
        scores_BHMN = block_scores(q_BHMD.contiguous(), k_BHND.contiguous())
        blocks = scores_BHMN.shape[3]
        kept = sla_kept(self.share or share, blocks)
        if kept == blocks:
            out = dense(*qkv, call)
        else:
            out = self.listed(*qkv, KeyLists(*highest_blocks(scores_BHMN, kept), SLA_QUERIES, SLA_KEYS))[0]
        return _add_linear(out, qkv, projection)


def _add_linear(out: Tensor, qkv: QKV, projection: tuple[Tensor, Tensor]) -> Tensor:
    """Add `projection` of linear attention, whose feature map is the softmax over channels, to `out`; in place without
    gradients. All of it is float32 but the operands of the products over tokens."""
    q_BHLD, k_BHLD, v_BHLD = (x.transpose(1, 2) for x in qkv)
    state: Tensor | float = 0.0
    total: Tensor | float = 0.0
    for k_rows, v_rows in zip(k_BHLD.split(LINEAR_TOKENS, 2), v_BHLD.split(LINEAR_TOKENS, 2), strict=True):
        features = k_rows.float().softmax(dim=-1)
        state = state + (features.to(v_rows.dtype).transpose(-1, -2) @ v_rows).float()
        total = total + features.sum(dim=2, keepdim=True)
    parts = []
    for start in range(0, out.shape[1], LINEAR_TOKENS):
        rows = slice(start, start + LINEAR_TOKENS)
        features = q_BHLD[:, :, rows].float().softmax(dim=-1)
        linear = (features @ state) / (1e-5 + (features * total).sum(dim=-1, keepdim=True))
        part_BLHD = F.linear(linear, *projection).transpose(1, 2)
        if torch.is_grad_enabled():
            parts.append(out[:, rows] + part_BLHD)
        else:
            out[:, rows] += part_BLHD
    return torch.cat(parts, dim=1).to(out.dtype) if parts else out


def listed_blocks(attention: str) -> tuple[int, int] | None:
    """Return the tokens of VSA's or SLA's blocks of queries and of keys; None for blocks of different sizes."""
    return (SLA_QUERIES, SLA_KEYS) if attention == "sla" else None


def trained_bytes(attention: str, shape: Shape, tiles: int, share: float, is_cpu: bool) -> int:
    """Return a bound on the bytes that VSA or SLA needs beside its inputs and its result, the token order included.

    `shape`: of the attention; `tiles`: of VSA.
    """
    tokens, heads, head_dim = shape.keys, shape.heads, shape.head_dim
    if attention == "vsa":
        rows = columns = tiles
        slots, kept, linear = tiles * TILE_TOKENS, kept_blocks(share, tiles), 0
    else:
        rows, columns = -(-tokens // SLA_QUERIES), -(-tokens // SLA_KEYS)
        slots, kept = tokens + SLA_QUERIES, sla_kept(share, columns)
        linear = 24 * min(tokens, LINEAR_TOKENS) * heads * head_dim
    # Pooled tensors and the coarse part, also of other ranks' heads while they are gathered; scores, softmax and lists.
    lists = heads * (32 * head_dim * max(rows, columns) + rows * (12 * columns + 4 * kept + 4))
    total = lists + linear + 32 * tokens
    if not is_cpu:
        return total
    # Sorted scores, with indices of 8 bytes; queries, keys, values and the result in float32; keys and values gathered.
    return total + 4 * lists + 6 * 4 * slots * heads * head_dim + 4 * PLAIN_BYTES
