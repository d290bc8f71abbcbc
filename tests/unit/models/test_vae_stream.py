"""Streamed decoding: the same bytes as a whole decode, in every order and cut; memory as predicted."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from wanduet.errors import NonFiniteFramesError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.footprint.vae import decode_bytes, decode_host_bytes
from wanduet.meta.trace import Footprint
from wanduet.models.vae.arena import Arena
from wanduet.models.vae.arena_size import DecodeShape, arena_bytes
from wanduet.models.vae.halo_offload import PIECE_BYTES, HaloOffload
from wanduet.models.vae.model import WanVAE, to_uint8
from wanduet.models.vae.rows import Rows, Tiling
from wanduet.models.vae.stream import DecodePart, decode_stream

SPEC = replace(WAN_1_3B.vae, base_dim=8, num_res_blocks=1)
WHOLE = Tiling()


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(SPEC).eval().requires_grad_(False)


def latents(seed: int, frames: int = 4) -> torch.Tensor:
    return torch.randn(16, frames, 6, 5, generator=torch.Generator().manual_seed(seed))


def whole(vae: WanVAE, z: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return to_uint8(vae.decode(z[None])).numpy()


@pytest.mark.parametrize("order", ["frame", "strip"])
@pytest.mark.parametrize("num_tiles", [1, 3, 7])
def test_equals_whole_decode(vae, order, num_tiles) -> None:
    z = latents(1)
    progress = []
    chunks = [c.copy() for c in decode_stream(vae, z, Tiling(order, num_tiles), lambda *a: progress.append(a))]
    got = np.concatenate(chunks)
    assert got.shape == (13, 48, 40, 3)
    difference = np.abs(got.astype(int) - whole(vae, z).astype(int))
    assert difference.max() <= 1  # a float on a rounding border
    assert (difference > 0).mean() < 1e-3
    assert progress[-1] == (13, 13)


@pytest.mark.parametrize("order", ["frame", "strip"])
def test_some_rows_are_those_of_the_whole(vae, order) -> None:
    z = latents(1)
    rows = Rows(13, 31, 48)
    got = np.concatenate([c.copy() for c in decode_stream(vae, z, Tiling(order, 2), part=DecodePart(rows))])
    expected = whole(vae, z)[:, 13:31]
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


def test_two_interleaved_videos_keep_to_themselves(vae) -> None:
    one, two = latents(2), latents(3, frames=3)
    streams = [decode_stream(vae, one), decode_stream(vae, two)]
    got: list[list[np.ndarray]] = [[], []]
    for turn in (0, 1, 1, 0, 0, 1, 0):
        got[turn].append(next(streams[turn]).copy())
    assert np.array_equal(np.concatenate(got[0]), whole(vae, one))
    assert np.array_equal(np.concatenate(got[1]), whole(vae, two))


@pytest.mark.parametrize("tiling", [Tiling("frame", 1), Tiling("frame", 2), Tiling("strip", 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_becomes_no_frame(vae, tiling, value, monkeypatch) -> None:
    decode_rows, calls = WanVAE.decode_rows, []

    def poisoned(self, *values):
        pixels, feature_cache = decode_rows(self, *values)
        calls.append(values)
        if len(calls) == 4:
            pixels[0, 1, 0, 2, 3] = value
        return pixels, feature_cache

    monkeypatch.setattr(WanVAE, "decode_rows", poisoned)
    with pytest.raises(NonFiniteFramesError, match="NaN or infinity"):
        for _ in decode_stream(vae, latents(2, frames=4), tiling):
            pass


def test_steps_are_pure_unless_caches_are_reused(vae) -> None:
    z = latents(4)[None]
    with torch.no_grad():
        _, feature_cache = vae.decode_step(z[:, :, :1], None)
        first, _ = vae.decode_step(z[:, :, 1:2], feature_cache)
        again, _ = vae.decode_step(z[:, :, 1:2], feature_cache)
    assert torch.equal(first, again)


def test_an_arena_changes_nothing_and_is_as_large_as_predicted(vae) -> None:
    z = latents(5)
    predicted = arena_bytes(DecodeShape(SPEC, 48, 40, 13), (Rows.whole(48),))
    arena, feature_cache = Arena(predicted, torch.device("cpu")), None
    frames = []
    with torch.no_grad():
        for step in z[None].split(1, dim=2):
            vae.reuse_caches(arena=arena)
            pixels, feature_cache = vae.decode_step(step, feature_cache)
            frames.append(to_uint8(pixels).numpy())
    vae.reuse_caches(False)
    assert np.array_equal(np.concatenate(frames), whole(vae, z))
    assert predicted - 512 < arena._used <= predicted


def test_a_full_arena_is_no_failure() -> None:
    full = Arena(100, torch.device("cpu"))
    frames = torch.randn(1, 3, 2, 4, 5)
    assert torch.equal(full.clone(frames), frames)
    small = Arena(4096, torch.device("cpu"))
    kept = [small.clone(frames + i) for i in range(5)]
    small.reset()
    again = small.clone(frames - 1)
    assert torch.equal(again, frames - 1)
    assert again.data_ptr() == kept[0].data_ptr() != kept[1].data_ptr()


def test_weights_rounded_for_tf32_are_the_nearest() -> None:
    model = WanVAE(SPEC)
    before = model.decoder.conv_in.weight.detach().clone()
    model.round_to_tf32()
    after = model.decoder.conv_in.weight.detach()
    assert not (after.view(torch.int32) & 0x1FFF).any()
    assert 2**-13 < ((after - before) / before).abs().max() <= 2**-11


def test_footprint_counts_what_is_allocated() -> None:
    with Footprint() as footprint:
        a = torch.empty(1024, device="meta")
        b = a + 1
        assert footprint.allocated == 8192
        del a
        b.add_(1)
    assert (footprint.allocated, footprint.reserved) == (4096, 8192)


def test_footprint_knows_what_holes_cost() -> None:
    mib = 2**18  # float32 values
    with Footprint() as footprint:
        hole, rest = torch.empty(4 * mib, device="meta"), torch.empty(4 * mib, device="meta")
        del hole
        small = torch.empty(2 * mib, device="meta")  # in the hole
        large = torch.empty(3 * mib, device="meta")  # which it does not fit any more
        del small
        again = torch.empty(4 * mib, device="meta")  # but this does
        assert len((rest, large, again)) == 3
    assert footprint.reserved == 11 * 2**20


def test_a_prediction_does_not_depend_on_what_was_predicted_before() -> None:
    # A size that no other test asks for: the second time, what the first one traced is known.
    twice = [decode_bytes.__wrapped__(DecodeShape(WAN_1_3B.vae, 496, 832, 81)) for _ in range(2)]
    assert twice[0] == twice[1]


def test_predictions_in_several_threads_are_those_of_one() -> None:
    sizes = [(64, 80 + 16 * i) for i in range(6)]

    def predict(size: tuple[int, int]) -> int:
        return decode_bytes.__wrapped__(DecodeShape(SPEC, *size, 81, Tiling("frame", 2)))

    expected = [predict(size) for size in sizes]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(predict, sizes)) == expected


def test_a_rank_of_several_needs_less_than_one_alone_and_more_than_its_tile() -> None:
    def predict(ranks: int, tiling: Tiling = WHOLE) -> int:
        return decode_bytes(DecodeShape(WAN_1_3B.vae, 480, 832, 81, tiling), ranks)

    assert predict(1, Tiling("strip", 3)) < predict(2) < predict(1)
    assert predict(4) < predict(2)


def test_offloaded_halos_are_as_large_as_predicted(vae, monkeypatch) -> None:
    offloaded = []
    finish = HaloOffload.finish

    def count(halo: HaloOffload) -> None:
        offloaded.append(sum(x.nbytes for step in halo._steps for x in step.values()))
        finish(halo)

    monkeypatch.setattr(HaloOffload, "finish", count)
    tiling = Tiling("strip", 3)
    for _ in decode_stream(vae, latents(6), tiling):
        pass
    pixels, mid_features = 13 * 48 * 40 * 3, PIECE_BYTES  # all in one piece
    predicted = decode_host_bytes(DecodeShape(SPEC, 48, 40, 13, tiling)) - pixels - mid_features - 2 * PIECE_BYTES
    upper, again, lower, last = offloaded  # each of two halos, after the tile above it and after the one below
    assert again == last == 0  # prefetched rows are freed on the host
    assert upper > 0.7 * predicted
    assert lower > 0.7 * predicted
    assert 0.7 * predicted < max(offloaded) <= predicted  # the first step has fewer frames


def test_prediction_does_not_grow_with_frames_and_shrinks_with_tiles() -> None:
    def predict(frames: int, order: str, num_tiles: int) -> int:
        return decode_bytes(DecodeShape(WAN_1_3B.vae, 480, 832, frames, Tiling(order, num_tiles)))

    assert predict(81, "frame", 1) == predict(801, "frame", 1)
    assert predict(81, "frame", 4) < 0.9 * predict(81, "frame", 1)
    assert predict(81, "strip", 4) < 0.5 * predict(81, "frame", 4)
