"""Values that describe a fleet: nodes, and the shapes of replicas that their GPUs can form."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from wanduet.config import GIB, EngineConfig
from wanduet.planning.hardware import DeviceInfo, Hardware, parse_hardware

GROUP_SIZES = (1, 2, 4, 8)  # numbers of GPUs that denoise together: Ulysses and guidance divide by two


@dataclass(frozen=True, slots=True)
class Shape:
    """Resources of one replica on one node: GPUs, and a share of the host; without GPUs it computes on the CPU.

    `declared`: the GPUs do not exist; the node's operator declared them with a label. Such a replica plans for them and
    computes on the CPU, to try a fleet out.
    """

    devices: tuple[DeviceInfo, ...] = ()
    host_bytes: int = 0
    cpu_count: int = 1
    declared: bool = False

    @property
    def gpus(self) -> int:
        """Number of GPUs."""
        return len(self.devices)

    @property
    def name(self) -> str:
        """Name for people and metrics: `2x24GiB`, `cpu`."""
        return f"{self.gpus}x{min(d.total_bytes for d in self.devices) / GIB:.3g}GiB" if self.devices else "cpu"

    @property
    def hardware(self) -> Hardware:
        """Hardware for the plan: devices are numbered from zero, as in the replica's own process."""
        devices = tuple(replace(device, name=f"cuda:{index}") for index, device in enumerate(self.devices))
        return Hardware(devices, self.host_bytes, int(self.host_bytes * 0.85), self.cpu_count, self.name)

    def engine_config(self, config: EngineConfig) -> EngineConfig:
        """Return the engine's settings for a replica of this shape."""
        if not self.devices or self.declared:
            return replace(config, devices=config.devices or "cpu", strategy="auto", device_speeds=None)
        return replace(config, devices=None, device_speeds=None)


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster.

    `draining`: nothing starts there, and running jobs move away. `resting`: nothing starts there for now. `lacks`: tags of
    the demands whose LoRA files it does not have.
    """

    id: str
    name: str
    devices: tuple[DeviceInfo, ...] = ()
    host_bytes: int = 0
    cpu_count: int = 1
    draining: bool = False
    resting: bool = False
    declared: bool = False
    computes: bool = True  # a node without GPUs takes replicas only if the CPU was selected
    lacks: frozenset[str] = frozenset()

    def shape(self, gpus: int) -> Shape:
        """Return the shape of `gpus` of its GPUs.

        Unless it has all GPUs, Ray decides which ones, so each is assumed to be as small as the smallest.
        """
        devices = self.devices
        if gpus < len(devices):
            devices = (min(devices, key=lambda d: (d.free_bytes, d.multiprocessors)),) * gpus
        return Shape(
            devices, self.host_bytes * max(1, gpus) // max(1, len(self.devices)), self.cpu_count, self.declared
        )

    def shapes(self, only: int | None = None) -> Iterator[Shape]:
        """Yield all shapes that fit on the empty node; `only` restricts them to that number of GPUs."""
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
    """A replica as the controller sees it. `idle_seconds`: time since its last job ended, 0 while it has one. `lacks`: as
    in `Node`, of the jobs that waited when it last looked for one."""

    id: str
    node: str | None  # None until it is placed
    shape: Shape
    state: str = "starting"  # starting, ready, draining
    worker: str | None = None
    jobs: tuple[str, ...] = field(default=())
    idle_seconds: float = 0.0
    lacks: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Gone:
    """A replica that ended. `worker`: name on its leases; `lost`: its node is gone; `failed`: it never started."""

    id: str
    node: str | None
    worker: str | None
    lost: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Expected:
    """Nodes that Ray's own autoscaler can add, by their label, and the replica that each would run."""

    label: str
    shape: Shape


def declared_devices(label: str) -> tuple[DeviceInfo, ...]:
    """Return GPUs from a node's label: `2x24GiB`, or `24GiB_12GiB` (labels allow no plus). Raises ConfigError."""
    return parse_hardware(label.replace("_", "+")).devices
