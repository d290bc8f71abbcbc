"""Ulysses: ranks exchange tokens for heads, so that each attends to the whole sequence with some of the heads.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). Here the heads are split into groups: while one group is attended to, the
next group's q, k and v and the previous group's results are being exchanged.

Letters in names: B batch, L tokens, H heads, D channels of a head, P ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.errors import ConfigError
from wanduet.kernels.attention.backends import AttentionFn
from wanduet.kernels.attention.call import AttentionCall


@dataclass(frozen=True, slots=True)
class PendingAllToAll:
    """An all-to-all in progress."""

    sent: Tensor  # must stay alive until the all-to-all is done
    received: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """Return what was received; on a GPU the current stream waits, not the host."""
        self.work.wait()
        return self.received


@dataclass(frozen=True, slots=True)
class UlyssesAttention:
    """Attention over the ranks of `group` by all-to-all. `lengths` are their numbers of tokens; this is rank `rank`."""

    group: dist.ProcessGroup
    lengths: Sequence[int]
    rank: int

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, local_attention: AttentionFn, call: AttentionCall, groups: int
    ) -> Tensor:
        """Return attention of this rank's queries with all heads; all tensors are `[B, this rank's L, H, D]`.

        `local_attention` is called once for each of `groups` groups of heads, with the whole sequence, which
        `call` describes. Raises ConfigError if the number of ranks does not divide the heads.
        """
        ranks = len(self.lengths)
        heads_each = heads_per_rank(q, ranks)
        head_slices = even_slices(heads_each, groups)
        out_BLHD = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        out_BLPHD = out_BLHD.unflatten(2, (ranks, -1))
        pending_qkv = [self._scatter_heads((q, k, v), head_slices[0])]
        pending_out: list[PendingAllToAll] = []
        for index in range(len(head_slices)):
            if index + 1 < len(head_slices):
                pending_qkv.append(self._scatter_heads((q, k, v), head_slices[index + 1]))
            whole = self._unpack_qkv(pending_qkv.pop(0).wait(), q, head_slices[index])
            own = call.part(head=self.rank * heads_each + head_slices[index].start)
            pending_out.append(self._scatter_tokens(local_attention(*whole, own)))
        for heads, pending in zip(head_slices, pending_out, strict=True):
            received_PBLHD = pending.wait().view(ranks, *q.shape[:2], heads.stop - heads.start, q.shape[3])
            out_BLPHD[:, :, :, heads] = received_PBLHD.permute(1, 2, 0, 3, 4)
        return out_BLHD

    def _scatter_heads(self, qkv: tuple[Tensor, Tensor, Tensor], heads: slice) -> PendingAllToAll:
        """Exchange all heads of this rank's tokens for this rank's heads of all tokens; q, k and v in one message."""
        ranks, (batch, length, _, channels) = len(self.lengths), qkv[0].shape
        sent_PBL3HD = qkv[0].new_empty(ranks, batch, length, 3, heads.stop - heads.start, channels)
        for index, x_BLHD in enumerate(qkv):
            x_BLPHD = x_BLHD.unflatten(2, (ranks, -1))[:, :, :, heads]
            sent_PBL3HD[:, :, :, index] = x_BLPHD.permute(2, 0, 1, 3, 4)
        per_token = 3 * _numel_per_token(qkv[0], heads)
        received = [count * per_token for count in self.lengths]
        return self._all_to_all(sent_PBL3HD.flatten(), received, [length * per_token] * ranks)

    def _unpack_qkv(self, received: Tensor, like_BLHD: Tensor, heads: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v `[B, all ranks' L, heads, D]`, as `_scatter_heads` received them; views if B is 1."""
        batch, channels, count = like_BLHD.shape[0], like_BLHD.shape[3], heads.stop - heads.start
        if batch == 1:
            q, k, v = received.view(1, sum(self.lengths), 3, count, channels).unbind(2)
            return q, k, v
        parts = received.split([3 * length * _numel_per_token(like_BLHD, heads) for length in self.lengths])
        views = [part.view(batch, n, 3, count, channels) for part, n in zip(parts, self.lengths, strict=True)]
        q, k, v = torch.cat(views, dim=1).unbind(2)
        return q, k, v

    def _scatter_tokens(self, x_BLHD: Tensor) -> PendingAllToAll:
        """Exchange this rank's heads of all tokens for all heads of this rank's tokens."""
        batch, _, heads, channels = x_BLHD.shape
        per_token = batch * heads * channels
        if batch == 1:
            sent = x_BLHD.contiguous().flatten()
        else:
            sent = torch.cat([part.flatten() for part in x_BLHD.split(list(self.lengths), dim=1)])
        received = [self.lengths[self.rank] * per_token] * len(self.lengths)
        return self._all_to_all(sent, received, [length * per_token for length in self.lengths])

    def _all_to_all(self, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> PendingAllToAll:
        received = sent.new_empty(sum(received_sizes))
        work = dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self.group, async_op=True)
        assert work is not None
        return PendingAllToAll(sent, received, work)


def _numel_per_token(x_BLHD: Tensor, heads: slice) -> int:
    """The elements of one token and `heads`, over the batch."""
    batch, _, _, channels = x_BLHD.shape
    return batch * channels * (heads.stop - heads.start)


def heads_per_rank(q_BLHD: Tensor, ranks: int) -> int:
    """Return how many heads each rank attends with. Raises ConfigError if the number of ranks does not divide them."""
    if q_BLHD.shape[2] % ranks:
        raise ConfigError(f"{q_BLHD.shape[2]} heads cannot be shared evenly by {ranks} ranks.", hint="Use a ring.")
    return q_BLHD.shape[2] // ranks


def even_slices(count: int, groups: int) -> list[slice]:
    """Split `0:count` into at most `groups` slices whose lengths differ by one at most."""
    groups = min(groups, count)
    cuts = [count * index // groups for index in range(groups + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]
