"""The least that a job's work can take."""

from pathlib import Path

import pytest

from wanduet.config import EngineConfig
from wanduet.engine.job import Job, OutputOptions
from wanduet.engine.roofline import Peaks, Work, measure_peaks, where_it_went, work_of
from wanduet.planning.hardware import DeviceInfo, Hardware
from wanduet.planning.planner import make_plan
from wanduet.request import GenerationRequest
from wanduet.runtime.models import Models

GIB = 2**30


def job_480p(config: EngineConfig, hardware: Hardware, **settings: object) -> tuple[Job, Models]:
    models = Models(config)
    request = GenerationRequest(prompt="x", **settings).resolve(models.spec)  # type: ignore[arg-type]
    plan = make_plan(request, models.memory, config, hardware)
    return Job(request, plan, OutputOptions(Path("x.mp4"))), models


def gpus(count: int) -> Hardware:
    devices = tuple(DeviceInfo(f"cuda:{i}", "H100", 80 * GIB, 79 * GIB, (9, 0), 132) for i in range(count))
    return Hardware(devices, 64 * GIB, 60 * GIB, 16)


def test_the_work_of_480p_is_as_counted_by_hand() -> None:
    job, models = job_480p(EngineConfig(model="random:1.3b"), gpus(1), num_inference_steps=50, guidance_scale=5.0)
    job.add_time("encode_s", 1.0)
    work = work_of(job, models.memory)
    assert work["denoise_s"].flop == pytest.approx(27.9e15, rel=0.002)  # 283 TFLOP a forward, 7 of a step shared
    assert work["denoise_s"].bytes == pytest.approx(100 * 2.65 * GIB, rel=0.01)
    assert work["decode_s"].flop == pytest.approx(275e12, rel=0.01)
    assert work["encode_s"].bytes == pytest.approx(11.4e9, rel=0.02)


def test_two_ranks_and_no_guidance_share_and_halve_the_work() -> None:
    one, models = job_480p(EngineConfig(model="random:1.3b"), gpus(1), guidance_scale=5.0)
    two, _ = job_480p(EngineConfig(model="random:1.3b", strategy="parallel"), gpus(2), guidance_scale=5.0)
    plain, _ = job_480p(EngineConfig(model="random:1.3b"), gpus(1), guidance_scale=1.0)
    flops = [work_of(job, models.memory)["denoise_s"].flop for job in (one, two, plain)]
    assert flops[0] == pytest.approx(2 * flops[1]) == pytest.approx(2 * flops[2], rel=0.02)
    assert "encode_s" not in work_of(one, models.memory)  # its embeddings were kept


def test_the_floor_is_the_slower_of_both_roofs() -> None:
    assert Work(10.0, 1.0, "cpu", "float32").floor(Peaks(2.0, 1.0)) == 5.0
    assert Work(10.0, 9.0, "cpu", "float32").floor(Peaks(2.0, 1.0)) == 9.0


def test_rows_of_a_job_on_this_machine() -> None:
    machine = Hardware((), 8 * GIB, 8 * GIB, 2)
    job, models = job_480p(EngineConfig(model="miniature", devices="cpu"), machine)
    for name, seconds in (("denoise_s", 8.0), ("decode_s", 1.0), ("total_s", 10.0)):
        job.add_time(name, seconds)
    rows = {row["phase"]: row for row in where_it_went(job, models.memory)}
    assert rows["denoise"]["share"] == 0.8
    assert rows["denoise"]["floor_s"] > 0
    assert rows["denoise"]["of_floor"] == pytest.approx(rows["denoise"]["floor_s"] / 8.0, rel=1e-2)
    assert "floor_s" not in rows["write"]


def test_a_text_from_the_cache_has_no_floor() -> None:
    machine = Hardware((), 64 * GIB, 60 * GIB, 2)
    job, models = job_480p(EngineConfig(model="random:1.3b", devices="cpu"), machine)
    job.add_time("encode_s", 0.0008)
    rows = {row["phase"]: row for row in where_it_went(job, models.memory)}
    assert "floor_s" not in rows["encode"]


def test_peaks_of_the_cpu_are_plausible() -> None:
    peaks = measure_peaks("cpu", "float32")
    assert 1e9 < peaks.flop < 1e14
    assert 1e8 < peaks.bytes < 1e12
