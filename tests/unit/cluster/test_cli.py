"""`wanduet cluster status` and the cluster's flags as they are typed."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from wanduet.cluster.store import ClusterStore
from wanduet.config import EngineConfig
from wanduet.errors import ConfigError
from wanduet.frontends.cli import app
from wanduet.frontends.cli_cluster import ClusterFlags
from wanduet.frontends.run import run
from wanduet.jobs.files import JobFiles
from wanduet.jobs.runner import RunnerSettings

REASON = "apart: old decode 35% of the videos (do better at it than at denoising); +18% throughput"
ROW = {"id": "r", "node": "old", "shape": "1x24GiB decode", "state": "ready", "worker": "w", "jobs": 1}
URL = "postgresql+psycopg://nobody@nowhere/nothing"


@pytest.fixture
def wanduet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*arguments: str) -> str:
        assert run(app, ["cluster", *arguments, "--data-dir", str(tmp_path)]) == 0
        return capsys.readouterr().out

    return call


def test_status_tells_the_replicas_and_whether_stages_live_apart_and_why(tmp_path: Path, wanduet) -> None:
    assert wanduet("status") == "0 jobs wait\n"  # before a controller has looked
    with closing(ClusterStore(JobFiles(tmp_path))) as store:
        store.publish([ROW])
        store.publish_stages({"apart": True, "reason": REASON, "nodes": {"old": "decode"}})
    shown = wanduet("status")
    assert f"stages {REASON}\n" in shown
    assert "1x24GiB decode" in shown
    told = json.loads(wanduet("status", "--json"))
    assert told["stages"]["nodes"] == {"old": "decode"}
    assert told["replicas"] == [ROW]


def test_the_flag_reaches_the_controller_and_needs_a_cluster() -> None:
    def settings(**flags: str) -> object:
        return ClusterFlags(**flags).settings(EngineConfig(), RunnerSettings(), None, URL)

    assert settings(cluster="auto").scale.stages == "auto"
    apart = settings(cluster="auto", stages="apart")
    assert apart.scale.stages == "apart"
    assert apart.fingerprint == settings(cluster="auto").fingerprint  # no replica depends on it
    with pytest.raises(ConfigError):
        settings(stages="apart")


def test_each_kind_of_expected_nodes_has_its_label_and_its_replica() -> None:
    flags = ClusterFlags(cluster="auto", expect_nodes="2x24GiB,1x80GiB,24GiB_12GiB")
    found = flags.settings(EngineConfig(), RunnerSettings(), None, URL)
    assert [(one.label, one.shape.name) for one in found.scale.expected] == [
        ("2x24GiB", "2x24GiB"),
        ("1x80GiB", "1x80GiB"),
        ("24GiB_12GiB", "2x12GiB"),
    ]
    with pytest.raises(ConfigError):
        ClusterFlags(cluster="auto", expect_nodes="many").settings(EngineConfig(), RunnerSettings(), None, URL)
