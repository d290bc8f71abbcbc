"""Products in 8 bits through the engine: what is recorded, what is refused, and what becomes of them when they fail."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wanduet.doors.cli.commands import report
from wanduet.doors.cli.places import parse_place
from wanduet.engine.job import Job
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError
from wanduet.kernels import verdicts
from wanduet.kernels.dit.quantized import TORCH_QUANTIZED, QuantizedRows
from wanduet.media.latents import load_latents
from wanduet.media.read import read_metadata
from wanduet.runtime import dit_host
from wanduet.sampling.denoise import StepInfo

FORMATS = ("fp8", "int8")


@pytest.fixture
def run(submit):
    """Run a job with products in a format; its latents, and its metadata."""

    def whole(format: str, name: str = "", **options) -> tuple[torch.Tensor, dict, Job]:
        job = submit(
            name or format, changes={} if format == "off" else {"quantize": format}, save_latents=True, **options
        )
        (video,) = job.result().videos
        return load_latents(video.latents_path)[0], video.provenance, job

    return whole


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch, engine: Engine):
    """Let the engine choose these kernels, in this test only."""

    def choose(**operations: object) -> None:
        kernels = replace(TORCH_QUANTIZED, name="test", **operations)
        monkeypatch.setattr(dit_host, "quantized_kernels_for", lambda *_: kernels)
        forget()

    def forget() -> None:
        if engine.models.transformer.loaded is not None:
            engine.models.transformer.loaded.quantized = None

    yield choose
    forget()
    verdicts.forget()


@pytest.mark.parametrize("format", FORMATS)
def test_a_video_is_almost_the_same_and_says_what_was_done(run, engine: Engine, tmp_path: Path, format: str) -> None:
    (exact, _, plain), (got, about, job) = run("off"), run(format)
    assert 0 < (got - exact).norm() / exact.norm() < 0.1
    shown, place = report(job, job.result(), parse_place(f"{tmp_path}/")), parse_place(f"{tmp_path}/")
    layers = 6 * engine.models.spec.transformer.num_layers
    for found in (about, read_metadata(tmp_path / f"{format}.mkv"), shown, shown["videos"][0]):
        assert found["quantized_layers"] == layers
    assert shown["settings"]["quantize"] == about["request"]["quantize"] == format
    assert about["engine"]["kernels"] == f"torch; {format}: torch"
    (choice,) = (choice for choice in shown["plan"]["choices"] if choice["setting"] == "quantize")
    assert (choice["value"], str(layers) in choice["why"]) == (format, True)
    everything = json.dumps([report(plain, plain.result(), place), read_metadata(tmp_path / "off.mkv")])
    assert not any(f'"{word}"' in everything for word in ("quantize", "quantized_layers"))


def test_the_next_job_is_exact_again(run) -> None:
    before, between, after = (run(format, name)[0] for format, name in (("off", "a"), ("int8", "b"), ("off", "c")))
    assert torch.equal(after, before)
    assert not torch.equal(between, before)


def test_an_interrupted_job_goes_on_bit_for_bit(run, submit) -> None:
    whole, *_ = run("fp8", "whole")
    seen: list[int] = []

    def stop(info: StepInfo) -> None:
        seen.append(info.step)
        jobs[-1].cancel()

    jobs = []
    jobs.append(submit("cut", changes={"quantize": "fp8"}, save_latents=True, watch=stop))
    with pytest.raises(CancelledError):
        jobs[-1].result()
    again, about, _ = run("fp8", "cut", resume=True, watch=lambda info: seen.append(info.step))
    assert seen == [0, 1, 2, 3]
    assert torch.equal(again, whole)
    assert about["quantized_layers"] > 0


def test_nan_is_computed_again_with_exact_products(run, chosen) -> None:
    def nan(x: torch.Tensor, out: QuantizedRows) -> None:
        TORCH_QUANTIZED.quantize(x, out)
        out.scale.fill_(torch.nan)

    exact, *_ = run("off")
    chosen(quantize=nan)
    got, about, _ = run("int8")
    assert torch.equal(got, exact)
    assert about["quantized_layers"] == 0
    assert any("plain kernels after NaN" in note for note in about["rungs"])


def test_a_kernel_that_fails_is_replaced_by_its_plain_form(run, chosen) -> None:
    def broken(*operands: object) -> None:
        raise RuntimeError("no such instruction")

    expected, *_ = run("int8", "expected")
    chosen(quantize_gelu=broken)
    got, about, _ = run("int8")
    assert torch.equal(got, expected)
    assert "denoise: plain quantize_gelu (RuntimeError: no such instruction)" in about["rungs"]
    assert about["engine"]["kernels"] == "torch; int8: test without quantize_gelu"
