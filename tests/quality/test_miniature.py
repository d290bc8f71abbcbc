"""The main job end to end: a prompt becomes a video that shows it. Unseen combinations, through the whole engine."""

import pytest

from tools.miniature.detector import ATTRIBUTES
from tools.miniature.evaluate import evaluate
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
