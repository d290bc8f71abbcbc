"""One decode over the ranks of a group: each rank decodes a row tile, in order from top to bottom.

Rank 0 computes the (small) mid block on whole frames, sends its features to all other ranks, and has a smaller tile in
return. In each layer, a rank sends the halo, the rows that it and the rank below both read, and goes on. The rank below
computes the same layer at the same time; its device waits only for the halo. So no row is computed twice, and no rank
waits for a whole frame.
"""

from collections.abc import Iterator
from itertools import accumulate, pairwise

from torch import Tensor

from wanduet.distributed.collectives import PendingSend, isend, recv
from wanduet.distributed.rank import Rank
from wanduet.distributed.split import split_lengths
from wanduet.models.vae.layers import FeatureCache
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import Rows
from wanduet.models.vae.stream import DecodePart, Frames, decode_stream
from wanduet.models.vae.tiles import Halo, share_decode


def decode_share(
    rank: Rank, vae: WanVAE, latents: Tensor, speeds: tuple[float, ...]
) -> Iterator[tuple[Rows, Frames]]:  # fmt: skip
    """Yield this rank's rows of each latent frame's pixels (see `decode_stream`); faster ranks have more rows.

    `latents`: `[16, T, h, w]`. `speeds`: relative speed of each rank. All ranks must call this and iterate together; it
    ends early, after the same latent frame on all of them, if their task is cancelled; then no rank waits for a halo.
    If rank 0 is too slow to compute the mid block for all, each rank computes it; if frames are too small to exchange
    halos, each rank computes its own.
    """
    height, decoder = latents.shape[2] * vae.spec.spatial_stride, vae.decoder
    strips, one_mid = share_decode(decoder.mid_layers, decoder.local_layers, height, speeds)
    mid: SentMidBlock | ReceivedMidBlock | None = None
    if one_mid:
        others = tuple(range(1, rank.world_size))
        mid = SentMidBlock(vae, others) if rank.index == 0 else ReceivedMidBlock(vae)
    above = below = None
    if strips is None:
        cuts = accumulate(split_lengths(height, speeds), initial=0)
        strips = tuple(Rows(start, stop, height) for start, stop in pairwise(cuts))
    else:
        above = ReceivedHalo(strips[rank.index - 1], rank.index - 1) if rank.index > 0 else None
        below = SentHalo(strips[rank.index], rank.index + 1) if rank.index < rank.world_size - 1 else None
    mine = strips[rank.index]
    if rank.cancelled():  # before it has begun
        return
    for pixels in decode_stream(vae, latents, part=DecodePart(mine, above, below, mid)):
        yield mine, pixels
        if rank.cancelled_in_step():
            break
    if below is not None:
        below.finish()
    if isinstance(mid, SentMidBlock):
        mid.finish()


class SentMidBlock:
    """Computes the mid block and sends its features to other ranks."""

    def __init__(self, vae: WanVAE, ranks: tuple[int, ...]) -> None:
        self._vae, self._ranks = vae, ranks
        self._under_way: PendingSend | None = None

    def __call__(self, z: Tensor, past: FeatureCache) -> tuple[Tensor, FeatureCache]:
        """See `WanVAE.decode_mid`. The send goes on in the background."""
        mid, past = self._vae.decode_mid(z, past)
        self.finish()
        self._under_way = isend(mid.permute(0, 2, 3, 4, 1), *self._ranks)
        return mid, past

    def finish(self) -> None:
        """Wait for the last send."""
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None


class ReceivedMidBlock:
    """Receives the mid block's features from rank 0."""

    def __init__(self, vae: WanVAE) -> None:
        self._channels = vae.spec.base_dim * vae.spec.dim_mult[-1]

    def __call__(self, z: Tensor, past: FeatureCache) -> tuple[Tensor, FeatureCache]:
        """See `WanVAE.decode_mid`; the feature cache is not used, and the returned one is None."""
        batch, _, frames, rows, columns = z.shape
        mid = recv((batch, frames, rows, columns, self._channels), z, rank=0)
        return mid.permute(0, 4, 1, 2, 3), None


class SentHalo(Halo):
    """The halo that this rank sends to the rank below."""

    def __init__(self, wanted: Rows, rank: int) -> None:
        super().__init__(wanted)
        self._rank = rank
        self._under_way: dict[int, PendingSend] = {}

    def store(self, index: int, x: Tensor) -> None:
        """Send rows `[B, C, T, rows, w]`, in channels-last memory format."""
        before = self._under_way.pop(index, None)
        if before is not None:
            before.wait()
        self._under_way[index] = isend(x.permute(0, 2, 3, 4, 1), self._rank)

    def finish(self) -> None:
        """Wait for all sends."""
        for sending in self._under_way.values():
            sending.wait()
        self._under_way.clear()


class ReceivedHalo(Halo):
    """The halo that this rank receives from the rank above."""

    def __init__(self, wanted: Rows, rank: int) -> None:
        super().__init__(wanted)
        self._rank = rank

    def load(self, index: int, below: Tensor | None, count: int) -> Tensor:
        """Receive `count` rows, with the frames, channels and columns of `below` (`[B, C, T, rows, w]`)."""
        assert below is not None, "strips that share work have new rows at each layer"
        batch, channels, frames, _, columns = below.shape
        return recv((batch, frames, count, columns, channels), below, self._rank).permute(0, 4, 1, 2, 3)
