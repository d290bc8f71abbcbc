"""An input video becomes latents: in bounded memory, beside a decoder that stays as it is, in smaller forms if need be."""

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from wanduet.config import EngineConfig
from wanduet.errors import CancelledError, NonFiniteFramesError, OutOfMemoryError, WeightsError
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import WHOLE_FRAMES
from wanduet.models.vae.stream import Frames, decode_stream
from wanduet.planning.hardware import detect
from wanduet.planning.plan import Plan
from wanduet.planning.planner import make_plan
from wanduet.request import GenerationRequest
from wanduet.runtime.context import Event, RunContext, Timings
from wanduet.runtime.dit_host import TransformerHost
from wanduet.runtime.models import Models
from wanduet.stages.encode_video import encode_video
from wanduet.stages.record import VideoRecord
from wanduet.weights.hub import open_model

VIDEO = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)


def frames() -> Iterator[Frames]:
    chunk = np.empty((4, *VIDEO.shape[1:]), np.uint8)  # reused, as a reader may
    for start, stop in ((0, 1), (1, 5), (5, 9)):
        chunk[: stop - start] = VIDEO[start:stop]
        yield chunk[: stop - start]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Iterator[Models]:
    models = Models(EngineConfig(model="miniature", devices="cpu", data_dir=tmp_path_factory.mktemp("data")))
    yield models
    models.unload()


@pytest.fixture(scope="module")
def plan(models) -> Plan:
    request = GenerationRequest(prompt="x", height=32, width=48, num_frames=9).resolve(models.spec)
    return make_plan(request, models.memory, models.config, detect())


@pytest.fixture(scope="module")
def whole(models, plan) -> torch.Tensor:
    return encode(models, plan)


def encode(models: Models, plan: Plan, record: VideoRecord | None = None, given=frames, **hooks) -> torch.Tensor:
    record = record or VideoRecord(0, 0)
    context = RunContext(note=record.note, wait=lambda _: None, **hooks)
    return encode_video(models, plan, given, record, context, num_frames=9)


def test_progress_and_seconds_are_reported(models, plan, whole) -> None:
    events: list[Event] = []
    timings = Timings()
    again = encode(models, plan, emit=events.append, add_time=timings.add)
    assert torch.equal(again, whole)
    assert (whole.dtype, whole.shape) == (torch.float32, models.spec.latent_shape(32, 48, 9))
    assert [(e.phase, e.done, e.total) for e in events] == [("encode_video", n, 9) for n in (1, 5, 9)]
    in_strips = replace(plan, vae=replace(plan.vae, encode_tiles=2))
    assert torch.allclose(encode(models, in_strips, emit=events.append), whole, atol=1e-5)
    assert [event.done for event in events[3:]] == [0, 2, 4, 5, 7, 9]
    assert Timings.sum(timings)["encode_video_s"] > 0
    assert "encode_video_s" not in Timings.sum(Timings())


def test_a_decode_is_the_same_after_an_encode_and_no_encoder_stays(models, plan, whole, monkeypatch) -> None:
    def decode() -> Frames:
        return np.concatenate([chunk.copy() for chunk in decode_stream(models.vae.load("cpu", "float32"), whole)])

    before, encoders = decode(), []
    rows = WanVAE.encode_rows
    monkeypatch.setattr(WanVAE, "encode_rows", lambda self, *a: encoders.append(self) or rows(self, *a))
    encode(models, plan)
    assert np.array_equal(decode(), before)
    assert {sum(p.numel() for p in vae.parameters() if not p.is_meta) for vae in encoders} == {0}
    assert all(p.is_meta for name, p in models.vae.loaded.named_parameters() if WanVAE.encodes(name))


def test_out_of_memory_takes_more_tiles_then_the_cpu(models, plan, whole, monkeypatch) -> None:
    on_a_gpu = replace(plan, vae=replace(plan.vae, device="meta"))  # meta stands for a GPU
    rows, asked = WanVAE.encode_rows, []

    def only_on_the_cpu(self, pixels, *values):
        if pixels.is_meta:
            asked.append(values[1].count)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return rows(self, pixels, *values)

    monkeypatch.setattr(WanVAE, "encode_rows", only_on_the_cpu)
    monkeypatch.setattr("wanduet.runtime.selftest.check_vae_encoder", lambda _: 1.0)
    record = VideoRecord(0, 0)
    assert torch.allclose(encode(models, on_a_gpu, record), whole, atol=1e-5)
    assert asked == [4, 2, 1, 1, 1, 1]  # of 4 latent rows
    assert record.notes[0] == "encode_video: 2 strips on meta"
    assert record.notes[-1] == "encode_video: 8 strips on cpu"


