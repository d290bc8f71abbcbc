"""What a fleet is made of: nodes, and the shapes of replicas that their GPUs can form. Plain values."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from wanduet.config import GIB, EngineConfig
from wanduet.planning.hardware import DeviceInfo, Hardware, parse_hardware

GROUP_SIZES = (1, 2, 4, 8)  # GPUs that denoise together: Ulysses and guidance divide by two

Stage = Literal["all", "encode", "decode"]  # what of a job is done at a place


@dataclass(frozen=True, slots=True)
class Shape:
    """What one replica has to itself, all of one node: GPUs, and its part of the host; no GPU means the CPU alone.

    `declared`: the GPUs are not there, the node's operator said that they be counted on. Such a replica plans for
    them and computes on the CPU, which is for trying a fleet out. `stage`: what of a job it does.
    """

    devices: tuple[DeviceInfo, ...] = ()
    host_bytes: int = 0
    cpu_count: int = 1
    declared: bool = False
    stage: Stage = "all"

    @property
    def gpus(self) -> int:
        """How many GPUs."""
        return len(self.devices)

    @property
    def name(self) -> str:
        """For people and metrics: `2x24GiB`, `cpu`, `1x8GiB decode`."""
        size = f"{self.gpus}x{min(d.total_bytes for d in self.devices) / GIB:.3g}GiB" if self.devices else "cpu"
        return size if self.stage == "all" else f"{size} {self.stage}"

    @property
    def hardware(self) -> Hardware:
        """As the plan sees it: devices numbered from zero, as in the replica's own process."""
        devices = tuple(replace(device, name=f"cuda:{index}") for index, device in enumerate(self.devices))
        return Hardware(devices, self.host_bytes, int(self.host_bytes * 0.85), self.cpu_count, self.name)

    def engine_config(self, config: EngineConfig) -> EngineConfig:
        """The engine's settings for a replica of this shape."""
        if not self.devices or self.declared:
            return replace(config, devices=config.devices or "cpu", strategy="auto", speeds=None)
        return replace(config, devices=None, speeds=None)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster. `draining`: nothing starts there, what runs there ends and moves; `resting`: nothing
    starts there for now. `stage`: what of a job is done there just now; `wish`: what its operator said that it is for.
    """

    id: str
    name: str
    devices: tuple[DeviceInfo, ...] = ()
    host_bytes: int = 0
    cpu_count: int = 1
    draining: bool = False
    resting: bool = False
    declared: bool = False
    computes: bool = True  # a node without GPUs takes replicas only where the CPU was asked for
    stage: Stage = "all"
    wish: Stage | None = None

    def shape(self, gpus: int) -> Shape:
        """The shape of so many of its GPUs. Which ones they will be is not known unless they are all of them,
        so each is taken to be as small as the smallest.
        """
        devices = self.devices
        if gpus < len(devices):
            devices = (min(devices, key=lambda d: (d.free_bytes, d.multiprocessors)),) * gpus
        return Shape(
            devices, self.host_bytes * max(1, gpus) // max(1, len(self.devices)), self.cpu_count, self.declared
        )

    def shapes(self, only: int | None = None) -> Iterator[Shape]:
        """Every shape that fits on the empty node; `only` those of so many GPUs, where whole jobs are done."""
        if self.stage != "all":
            yield replace(self.shape(0 if self.stage == "encode" else min(1, len(self.devices))), stage=self.stage)
            return
        if not self.devices:
            if self.computes:
                yield self.shape(0)
            return
        sizes = {size for size in (*GROUP_SIZES, len(self.devices)) if size <= len(self.devices)}
        for size in sorted(sizes):
            if only is None or size == only:
                yield self.shape(size)


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica as the controller knows it. `idle_seconds`: since its last job ended, 0 while it has one."""

    id: str
    node: str | None  # None while nobody knows where it will be
    shape: Shape
    state: str = "starting"  # starting, ready, draining
    worker: str | None = None
    jobs: tuple[str, ...] = field(default=())
    idle_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Gone:
    """A replica that ended. `worker`: the name on its leases; `lost`: its node went; `failed`: it never came up."""

    id: str
    node: str | None
    worker: str | None
    lost: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Expected:
    """Nodes that Ray's own autoscaler can bring, by the value of their label, and the replica each would have."""

    label: str
    shape: Shape


def declared_devices(label: str) -> tuple[DeviceInfo, ...]:
    """GPUs from a node's label: `2x24GiB`, or `24GiB_12GiB`, since labels take no plus. Raises ConfigError."""
    return parse_hardware(label.replace("_", "+")).devices
