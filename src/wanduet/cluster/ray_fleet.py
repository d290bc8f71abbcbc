"""The controller's interface to Ray: nodes, placement groups, actors. The only module that calls Ray.

Replicas are detached, named actors: they outlive the controller, and the next one finds them by name. All state here
can be rebuilt, so losing this process or Ray's head loses nothing.
"""

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import ray
import structlog
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util import (
    get_placement_group,
    list_named_actors,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from wanduet.cluster.autoscaler import Start
from wanduet.cluster.probe import read_probe
from wanduet.cluster.replica import Replica, ReplicaStatus
from wanduet.cluster.settings import ClusterSettings, ReplicaOrder
from wanduet.cluster.shapes import Gone, Node, ReplicaView, declared_devices
from wanduet.config import EngineConfig, parse_devices
from wanduet.errors import ConfigError, WanduetError
from wanduet.jobs.child import child_environment, module_command

log = structlog.get_logger(__name__)

NAMESPACE = "wanduet"
PREFIX = "replica-"
GPUS_LABEL = "wanduet.io/gpus"  # on a node: assume these GPUs instead of probing
EXPECTED_LABEL = "wanduet.io/node"  # on nodes that Ray can add: their GPUs, in the syntax of --expect-nodes
NODE_LABEL = "ray.io/node-id"
ANSWER_SECONDS = 2.0  # timeout of one poll of all replicas
_KILL = int(getattr(signal, "SIGKILL", signal.SIGTERM))
THREADS = 4  # concurrent calls to a replica


@dataclass(slots=True)
class _Member:
    actor: Any
    view: ReplicaView | None  # None: it was adopted, and has not answered yet
    since: float = field(default_factory=time.monotonic)
    pending: Any = None  # the pending status call
    status: ReplicaStatus | None = None
    draining: bool = False
    answered_at: float = field(default_factory=time.monotonic)  # when it last answered


class RayFleet:
    """The replicas on one Ray cluster. Not thread-safe."""

    def __init__(self, settings: ClusterSettings, database_url: str) -> None:
        """Connect, and adopt the replicas of an earlier controller. Raises ConfigError."""
        self._settings = settings
        self._url = database_url
        self._members: dict[str, _Member] = {}
        self._hardware: dict[str, Any] = {}  # by node: a Node, or the start time and the result of a pending probe
        try:
            ray.init(address=settings.address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"There is no Ray cluster at {settings.address!r}: {str(error).splitlines()[0]}",
                hint="Start one: `ray start --head` here, `ray start --address=HOST:6379` on the other machines.",
            ) from None
        self._adopt()

    def close(self) -> None:
        """Disconnect; replicas continue."""
        ray.shutdown()

    # Nodes.

    def nodes(self, drained: frozenset[str]) -> tuple[Node, ...]:
        """Return the live nodes whose devices are known. `drained`: names, addresses or id prefixes."""
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for gone in self._hardware.keys() - alive.keys():
            del self._hardware[gone]
        leaving = _draining_nodes()
        found = []
        for node_id, about in alive.items():
            node = self._node_of(node_id, about)
            if node is not None:
                names = (node.name, about["NodeManagerAddress"])
                requested = any(one in names or node_id.startswith(one) for one in drained)
                found.append(replace(node, draining=requested or node_id in leaving))
        return tuple(found)

    def _node_of(self, node_id: str, about: dict[str, Any]) -> Node | None:
        known = self._hardware.get(node_id)
        if isinstance(known, Node):
            return known
        resources, labels = about["Resources"], about.get("Labels", {})
        cpus = max(1, int(resources.get("CPU", 1)))
        node = Node(node_id, about["NodeManagerHostname"], (), int(resources.get("memory", 0)), cpus)
        label = labels.get(GPUS_LABEL)
        if label is not None or not resources.get("GPU"):
            devices = declared_devices(label) if label is not None else ()
            computes = self._cpu_selected() and not devices
            self._hardware[node_id] = node = replace(node, devices=devices, declared=bool(devices), computes=computes)
            return node
        if known is None:
            config = self._settings.worker.config
            where = NodeAffinitySchedulingStrategy(node_id, soft=False)
            probe = ray.remote(num_cpus=0, max_calls=1, max_retries=3)(_probe).options(scheduling_strategy=where)
            self._hardware[node_id] = (time.monotonic(), probe.remote(config))
            return None
        began, answer = known
        if not ray.wait([answer], timeout=0)[0]:
            return None
        try:
            hardware = read_probe(ray.get(answer))
        except RayError as error:
            if time.monotonic() - began > ANSWER_SECONDS * 15:
                log.error("a node cannot be used", node=node.name, error=str(error).splitlines()[-1])
                del self._hardware[node_id]  # the next call probes again
            return None
        devices = hardware.gpus[: int(resources["GPU"])]
        node = replace(node, devices=devices, host_bytes=hardware.host_total_bytes)
        self._hardware[node_id] = node
        log.info("a node joined", node=node.name, shape=node.shape(len(node.devices)).name)
        return node

    def _cpu_selected(self) -> bool:
        names = parse_devices(self._settings.worker.config.devices).names
        return bool(names) and all(name == "cpu" for name in names)

    # Replicas.

    def start(self, start: Start) -> None:
        """Create a replica's actor; `poll` includes it at once, and it is ready once it answers."""
        name = f"{PREFIX}{self._settings.fingerprint}-{secrets.token_hex(4)}"
        shape = start.shape
        bundle = {"GPU": float(shape.gpus)} if shape.gpus else {"CPU": float(shape.cpu_count)}
        # A bundle only counts GPUs; the label keeps Ray from choosing or adding a node with smaller ones.
        selector = [{NODE_LABEL: start.node} if start.node is not None else {EXPECTED_LABEL: start.label}]
        group = placement_group(
            [bundle], strategy="STRICT_PACK", name=name, lifetime="detached", bundle_label_selector=selector
        )
        options = dict(
            name=name,
            lifetime="detached",
            num_gpus=shape.gpus,
            num_cpus=0 if shape.gpus else shape.cpu_count,
            max_restarts=0,  # the autoscaler decides anew: the node may be gone, the shape no longer needed
            max_concurrency=THREADS,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
        )
        order = ReplicaOrder(self._settings, shape, start.node, self._url)
        actor: Any = ray.remote(Replica).options(**options).remote(order, _node_id)
        self._members[name] = _Member(actor, ReplicaView(name, start.node, shape))
        log.info("a replica starts", replica=name, shape=shape.name, node=start.node)

    def drain(self, replica: str) -> None:
        """Drain a replica: its jobs are checkpointed and return to the queue."""
        member = self._members.get(replica)
        if member is None or member.draining:
            return
        member.draining = True
        if member.view is not None:
            member.view = replace(member.view, state="draining")
        member.actor.drain.remote()
        log.info("a replica drains", replica=replica)

    def poll(self) -> tuple[tuple[ReplicaView, ...], tuple[Gone, ...]]:
        """Return the replicas, and those that ended since the last call."""
        for member in self._members.values():
            if member.pending is None:
                member.pending = member.actor.status.remote()
        waiting = [
            member.pending for member in self._members.values() if member.status is not None or member.view is None
        ]
        if waiting:
            ray.wait(waiting, num_returns=len(waiting), timeout=ANSWER_SECONDS)
        gone = [one for name in tuple(self._members) if (one := self._read_status(name)) is not None]
        views = (member.view for member in self._members.values())
        return tuple(view for view in views if view is not None), tuple(gone)

    def _read_status(self, name: str) -> Gone | None:
        member = self._members[name]
        if not ray.wait([member.pending], timeout=0)[0]:
            now = time.monotonic()
            if member.status is None:
                return self._remove(name, failed=True) if now - member.since > self._settings.start_seconds else None
            if now - member.answered_at < self._settings.silent_seconds:
                return None
            # Its process is stopped or hangs. Other replicas have taken its jobs, and fencing tokens refuse its writes.
            log.error("a replica hangs and is ended", replica=name, seconds=round(now - member.answered_at))
            _end_process(member.status)
            return self._remove(name)
        answer, member.pending = member.pending, None
        try:
            status: ReplicaStatus = ray.get(answer)
        except (ActorUnavailableError, GetTimeoutError):
            return None
        except RayActorError as error:
            log.warning("a replica died", replica=name, error=str(error).strip().splitlines()[-1])
            return self._remove(name, failed=member.status is None and member.view is not None)
        member.status, member.answered_at = status, time.monotonic()
        if status.ended:
            return self._remove(name)
        member.draining = member.draining or status.draining
        state = "draining" if member.draining else "ready"
        lacks: frozenset[str] = getattr(
            status, "lacks", frozenset()
        )  # a replica that an earlier version started says nothing
        member.view = ReplicaView(
            name, status.node, status.shape, state, status.worker, status.jobs, status.idle_seconds, lacks
        )
        if not name.startswith(f"{PREFIX}{self._settings.fingerprint}-"):
            self.drain(name)  # it has other settings
        return None

    def _remove(self, name: str, *, failed: bool = False) -> Gone:
        member = self._members.pop(name)
        with suppress(RayError, ValueError):
            ray.kill(member.actor)
        _remove_group(name)
        node = member.view.node if member.view is not None else None
        lost = node is not None and node not in {one["NodeID"] for one in ray.nodes() if one["Alive"]}
        worker = None if member.status is None else member.status.worker
        return Gone(name, node, worker, lost, failed and not lost)

    def _adopt(self) -> None:
        """Adopt live replicas, and remove placement groups without a replica."""
        for name in _names():
            with suppress(ValueError):  # it has just ended
                self._members[name] = _Member(ray.get_actor(name, namespace=NAMESPACE), None)
        for group in placement_group_table().values():
            name = group["name"]
            if name.startswith(PREFIX) and name not in self._members and group["state"] != "REMOVED":
                _remove_group(name)


def _end_process(status: ReplicaStatus) -> None:
    """Kill a replica's process from another one on its node: a stopped process does not end at Ray's request."""
    if status.node is None:
        return
    where = NodeAffinitySchedulingStrategy(status.node, soft=False)
    with suppress(RayError):
        ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=where).remote(status.pid)


