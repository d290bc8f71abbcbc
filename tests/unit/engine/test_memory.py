"""Bytes that are planned with: the text's, the decode's on the host."""

import pytest

from wanduet.engine.memory import text_positions
from wanduet.models.tokenizer import Tokenizer
from wanduet.models.vae_memory import decode_host_bytes
from wanduet.models.vae_rows import DecodePlan
from wanduet.specs import VAESpec
from wanduet.weights.download import open_model


@pytest.mark.parametrize("text", ["", "a red circle", "🙂 𝔸𝔹", "x" * 700, "zq" * 90, "&amp;" * 30, "ﬁne"])
def test_a_prompt_never_has_more_positions_than_planned(text: str) -> None:
    tokens = len(Tokenizer(open_model("miniature").path / "tokenizer")(text).ids)
    assert min(512, tokens + 1) <= text_positions(text, 512) <= 512


def test_a_short_prompt_is_planned_short() -> None:
    assert text_positions("a red circle", 512) < 20


def test_strips_wait_on_the_host_and_frames_do_not() -> None:
    def needed(frames: int, order: str) -> int:
        return decode_host_bytes(VAESpec(), 480, 832, frames, DecodePlan(order, 2), "float32")

    assert needed(81, "frame") == needed(161, "frame") < 12 * 2**20
    steps, middle, pixels = 20, 384 * 60 * 104 * 4, 80 * 480 * 832 * 3
    grown = needed(161, "strip") - needed(81, "strip")
    # Of each step also what a strip hands on: of the rows it ends with, some from each of 13 layers.
    assert 2 < (grown - pixels) / (steps * middle) < 8
