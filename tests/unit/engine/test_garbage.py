"""What a job used is free when it has ended, and not only when Python looks for circles of references: on a GPU they would keep
gigabytes, which no plan has counted."""

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError, NonFiniteLatentsError
from wanduet.request import GenerationRequest

SMALL = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4, "seed": 1}
WAIT_SECONDS = 10
RING = Path(__file__).parents[3] / "src" / "wanduet" / "miniature" / "lora" / "ring.safetensors"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two videos": {"num_videos_per_prompt": 2},
    "another sampler": {"sampler": "dpm++2m"},
    "skipped steps": {"step_cache": "easycache:0.2", "num_inference_steps": 14},
    "guidance that ends": {"guidance_gate": 0.5},
    "guidance with memory": {"guidance_mode": "apg"},
    "a low resolution first": {"low_res_first": True, "sampler": "euler", "height": 96, "width": 96},
    "lists of keys": {"sparse": 0.5, "height": 64, "width": 64, "num_frames": 9},
    "8 bits": {"quantize": "int8"},
    "few steps": {
        "sampler": "renoise",
        "timesteps": "1000,757,522",
        "guidance_scale": 1.0,
        "num_inference_steps": None,
    },
    "a LoRA": {"loras": [{"name": str(RING)}]},
    "a LoRA of some steps": {"loras": [{"name": str(RING), "end": 0.5}]},
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[Engine]:
    config = EngineConfig(
        model="miniature", devices="cpu", data_dir=tmp_path_factory.mktemp("data"), checkpoint_seconds=0.0
    )
    with Engine(config) as engine:
        yield engine


@pytest.fixture(autouse=True)
def _not_collected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def num_tensors() -> int:
    """All that Python knows of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects warn when their type is asked
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def assert_nothing_is_left(run: Callable[[int], None]) -> None:
    """The first two runs import and load."""
    for number in range(2):
        run(number)
    before = num_tensors()
    run(2)
    give_up = time.monotonic() + WAIT_SECONDS
    while (left := num_tensors()) > before and time.monotonic() < give_up:
        time.sleep(0.01)  # the stages' threads are still on the way to their next job
    assert left <= before


@pytest.mark.parametrize(
    ("kind", "end"),
    [*((kind, "completed") for kind in KINDS), *((kind, "cancelled") for kind in ("plain", "skipped steps", "a LoRA"))],
)
def test_a_job_leaves_no_tensors(engine, tmp_path, kind: str, end: str) -> None:
    def run(number: int) -> None:
        request = GenerationRequest(**{name: v for name, v in {**SMALL, **KINDS[kind]}.items() if v is not None})
        job = engine.submit(request, OutputOptions(tmp_path / f"{number}.mkv", codec="ffv1"))
        for event in job.events():
            if end == "cancelled" and event.phase == "denoise" and event.done >= 2:
                job.cancel()
        try:
            job.result()
        except CancelledError:
            assert end == "cancelled"

    assert_nothing_is_left(run)


def test_nor_does_one_that_fails(engine, tmp_path, monkeypatch) -> None:
    def forward(transformer, latents, *_: object) -> list[torch.Tensor]:
        return [torch.full_like(latents, torch.nan)] * 2

    monkeypatch.setattr("wanduet.models.dit.model.WanTransformer.forward_cfg", forward)

    def run(number: int) -> None:
        job = engine.submit(GenerationRequest(**SMALL), OutputOptions(tmp_path / f"{number}.mkv", codec="ffv1"))
        with pytest.raises(NonFiniteLatentsError):
            job.result()

    assert_nothing_is_left(run)
