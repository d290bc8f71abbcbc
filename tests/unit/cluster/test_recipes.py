"""The recipes say what their readers understand: fields that exist, and commands that our own programs take."""

import re
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from wanduet.doors.cli.main import app

ROOT = Path(__file__).parents[3]
KUBERAY = ROOT / "deploy" / "kuberay.yaml"
SKYPILOT = ROOT / "deploy" / "skypilot.yaml"

# Of RayCluster's ray.io/v1 definition (KubeRay 1.5).
CLUSTER_FIELDS = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs",
}  # fmt: skip
HEAD_FIELDS = {"enableIngress", "headService", "labels", "rayStartParams", "resources", "serviceType", "template"}
WORKER_FIELDS = {
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "rayStartParams", "replicas",
    "resources", "scaleStrategy", "suspend", "template",
}  # fmt: skip
# Of SkyPilot's task definition.
TASK_FIELDS = {
    "name", "workdir", "num_nodes", "resources", "envs", "secrets", "volumes", "file_mounts", "setup", "run", "service",
    "config", "experimental",
}  # fmt: skip


def documents() -> dict[str, dict[str, Any]]:
    return {one["kind"]: one for one in yaml.safe_load_all(KUBERAY.read_text())}


def test_the_ray_cluster_has_only_fields_that_its_definition_has() -> None:
    cluster = documents()["RayCluster"]
    spec = cluster["spec"]
    assert cluster["apiVersion"] == "ray.io/v1"
    assert set(spec) <= CLUSTER_FIELDS
    assert set(spec["headGroupSpec"]) <= HEAD_FIELDS
    assert spec["authOptions"] == {"mode": "token"}
    for group in spec["workerGroupSpecs"]:
        assert set(group) <= WORKER_FIELDS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        assert all(mount["name"] in volumes for one in pod["containers"] for mount in one.get("volumeMounts", ()))


def test_labels_are_those_that_are_looked_for() -> None:
    fleet = pytest.importorskip("wanduet.cluster.ray_fleet", reason="needs ray")
    found = documents()
    labels = [group["labels"] for group in found["RayCluster"]["spec"]["workerGroupSpecs"]]
    (command,) = found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]
    expected = re.search(r"--expect-nodes (\S+)", command)
    assert expected is not None
    assert labels == [{fleet.EXPECTED_LABEL: kind} for kind in expected[1].split(",")]  # else a group would never come
    assert found["RayCluster"]["spec"]["autoscalerOptions"]["version"] == "v2"


def brought(cluster: dict[str, Any], gpus: int, label: str) -> list[str]:
    """The groups of which Ray's own autoscaler would bring nodes for a replica, by its reading of the manifest."""
    ours = "ray.autoscaler"  # none of it is public; the version is pinned
    kuberay = pytest.importorskip(f"{ours}._private.kuberay.autoscaling_config", reason="needs ray")
    scheduler = import_module(f"{ours}.v2.scheduler")
    config = import_module(f"{ours}.v2.instance_manager.config")
    messages = import_module("ray.core.generated.autoscaler_pb2")
    within = import_module("ray.core.generated.common_pb2").LabelSelectorOperator.LABEL_OPERATOR_IN
    label_key = import_module("wanduet.cluster.ray_fleet").EXPECTED_LABEL

    described = {**cluster, "metadata": {"namespace": "default", **cluster["metadata"]}}
    read = config.AutoscalingConfig(kuberay._derive_autoscaling_config_from_ray_cr(described), skip_content_hash=True)
    bundle = import_module(f"{ours}.v2.utils").ResourceRequestUtil.make(
        {"GPU": float(gpus)}, label_selectors=[[(label_key, within, [label])]]
    )
    request = scheduler.SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=read.get_node_type_configs(),
        max_num_nodes=read.get_max_num_nodes(),
        gang_resource_requests=[messages.GangResourceRequest(requests=[bundle])],
    )
    return [one.instance_type for one in scheduler.ResourceDemandScheduler(None).schedule(request).to_launch]


@pytest.mark.parametrize(
    ("gpus", "label", "groups"),
    [
        (2, "2x24GiB", ["pairs-24gib"]),
        (1, "1x80GiB", ["cards-80gib"]),
        (1, "2x24GiB", ["pairs-24gib"]),
        (1, "8x80GiB", []),
    ],
)
def test_rays_autoscaler_brings_the_group_that_is_asked_for(gpus: int, label: str, groups: list[str]) -> None:
    assert brought(documents()["RayCluster"], gpus, label) == groups


def test_nothing_but_the_api_faces_the_outside() -> None:
    found = documents()
    assert found["RayCluster"]["spec"]["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert found["Service"]["spec"]["type"] == "ClusterIP"
    open_to_all = [rule for rule in found["NetworkPolicy"]["spec"]["ingress"] if "from" not in rule]
    assert [port["port"] for rule in open_to_all for port in rule["ports"]] == [8000]
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    assert found["Service"]["spec"]["selector"].items() <= labels.items()


def test_the_versions_are_those_that_are_tested() -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert documents()["RayCluster"]["spec"]["rayVersion"] == pinned[1]


def test_the_skypilot_task_has_only_fields_that_its_definition_has() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    assert set(task) <= TASK_FIELDS
    assert "ports" not in task["resources"]
    assert "RAY_AUTH_MODE=token" in task["run"]


@pytest.mark.parametrize("path", ["deploy/kuberay.yaml", "deploy/skypilot.yaml", "docs/cluster.md"])
def test_our_own_commands_are_understood(path: str) -> None:
    text = (ROOT / path).read_text()
    commands = re.findall(r"(?:exec |^)wanduet ((?:serve|download)\b[^\n`]*(?:\n +--[^\n]*)*)", text, re.MULTILINE)
    assert commands
    for command in commands:
        words = shlex.split(re.sub(r"\$\w+|\"\$\w+:?\$?\w*\"", "x", command.split(" ||")[0]))
        app.parse_args(words, exit_on_error=False, print_error=False)  # raises for a flag that does not exist
