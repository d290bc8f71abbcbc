"""A decode over several ranks against one on its own, float32 on the CPU."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from wanduet.distributed.launch import run_on_ranks
from wanduet.distributed.rank import Rank
from wanduet.engine.rank_decode import SentHalo, decode_share
from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import Rows
from wanduet.models.vae.stream import decode_stream
from wanduet.models.vae.tiles import share_work

SPEC = replace(WAN_1_3B.vae, base_dim=8, num_res_blocks=1)
Case = tuple[tuple[int, int, int], tuple[float, ...]]  # latent frames, rows and columns; speeds
TALL, LOW = (3, 24, 3), (3, 3, 4)
CASES: dict[int, list[Case]] = {
    2: [(TALL, (1.0, 1.0)), (TALL, (1.0, 0.4)), (TALL, (0.05, 1.0)), (LOW, (1.0, 1.0))],
    3: [(TALL, (1.0, 1.0, 1.0)), (TALL, (0.5, 1.0, 0.7))],
}


def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(SPEC).eval().requires_grad_(False)


def latents(shape: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(16, *shape, generator=torch.Generator().manual_seed(1))


def shares(rank: Rank, cases: list[Case]) -> list[tuple[int, int, np.ndarray]]:
    """First row, last row and pixels of each case."""
    found = []
    for shape, speeds in cases:
        parts = [(rows, pixels.copy()) for rows, pixels in decode_share(rank, vae(), latents(shape), speeds)]
        rows = parts[0][0]
        found.append((rows.start, rows.stop, np.concatenate([pixels for _, pixels in parts])))
    return found


@pytest.mark.parametrize("ranks", CASES)
def test_shares_of_ranks_are_the_whole(monkeypatch, ranks) -> None:
    # Workers import this file by its name from the repository's root.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3]))
    of_ranks = run_on_ranks(shares, ["cpu"] * ranks, CASES[ranks], timeout_s=60.0)
    for index, (shape, _) in enumerate(CASES[ranks]):
        expected = np.concatenate([chunk.copy() for chunk in decode_stream(vae(), latents(shape))])
        assert [a[index][1] for a in of_ranks[:-1]] == [b[index][0] for b in of_ranks[1:]]
        difference = np.abs(np.concatenate([r[index][2] for r in of_ranks], axis=1).astype(int) - expected)
        assert difference.max() <= 1  # a float on a rounding border
        assert (difference > 0).mean() < 1e-3


def test_what_is_sent_is_a_copy(monkeypatch) -> None:
    """On a GPU a layer may overwrite its input while that travels."""
    sent: list[torch.Tensor] = []

    class Work:
        def wait(self) -> None: ...

    monkeypatch.setattr(torch.distributed, "isend", lambda rows, rank: sent.append(rows) or Work())
    halo = SentHalo(Rows.whole(8), 1)
    for frames in (1, 2):
        x = torch.randn(1, 16, frames, 4, 5).to(memory_format=torch.channels_last_3d)
        expected = x[:, :, :, 1:].permute(0, 2, 3, 4, 1).clone()
        halo.store(0, x[:, :, :, 1:])
        x.zero_()
        assert torch.equal(sent[-1], expected)
        assert sent[-1].is_contiguous()


def test_work_is_shared_in_proportion_and_no_row_has_a_halo() -> None:
    layers = vae().decoder.local_layers
    top, low = share_work(layers, 480, (1.0, 1.0))
    assert (top.start, top.stop) == (0, low.start)
    assert low.stop == 480
    assert top.count < 240  # what the rows below it need is computed above
    more, less = share_work(layers, 480, (2.0, 1.0))
    assert more.count > 1.5 * less.count
    with_trunk, _ = share_work(layers, 480, (1.0, 1.0), vae().decoder.mid_layers)
    assert top.count / 2 < with_trunk.count < top.count
    assert share_work(layers, 480, (1.0, 60.0), vae().decoder.mid_layers) is None  # the trunk alone is more
    assert share_work(layers, 24, (1.0, 1.0)) is None  # the upper strip would need all rows of the first layer
    assert len(share_work(layers, 480, (1.0,) * 8)) == 8
