"""Ring attention: keys and values go round, queries stay; partial results are joined exactly.

Source: Ring Attention (arXiv 2310.01889); joining by log-sum-exp as in FlashAttention (arXiv 2205.14135).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.ops.attention import AttentionLseFn


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], attention_lse: AttentionLseFn, group: dist.ProcessGroup
) -> Tensor:
    """Attention of this rank's queries to all ranks' keys and values, all `[B, L, H, D]` of one dtype.

    `lengths` are the tokens that each rank of `group` holds. The next part of the keys is received while
    the present one is attended to; at most two are held. Result in the dtype of `q`, joined in float32.
    """
    size, rank = len(lengths), dist.get_rank(group)
    held = torch.stack((k, v))
    joined = _Joined()
    for step in range(size):
        coming = lengths[(rank - step - 1) % size]
        last = step == size - 1
        incoming = held.new_empty((2, held.shape[1], 0 if last else coming, *held.shape[3:]))
        # A rank without tokens sends nothing: empty messages are not in every back end's contract.
        operations = [
            dist.P2POp(operation, tensor, group=group, group_peer=(rank + direction) % size)
            for operation, tensor, direction in ((dist.isend, held, 1), (dist.irecv, incoming, -1))
            if tensor.numel() and not last
        ]
        works = dist.batch_isend_irecv(operations) if operations else []
        if held.numel() and q.numel():
            joined.add(*attention_lse(q, held[0], held[1]))
        for work in works:
            work.wait()
        held = incoming
    return joined.result(q)


class _Joined:
    """Attention to the keys seen so far, `[B, L, H, D]` float32, and its log-sum-exp `[B, H, L]`."""

    def __init__(self) -> None:
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Join the result over further keys. Both are means weighted by softmax; so is their union."""
        lse = lse.float()
        if self.out is None or self.lse is None:
            self.out, self.lse = out.float(), lse
            return
        weight = torch.sigmoid(lse - self.lse).transpose(1, 2).unsqueeze(-1)
        self.out = torch.lerp(self.out, out.float(), weight)
        self.lse = torch.logaddexp(self.lse, lse)

    def result(self, like: Tensor) -> Tensor:
        """What was joined, in the dtype of `like`; empty where there were no queries."""
        return torch.empty_like(like) if self.out is None else self.out.to(like.dtype)
