"""The main job end to end: a prompt becomes a video that shows it. Unseen combinations, through the whole engine."""

from wanduet.config import EngineConfig
from wanduet.engine.pipeline import Engine
from wanduet.miniature.detector import ATTRIBUTES
from wanduet.miniature.evaluate import evaluate

PROMPTS = 8
ENOUGH = 0.9  # of 32 attributes; the whole measurement (210 prompts) is in benchmarks/results


def test_unseen_prompts_are_understood(tmp_path) -> None:
    with Engine(EngineConfig(model="miniature", devices="cpu", data_dir=tmp_path)) as engine:
        found = evaluate(engine, PROMPTS, seed=77)
    assert found["attributes_right"] >= ENOUGH, found["mistakes"]
    assert set(ATTRIBUTES) <= set(found)
