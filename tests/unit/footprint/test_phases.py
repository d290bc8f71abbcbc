"""Bytes that are planned with: the text's, the decode's on the host."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from wanduet.distributed.mesh import Layout
from wanduet.family.wan21 import WAN_1_3B
from wanduet.footprint.dit import ForwardShape, buffer_bytes, forward_bytes
from wanduet.footprint.phases import text_positions
from wanduet.footprint.vae import CUDNN_BYTES, CUDNN_SHARE, decode_host_bytes, encode_bytes, encode_host_bytes
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS
from wanduet.meta.trace import Footprint
from wanduet.models.text.tokenizer import Tokenizer
from wanduet.models.vae.arena_size import DecodeShape, meta_vae
from wanduet.models.vae.encode import encode_stream
from wanduet.models.vae.rows import Tiling
from wanduet.weights.hub import open_model


@pytest.mark.parametrize("text", ["", "a red circle", "🙂 𝔸𝔹", "x" * 700, "zq" * 90, "&amp;" * 30, "ﬁne"])
def test_a_prompt_never_has_more_positions_than_planned(text: str) -> None:
    tokens = len(Tokenizer(open_model("miniature").path / "tokenizer")(text).ids)
    assert min(512, tokens + 1) <= text_positions(text, 512) <= 512


def test_a_short_prompt_is_planned_short() -> None:
    assert text_positions("a red circle", 512) < 20


def test_tile_major_takes_host_memory_for_each_frame_and_frame_major_does_not() -> None:
    def needed(frames: int, order: str) -> int:
        return decode_host_bytes(DecodeShape(WAN_1_3B.vae, 480, 832, frames, Tiling(order, 2)))

    assert needed(81, "frame") == needed(161, "frame") < 12 * 2**20
    steps, mid_features, pixels = 20, 384 * 60 * 104 * 4, 80 * 480 * 832 * 3
    grown = needed(161, "strip") - needed(81, "strip")
    # Each step also adds the halo: the last rows of the inputs of 13 layers.
    assert 2 < (grown - pixels) / (steps * mid_features) < 8


@pytest.mark.parametrize("num_tiles", [1, 5])
def test_an_encode_takes_what_is_planned_for_any_number_of_frames(num_tiles, monkeypatch) -> None:
    spec = replace(WAN_1_3B.vae, base_dim=32, num_res_blocks=1)
    size = (640, 640)
    vae = meta_vae(spec, torch.float32, VAE_TORCH_KERNELS)
    whole = vae.encode_tiles(size[0], num_tiles)
    monkeypatch.setattr(type(vae), "encode_tiles", lambda *_: AllTiles(whole))
    chunk = np.empty((4, *size, 3), np.uint8)
    with Footprint() as footprint:
        encode_stream(vae, (chunk[:count] for count in (1, 4, 4, 4, 4)), num_tiles)
    monkeypatch.undo()
    planned = encode_bytes(spec, (*size, 81), num_tiles, torch.float32)
    assert (planned - CUDNN_BYTES) / (1 + CUDNN_SHARE) == pytest.approx(footprint.reserved, rel=0.02)
    assert planned <= encode_bytes(spec, (*size, 81), 1, torch.float32)


class AllTiles(list):
    """Tiles of which a prediction does not leave any out."""

    def __getitem__(self, index):
        return self if isinstance(index, slice) else super().__getitem__(index)


def test_an_encode_in_tiles_keeps_frames_and_features_on_the_host() -> None:
    def needed(frames: int, num_tiles: int) -> int:
        return encode_host_bytes(WAN_1_3B.vae, (480, 832, frames), num_tiles, torch.float32)

    latents, pixels, features = 20 * 16 * 60 * 104 * 4, 80 * 480 * 832 * 3, 20 * 384 * 60 * 104 * 4
    assert needed(161, 1) - needed(81, 1) == 2 * latents
    grown = needed(161, 2) - needed(81, 2) - 2 * latents - pixels
    assert 2 * features < grown < 16 * features  # the halos come on top


def test_ranks_are_planned_with_what_they_exchange() -> None:
    spec, shape = WAN_1_3B.transformer, WAN_1_3B.latent_shape(480, 832, 81)

    def needed(layout: Layout) -> int:
        return forward_bytes(ForwardShape(spec, shape, 512, "bfloat16", True, layout))

    tokens, width = 21 * 30 * 52, spec.dim * 2
    kept = buffer_bytes(spec, shape, "bfloat16", Layout(ulysses=2))
    assert kept == 3 * tokens * width // 2 + tokens // 2 * width
    assert buffer_bytes(spec, shape, "bfloat16", Layout(cfg=2)) == 0
    # A rank has half of the residual stream (float32), its pending sum and q, k, v; what it exchanges comes on top.
    half = tokens // 2 * spec.dim * (4 + 2 + 6)
    assert half + kept < needed(Layout(ulysses=2)) < half + 2.5 * kept
    assert needed(Layout(ulysses=4)) < 0.6 * needed(Layout(ulysses=2))
    # Keys and values of two ranks at a time, and a sum in float32.
    assert half + 3 * tokens * width < needed(Layout(ring=2)) < half + 6 * tokens * width
    assert needed(Layout(cfg=2, ulysses=2)) == needed(Layout(ulysses=2))
