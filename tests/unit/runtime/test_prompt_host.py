"""The text encoder on a device of its own: `cpu:0` stands for a GPU."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from wanduet.config import EngineConfig
from wanduet.models.text.umt5 import TextEncoder
from wanduet.planning.plan import TextPlan
from wanduet.runtime.models import Models

DEVICE = "cpu:0"
ON_DEVICE, ON_CPU = TextPlan("float32", "resident", DEVICE), TextPlan("float32", "streamed")
CIRCLE = "a red circle moving left"


@pytest.fixture
def models(tmp_path: Path) -> Iterator[Models]:
    found = Models(EngineConfig(model="miniature", data_dir=tmp_path, cache_embeddings=False))
    yield found
    found.unload()


def loaded(models: Models) -> int:
    """Layers in the encoder's memory."""
    encoder = models.text(ON_DEVICE)._encoder
    return 0 if encoder is None else len(encoder._layers)


@pytest.mark.parametrize("residency", ["resident", "streamed"])
def test_a_device_gives_the_cpu_s_embeddings(models, residency) -> None:
    expected = models.text(ON_CPU).encode([CIRCLE, ""])
    got = models.text(TextPlan("float32", residency, DEVICE)).encode([CIRCLE, ""])
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.embeds, other.embeds)
        assert one.embeds.device == torch.device("cpu")


def test_bfloat16_is_near_float32(models) -> None:
    exact = models.text(ON_CPU).encode([CIRCLE])[0].embeds
    half = models.text(TextPlan("bfloat16", "resident", DEVICE)).encode([CIRCLE])[0].embeds
    assert 1e-5 < (half - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize(("dtype", "largest"), [("q8", 0.03), ("fp8", 0.06)])
def test_matrices_in_8_bits_are_near_and_the_same_in_either_residency(models, dtype: str, largest: float) -> None:
    half = models.text(TextPlan("bfloat16", "streamed")).encode([CIRCLE])[0].embeds
    found = {}
    for residency in ("streamed", "resident"):
        encoder = models.text(TextPlan(dtype, residency))
        found[residency] = encoder.encode([CIRCLE])[0]
        again = encoder.encode([CIRCLE])[0]
        assert torch.equal(again.embeds, found[residency].embeds)
    assert torch.equal(found["streamed"].embeds, found["resident"].embeds)
    assert 1e-4 < (found["resident"].embeds - half).norm() / half.norm() < largest
    assert found["resident"].dtype == dtype
    (stored, *_) = encoder._encoder._stored.values()
    wide, spec = sum(weight.nbytes for weight in stored.values()), models.spec.text_encoder
    parameters = 4 * spec.d_model * spec.num_heads * spec.d_kv + 3 * spec.d_model * spec.d_ff
    assert parameters < wide < 1.15 * parameters


def test_embeddings_in_8_bits_have_an_entry_of_their_own_in_the_cache(tmp_path) -> None:
    models = Models(EngineConfig(model="miniature", data_dir=tmp_path))
    paths = {dtype: models.text(TextPlan(dtype, "streamed")).path_of(CIRCLE) for dtype in ("bfloat16", "q8", "fp8")}
    assert len(set(paths.values())) == 3
    models.unload()


def test_a_prompt_waits_for_the_device_and_a_cached_one_does_not(tmp_path) -> None:
    models = Models(EngineConfig(model="miniature", data_dir=tmp_path))
    encoder = models.text(ON_DEVICE)
    with models.locks.take(DEVICE):
        waiting = threading.Thread(target=encoder.encode, args=([CIRCLE],))
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(60)
    assert not waiting.is_alive()
    with models.locks.take(DEVICE):
        cached = threading.Thread(target=encoder.encode, args=([CIRCLE],))
        cached.start()
        cached.join(60)
        assert not cached.is_alive()


def test_a_job_whose_plan_leaves_no_room_frees_it(models) -> None:
    models.text(ON_DEVICE).encode([CIRCLE])
    assert loaded(models) > 0
    models.prompts.make_room(DEVICE, ON_DEVICE)
    models.prompts.make_room("cpu:1", ON_CPU)
    assert loaded(models) > 0
    models.prompts.make_room(DEVICE, ON_CPU)
    assert loaded(models) == 0
    models.text(ON_DEVICE).encode([CIRCLE])  # loads it again
    assert loaded(models) > 0


def test_another_plan_frees_the_memory_of_the_one_before(models) -> None:
    before = models.text(ON_DEVICE)
    before.encode([CIRCLE])
    models.text(ON_CPU)
    assert before._encoder is None


def test_without_memory_on_the_device_the_cpu_goes_on(models, monkeypatch, caplog) -> None:
    expected = models.text(ON_CPU).encode([CIRCLE])[0].embeds
    whole = TextEncoder.encode

    def encode(self, *args, **keywords):
        if str(self._device) == DEVICE:
            raise torch.OutOfMemoryError("Tried to allocate 9 GiB. Long advice.")
        return whole(self, *args, **keywords)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    encoder = models.text(ON_DEVICE)
    assert torch.equal(encoder.encode([CIRCLE])[0].embeds, expected)
    assert "too little memory on cpu:0 (Tried to allocate 9 GiB)" in caplog.text
    assert torch.equal(encoder.encode([CIRCLE])[0].embeds, expected)
