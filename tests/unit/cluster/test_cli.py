"""`wanduet cluster status` and the cluster's flags as they are typed."""

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wanduet.cluster.autoscaler import ScaleSettings
from wanduet.cluster.process import ControllerProcess
from wanduet.cluster.settings import ClusterSettings
from wanduet.cluster.store import ClusterStore
from wanduet.config import EngineConfig
from wanduet.doors.cli.cluster import ClusterFlags
from wanduet.doors.cli.main import app
from wanduet.doors.cli.run import run
from wanduet.errors import ConfigError
from wanduet.jobs.files import JobFiles
from wanduet.jobs.runner import RunnerSettings
from wanduet.jobs.worker import WorkerSettings

ROW = {"id": "r", "node": "old", "shape": "1x24GiB", "state": "ready", "worker": "w", "jobs": 1}
URL = "postgresql+psycopg://nobody@nowhere/nothing"


@pytest.fixture
def wanduet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def call(*arguments: str) -> str:
        assert run(app, ["cluster", *arguments, "--data-dir", str(tmp_path)]) == 0
        return capsys.readouterr().out

    return call


def test_status_tells_the_replicas(tmp_path: Path, wanduet) -> None:
    assert wanduet("status") == "0 jobs wait\n"  # before a controller has looked
    with closing(ClusterStore(JobFiles(tmp_path))) as store:
        store.publish([ROW])
    assert "1x24GiB" in wanduet("status")
    told = json.loads(wanduet("status", "--json"))
    assert told == {"replicas": [ROW], "draining": [], "waiting": {}, "trouble": None}


def test_status_says_why_no_videos_are_made(tmp_path: Path, wanduet) -> None:
    trouble = "Replicas want GPUs."
    with closing(ClusterStore(JobFiles(tmp_path))) as store:
        store.publish_trouble(trouble)
    assert trouble in wanduet("status")
    assert json.loads(wanduet("status", "--json"))["trouble"] == trouble
    with closing(ClusterStore(JobFiles(tmp_path))) as store:
        store.publish_trouble(None)
    assert trouble not in wanduet("status")


def test_readiness_says_why_no_replica_takes_jobs(tmp_path: Path) -> None:
    scale = ScaleSettings(minimum=0)
    settings = ClusterSettings(WorkerSettings(EngineConfig(data_dir=tmp_path)), scale=scale)
    with closing(ClusterStore(JobFiles(tmp_path))) as store:
        process = ControllerProcess(settings, store, URL)
        assert "restart the server" in (process.trouble or ""), "nobody looks after the controller"
        process._thread = SimpleNamespace(is_alive=lambda: True)
        assert "starting" in (process.trouble or "")
        process._process = SimpleNamespace(pid=1, poll=lambda: None)
        assert process.trouble is None, "a replica would be started for a job"
        store.publish_trouble("Replicas want GPUs.")
        assert process.trouble == "Replicas want GPUs."
        store.publish([{**ROW, "shape": "1x24GiB"}])
        assert process.trouble is None, "a replica takes jobs, whatever else is wrong"


def test_a_controllers_beat_is_its_supervisors_and_not_its_replicas_business(tmp_path: Path) -> None:
    settings = ClusterSettings(WorkerSettings(EngineConfig(data_dir=tmp_path)))
    with closing(ClusterStore(JobFiles(tmp_path))) as store:
        process = ControllerProcess(settings, store, URL)
    told = ClusterSettings.from_json(process._arguments[-1])
    assert told.worker.runner.supervisor == process._lock.id
    assert replace(told, worker=settings.worker).fingerprint == settings.fingerprint


def test_the_flag_reaches_the_controller_and_needs_a_cluster() -> None:
    def settings(**flags: Any) -> Any:
        return ClusterFlags(**flags).settings(EngineConfig(), RunnerSettings(), None, URL)

    assert settings(cluster="auto").scale.maximum == 64
    fewer = settings(cluster="auto", max_replicas=3)
    assert fewer.scale.maximum == 3
    assert fewer.fingerprint == settings(cluster="auto").fingerprint  # no replica depends on it
    with pytest.raises(ConfigError):
        settings(max_replicas=3)


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
