"""Ulysses: ranks swap tokens for heads, so that each attends over the whole sequence with some heads.

Source: DeepSpeed-Ulysses (arXiv 2309.14509). Here in groups of heads: the next group's queries, keys and
values, and the last group's results, travel while a group is attended to.

Letters in names: B batch, L tokens, H heads, D channels a head, P ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch import distributed as dist

from wanduet.errors import ConfigError
from wanduet.kernels.attention.backends import AttentionFn


@dataclass(frozen=True, slots=True)
class Exchange:
    """An all-to-all under way."""

    sent: Tensor  # kept alive until the exchange is over
    received: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        """What arrived; on a GPU the current stream waits, not the host."""
        self.work.wait()
        return self.received


@dataclass(frozen=True, slots=True)
class HeadExchange:
    """Swaps tokens for heads within `group`, whose ranks hold `lengths` tokens; this is rank `rank`."""

    group: dist.ProcessGroup
    lengths: Sequence[int]
    rank: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor, attend_whole: AttentionFn, groups: int) -> Tensor:
        """Attention of this rank's queries, all heads; q, k, v and result `[B, this rank's L, H, D]`.

        `attend_whole` is given all ranks' tokens and some heads, `groups` times. Raises ConfigError if the
        ranks do not divide the heads.
        """
        ranks = len(self.lengths)
        heads_each = heads_of_rank(q, ranks)
        out_BLHD = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        out_BLPHD = out_BLHD.unflatten(2, (ranks, -1))
        head_slices = slices(heads_each, groups)
        arriving = [self._send_heads((q, k, v), head_slices[0])]
        leaving: list[Exchange] = []
        for index, heads in enumerate(head_slices):
            if index + 1 < len(head_slices):
                arriving.append(self._send_heads((q, k, v), head_slices[index + 1]))
            whole = self._as_sequences(arriving.pop(0).wait(), q, heads)
            leaving.append(self._send_tokens(attend_whole(*whole)))
        for heads, exchange in zip(head_slices, leaving, strict=True):
            received_PBLHD = exchange.wait().view(ranks, *q.shape[:2], heads.stop - heads.start, q.shape[3])
            out_BLPHD[:, :, :, heads] = received_PBLHD.permute(1, 2, 0, 3, 4)
        return out_BLHD

    def _send_heads(self, qkv: tuple[Tensor, Tensor, Tensor], heads: slice) -> Exchange:
        """Every rank's heads of this rank's tokens, for this rank's heads of every rank's tokens: q, k, v together."""
        ranks, (batch, length, _, channels) = len(self.lengths), qkv[0].shape
        sent_PBL3HD = qkv[0].new_empty(ranks, batch, length, 3, heads.stop - heads.start, channels)
        for index, x_BLHD in enumerate(qkv):
            x_BLPHD = x_BLHD.unflatten(2, (ranks, -1))[:, :, :, heads]
            sent_PBL3HD[:, :, :, index] = x_BLPHD.permute(2, 0, 1, 3, 4)
        per_token = 3 * _per_token(qkv[0], heads)
        received = [count * per_token for count in self.lengths]
        return self._exchange(sent_PBL3HD.flatten(), received, [length * per_token] * ranks)

    def _as_sequences(self, received: Tensor, like_BLHD: Tensor, heads: slice) -> tuple[Tensor, ...]:
        """What `_send_heads` brought, as q, k, v `[B, all ranks' L, heads, D]`; no copy for a batch of one."""
        batch, channels, count = like_BLHD.shape[0], like_BLHD.shape[3], heads.stop - heads.start
        if batch == 1:
            return received.view(1, sum(self.lengths), 3, count, channels).unbind(2)
        parts = received.split([3 * length * _per_token(like_BLHD, heads) for length in self.lengths])
        views = [part.view(batch, n, 3, count, channels) for part, n in zip(parts, self.lengths, strict=True)]
        return torch.cat(views, dim=1).unbind(2)

    def _send_tokens(self, x_BLHD: Tensor) -> Exchange:
        """Every rank's tokens of this rank's heads, for every rank's heads of this rank's tokens."""
        batch, _, heads, channels = x_BLHD.shape
        per_token = batch * heads * channels
        if batch == 1:
            sent = x_BLHD.contiguous().flatten()
        else:
            sent = torch.cat([part.flatten() for part in x_BLHD.split(list(self.lengths), dim=1)])
        received = [self.lengths[self.rank] * per_token] * len(self.lengths)
        return self._exchange(sent, received, [length * per_token for length in self.lengths])

    def _exchange(self, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> Exchange:
        received = sent.new_empty(sum(received_sizes))
        work = dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self.group, async_op=True)
        assert work is not None
        return Exchange(sent, received, work)


def _per_token(x_BLHD: Tensor, heads: slice) -> int:
    batch, _, _, channels = x_BLHD.shape
    return batch * channels * len(range(heads.start, heads.stop))


def heads_of_rank(q_BLHD: Tensor, ranks: int) -> int:
    """How many heads each of so many ranks attends with. Raises ConfigError if they do not divide them."""
    if q_BLHD.shape[2] % ranks:
        raise ConfigError(f"{q_BLHD.shape[2]} heads cannot be shared evenly by {ranks} ranks.", hint="Use a ring.")
    return q_BLHD.shape[2] // ranks


def slices(count: int, groups: int) -> list[slice]:
    """`0:count` in at most `groups` parts that differ by one at most."""
    groups = min(groups, count)
    cuts = [count * index // groups for index in range(groups + 1)]
    return [slice(start, stop) for start, stop in pairwise(cuts)]