def test_memory_that_never_suffices_is_an_error(models, plan, monkeypatch) -> None:
    def never(self, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(WanVAE, "encode_rows", never)
    with pytest.raises(OutOfMemoryError, match="input video ran out of memory"):
        encode(models, plan)


def test_a_cancel_ends_it_between_chunks_and_closes_the_file(models, plan) -> None:
    closed, events = [], []

    def read() -> Iterator[Frames]:
        try:
            yield from frames()
        finally:
            closed.append(True)

    with pytest.raises(CancelledError) as error:
        encode(models, plan, given=read, emit=events.append, should_cancel=lambda: len(events) == 2)
    assert [event.done for event in events] == [1, 5]
    assert closed, error  # though the error keeps the frames of its traceback


def test_an_encode_waits_for_a_decode(models, plan, whole, monkeypatch) -> None:
    take, asked = models.locks.take, threading.Event()
    monkeypatch.setattr(models.locks, "take", lambda name: asked.set() or take(name))
    thread = threading.Thread(target=encode, args=(models, plan))
    with models.decoder(plan, "cpu", RunContext()) as vae:
        asked.clear()
        thread.start()
        assert asked.wait(60)
        for _ in decode_stream(vae, whole, WHOLE_FRAMES):
            pass
        thread.join(0.3)
        assert thread.is_alive()
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("counts", [(), (4,), (1, 3), (1, 4, 1)])
def test_other_chunks_are_refused(models, plan, counts) -> None:
    with pytest.raises(ValueError, match="frames"):
        encode(models, plan, given=lambda: (VIDEO[:count] for count in counts))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_no_result(models, plan, monkeypatch, value) -> None:
    mid = WanVAE.encode_mid

    def poisoned(self, *values):
        moments, feature_cache = mid(self, *values)
        return moments * value, feature_cache

    monkeypatch.setattr(WanVAE, "encode_mid", poisoned)
    monkeypatch.setattr("wanduet.runtime.selftest.check_vae_encoder", lambda _: 1.0)
    with pytest.raises(NonFiniteFramesError):
        encode(models, plan)


def test_an_encode_waits_for_the_transformer_s_load_and_then_moves_it_away(models, plan, monkeypatch) -> None:
    read, may_load, seen = TransformerHost._read, threading.Event(), []

    def late(self, plan):
        assert may_load.wait(60)
        return read(self, plan)

    monkeypatch.setattr(TransformerHost, "_read", late)
    monkeypatch.setattr(models.transformer, "evict", lambda _: seen.append(models.transformer.loaded is not None))
    request = GenerationRequest(prompt="x", height=32, width=48, num_frames=9).resolve(models.spec)
    swapping = replace(plan, both_resident=False)
    models.transformer.preload(swapping, request, RunContext())
    with pytest.raises(CancelledError):
        encode(models, swapping, should_cancel=iter([False, False, True]).__next__)
    thread = threading.Thread(target=encode, args=(models, swapping))
    thread.start()
    may_load.set()
    thread.join(60)
    assert seen == [True]


def test_a_checkpoint_without_an_encoder_is_refused(tmp_path) -> None:
    folder = Path(shutil.copytree(open_model("miniature").path, tmp_path / "model"))
    (folder / "manifest.json").unlink()
    (file,) = (folder / "vae").glob("*.safetensors")
    save_file({name: x for name, x in load_file(file).items() if not WanVAE.encodes(name)}, file)
    models = Models(EngineConfig(model=str(folder), devices="cpu", data_dir=tmp_path / "data"))
    for needs in (lambda: models.memory, models.vae.encoder("cpu", "float32").__enter__):
        with pytest.raises(WeightsError, match=r"missing: encoder\.\S+ .*and \d+ more"):
            needs()


def test_damaged_weights_are_noticed(models, plan, monkeypatch) -> None:
    monkeypatch.setattr("wanduet.weights.source.WeightSource.load_into", lambda _, targets, **__: [
        target.zero_() for target in targets.values()
    ])  # fmt: skip
    with pytest.raises(WeightsError, match="encoder's self-test"):
        encode(models, plan)
