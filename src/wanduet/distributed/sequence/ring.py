"""Ring attention: keys and values go round, queries stay; partial results are joined exactly.

Source: Ring Attention (arXiv 2310.01889); joining by log-sum-exp as in FlashAttention (arXiv 2205.14135).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.kernels.attention.backends import AttentionLseFn

PassOn = Callable[[Tensor, Tensor], Sequence[dist.Work]]
"""(what this rank holds, what it will hold) to what is under way."""


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], attention_lse: AttentionLseFn, group: dist.ProcessGroup
) -> Tensor:
    """Attention of this rank's queries to all ranks' keys and values, all `[B, L, H, D]` of one dtype.

    `lengths` are the tokens that each rank of `group` holds. Result in the dtype of `q`, joined in float32.
    """
    return attend_in_turn(q, k, v, lengths, attention_lse, dist.get_rank(group), partial(_pass_on, group=group))


def attend_in_turn(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], attention_lse: AttentionLseFn, rank: int, pass_on: PassOn
) -> Tensor:
    """`ring_attention` with another way to pass keys and values on. The next part is received while the present one is
    attended to; at most two are held."""
    size = len(lengths)
    held = torch.stack((k, v))
    joined = _Joined()
    for step in range(size):
        coming, last = lengths[(rank - step - 1) % size], step == size - 1
        incoming = held.new_empty((2, held.shape[1], 0 if last else coming, *held.shape[3:]))
        works = [] if last else pass_on(held, incoming)
        if held.numel() and q.numel():
            joined.add(*attention_lse(q, held[0], held[1]))
        for work in works:
            work.wait()
        held = incoming
    return joined.result(q)


def _pass_on(held: Tensor, incoming: Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
    """Begin to send to the next rank and to receive from the one before."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    # A rank without tokens sends nothing: empty messages are not in every back end's contract.
    operations = [
        dist.P2POp(operation, tensor, group=group, group_peer=(rank + direction) % size)
        for operation, tensor, direction in ((dist.isend, held, 1), (dist.irecv, incoming, -1))
        if tensor.numel()
    ]
    works: list[dist.Work] = dist.batch_isend_irecv(operations) if operations else []
    return works


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