def _kill(pid: int) -> None:
    with suppress(OSError):  # it is gone
        os.kill(pid, _KILL)


def _names() -> Iterator[str]:
    return (name for name in list_named_actors() if name.startswith(PREFIX))


def _remove_group(name: str) -> None:
    with suppress(RayError, ValueError):
        remove_placement_group(get_placement_group(name))


def _node_id() -> str | None:
    """Return the node on which Ray has placed this actor."""
    found: str = ray.get_runtime_context().get_node_id()
    return found


def _probe(config: EngineConfig) -> str:
    """Download the weights once for all replicas of a node, then probe its devices.

    The probe runs in a subprocess, so that it leaves no memory allocated.
    """
    from wanduet.family.registry import RANDOM_SPECS
    from wanduet.weights.hub import open_model

    if config.model not in RANDOM_SPECS:
        open_model(config.model, config.revision, files=config.files)
    environment = child_environment(os.environ)
    if not environment.get("CUDA_VISIBLE_DEVICES"):  # Ray hides GPUs from tasks that have not reserved any
        environment.pop("CUDA_VISIBLE_DEVICES", None)
    command = module_command("wanduet.cluster.probe")
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        raise WanduetError(f"The node's devices cannot be seen: {found.stderr.strip()[-200:]}")
    return found.stdout


def _draining_nodes() -> frozenset[str]:
    """Return nodes that Ray is about to remove: scaled down, or a spot machine that is reclaimed."""
    client: Any = ray.util.client.ray
    if client.is_connected():  # a Ray client has no access; the database's list must do
        return frozenset()
    try:
        gcs: Any = import_module("ray._raylet").GcsClient  # Ray has no public API for this
        return frozenset(gcs(address=ray.get_runtime_context().gcs_address).get_draining_nodes())
    except (ImportError, AttributeError, RayError, RuntimeError):
        return frozenset()
