"""One decode over the ranks of a group: a strip of rows each, one below the other.

The first rank runs the (small) trunk on whole frames, sends what comes of it to all others, and has fewer rows for that. From
layer to layer a rank sends the rows that it and the one below both read, and goes on; that one computes the same layer at
the same time, and its device waits for them only. So no row is computed twice, and nobody waits for a whole frame.
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
    """This rank's rows of each latent frame's pixels (see `decode_stream`); the faster rank has more of them.

    All ranks must call this, and go on together. Where the first rank is too slow to run the trunk for all, each runs it;
    where frames are too small for strips to hand rows on, each computes a halo of its own.
    """
    height, decoder = latents.shape[2] * vae.spec.spatial_stride, vae.decoder
    strips, one_trunk = share_decode(decoder.mid_layers, decoder.local_layers, height, speeds)
    trunk: SentTrunk | ReceivedTrunk | None = None
    if one_trunk:
        others = tuple(range(1, rank.world_size))
        trunk = SentTrunk(vae, others) if rank.index == 0 else ReceivedTrunk(vae)
    above = below = None
    if strips is None:
        cuts = accumulate(split_lengths(height, speeds), initial=0)
        strips = tuple(Rows(start, stop, height) for start, stop in pairwise(cuts))
    else:
        above = ReceivedHalo(strips[rank.index - 1], rank.index - 1) if rank.index > 0 else None
        below = SentHalo(strips[rank.index], rank.index + 1) if rank.index < rank.world_size - 1 else None
    mine = strips[rank.index]
    for pixels in decode_stream(vae, latents, part=DecodePart(mine, above, below, trunk)):
        yield mine, pixels
    if below is not None:
        below.finish()
    if isinstance(trunk, SentTrunk):
        trunk.finish()


class SentTrunk:
    """The trunk, whose features go to the other ranks too."""

    def __init__(self, vae: WanVAE, ranks: tuple[int, ...]) -> None:
        self._vae, self._ranks = vae, ranks
        self._under_way: PendingSend | None = None

    def __call__(self, z: Tensor, past: FeatureCache) -> tuple[Tensor, FeatureCache]:
        """As `WanVAE.decode_mid`."""
        mid, past = self._vae.decode_mid(z, past)
        self.finish()
        self._under_way = isend(mid.permute(0, 2, 3, 4, 1), *self._ranks)
        return mid, past

    def finish(self) -> None:
        """Wait until all has been sent."""
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None


class ReceivedTrunk:
    """What the first rank's trunk gives."""

    def __init__(self, vae: WanVAE) -> None:
        self._channels = vae.spec.base_dim * vae.spec.dim_mult[-1]

    def __call__(self, z: Tensor, past: FeatureCache) -> tuple[Tensor, FeatureCache]:
        """As `WanVAE.decode_mid`; remembers nothing."""
        batch, _, frames, rows, columns = z.shape
        mid = recv((batch, frames, rows, columns, self._channels), z, rank=0)
        return mid.permute(0, 4, 1, 2, 3), None


class SentHalo(Halo):
    """To the rank below."""

    def __init__(self, wanted: Rows, rank: int) -> None:
        super().__init__(wanted)
        self._rank = rank
        self._under_way: dict[int, PendingSend] = {}

    def store(self, index: int, x: Tensor) -> None:
        """Send rows `[B, C, T, rows, w]`, channels last."""
        before = self._under_way.pop(index, None)
        if before is not None:
            before.wait()
        self._under_way[index] = isend(x.permute(0, 2, 3, 4, 1), self._rank)

    def finish(self) -> None:
        """Wait until all has been sent."""
        for sending in self._under_way.values():
            sending.wait()
        self._under_way.clear()


class ReceivedHalo(Halo):
    """From the rank above."""

    def __init__(self, wanted: Rows, rank: int) -> None:
        super().__init__(wanted)
        self._rank = rank

    def load(self, index: int, below: Tensor | None, count: int) -> Tensor:
        """Receive `count` rows, of the frames, channels and columns of those below."""
        assert below is not None, "strips that share work have new rows at each layer"
        batch, channels, frames, _, columns = below.shape
        return recv((batch, frames, count, columns, channels), below, self._rank).permute(0, 4, 1, 2, 3)
