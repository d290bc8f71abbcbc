"""A closed engine gives a GPU's memory back. `pytest -m gpu`."""

from pathlib import Path

import pytest
import torch

from wanduet.config import GIB, EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import CancelledError
from wanduet.request import GenerationRequest

pytestmark = pytest.mark.gpu
SMALL = {"prompt": "a cat", "height": 256, "width": 256, "num_frames": 5, "num_inference_steps": 2, "seed": 1}
# What libraries keep for good: cuBLAS a workspace for each thread and stream, of which new threads take over the old ones.
KEPT = 256 * 2**20


def used() -> tuple[int, int]:
    """Bytes: allocated by this process, and in use by all on that GPU."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info(0)
    return torch.cuda.memory_allocated(0), total - free


@pytest.fixture
def warm(tmp_path: Path) -> tuple[int, int]:
    """After a first engine, whose context and libraries stay."""
    use(EngineConfig(model="random:1.3b", devices="cuda:0", data_dir=tmp_path / "data"), tmp_path)
    return used()


def use(config: EngineConfig, folder: Path) -> None:
    with Engine(config) as engine:
        engine.submit(GenerationRequest(**SMALL), OutputOptions(folder / "a.mp4")).result(300)
        assert torch.cuda.memory_allocated(0) > KEPT
        cancelled = engine.submit(GenerationRequest(**SMALL), OutputOptions(folder / "b.mp4"))
        cancelled.cancel()
        with pytest.raises(CancelledError):
            cancelled.result(300)
        failed = engine.submit(GenerationRequest(**SMALL), OutputOptions(folder / "c.mp4"), on_step=lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            failed.result(300)


@pytest.mark.parametrize("settings", [{}, {"vram_limit": 3 * GIB}], ids=["resident", "streamed"])
def test_engines_one_after_another_take_no_more_than_one(warm, tmp_path, settings) -> None:
    for _ in range(3):
        use(EngineConfig(model="random:1.3b", devices="cuda:0", data_dir=tmp_path / "data", **settings), tmp_path)
        allocated, in_use = used()
        assert allocated < KEPT
        assert in_use < warm[1] + KEPT
