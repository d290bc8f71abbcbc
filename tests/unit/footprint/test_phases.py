"""Bytes that are planned with: the text's, the decode's on the host."""

import pytest

from wanduet.distributed.mesh import Layout
from wanduet.family.specs import WAN_1_3B, VAESpec
from wanduet.footprint.dit import ForwardShape, buffer_bytes, forward_bytes
from wanduet.footprint.phases import text_positions
from wanduet.footprint.vae import decode_host_bytes
from wanduet.models.text.tokenizer import Tokenizer
from wanduet.models.vae.arena_size import DecodeShape
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
        return decode_host_bytes(DecodeShape(VAESpec(), 480, 832, frames, Tiling(order, 2)))

    assert needed(81, "frame") == needed(161, "frame") < 12 * 2**20
    steps, mid_features, pixels = 20, 384 * 60 * 104 * 4, 80 * 480 * 832 * 3
    grown = needed(161, "strip") - needed(81, "strip")
    # Each step also adds the halo: the last rows of the inputs of 13 layers.
    assert 2 < (grown - pixels) / (steps * mid_features) < 8


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
