"""The main job end to end: a prompt becomes a video that shows it. Unseen combinations, through the whole engine."""

import pytest

from tools.miniature.detector import ATTRIBUTES
from tools.miniature.evaluate import evaluate, look
from tools.miniature.prompts import describe
from tools.miniature.world import ring_combinations
from wanduet.config import EngineConfig
from wanduet.engine.pipeline import Engine

# Of four attributes a prompt; the whole measurement (210 prompts) is in benchmarks/results and in the model's folder.
ENOUGH = {"miniature": 0.9, "miniature-fast": 0.95}


@pytest.mark.parametrize("model", ENOUGH)
@pytest.mark.parametrize("prompts", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_unseen_prompts_are_understood(tmp_path, prompts: int, model: str) -> None:
    with Engine(EngineConfig(model=model, devices="cpu", data_dir=tmp_path)) as engine:
        found = evaluate(engine, prompts, seed=77)
    assert found["attributes_right"] >= ENOUGH[model], found["mistakes"]
    assert set(ATTRIBUTES) <= set(found)


@pytest.mark.parametrize("prompts", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_the_bundled_lora_teaches_a_shape(tmp_path, prompts: int) -> None:
    with Engine(EngineConfig(model="miniature", devices="cpu", data_dir=tmp_path)) as engine:
        found = evaluate(engine, prompts, seed=78, lora="miniature-ring")
    assert found["attributes_right"] >= ENOUGH["miniature"], found["mistakes"]


@pytest.mark.slow
def test_without_it_the_miniature_makes_no_rings(tmp_path) -> None:
    with Engine(EngineConfig(model="miniature", devices="cpu", data_dir=tmp_path)) as engine:
        wanted = [describe(combination) for combination in ring_combinations()[:4].tolist()]
        assert all(seen.shape != "ring" for _, seen in look(engine, wanted, seed=78))
