"""The miniature's settings, with a data folder of their own."""

import pytest

from wanduet.config import EngineConfig


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EngineConfig:
    return EngineConfig(model="miniature", devices="cpu", data_dir=tmp_path_factory.mktemp("data"))
