"""The nodes of one Ray cluster, in a process of their own: Ray reads its settings once, when it is first imported.

Commands come as JSON lines, each answered by one: `["add", name, gpus, cpus]` gives the node's id, `["kill", name]`
ends raylet and workers at once as a power cut would.
The end of input ends everything.
"""

import json
import random
import socket
import sys
from contextlib import suppress
from typing import Any

from ray.cluster_utils import Cluster

PORTS = 20_000, 32_768  # between those of Ray's workers and those that Linux gives to connections
OBJECT_STORE_BYTES = 80 * 2**20  # nothing goes through Ray's own store


class Nodes:
    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.nodes: dict[str, Any] = {}
        self.cluster = Cluster()

    def head(self, port: int = 0) -> tuple[str, str]:
        """The head has no GPUs, and runs nothing of ours; returns the cluster's address, and that for clients outside."""
        more = {"gcs_server_port": port} if port else {}
        door = _free_port()
        node = self._start(num_cpus=0, temp_dir=self.folder, ray_client_server_port=door, **more)
        self.nodes["head"] = node
        return self.cluster.address, f"ray://{node.node_ip_address}:{door}"

    def add(self, name: str, gpus: str, cpus: int | None = None) -> str:
        """A node whose GPUs are declared ("": it has none), with one CPU, thus one thread, for each unless said."""
        count = int(gpus.partition("x")[0]) if gpus else 0
        labels = {"wanduet.io/gpus": gpus} if gpus else {}
        self.nodes[name] = self._start(num_cpus=cpus or count or 1, num_gpus=count, labels=labels)
        return self.nodes[name].node_id

    def kill(self, name: str) -> str:
        self.cluster.remove_node(self.nodes.pop(name), allow_graceful=False)
        return name

    def _start(self, **options: Any) -> Any:
        return self.cluster.add_node(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES, **options)


def _free_port() -> int:
    """A port that nobody has, and that the system gives to no connection before Ray listens at it."""
    while True:
        with suppress(OSError), socket.create_server(("127.0.0.1", random.randrange(*PORTS))) as free:
            return int(free.getsockname()[1])


def main() -> None:
    nodes = Nodes(sys.argv[1])
    try:
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(getattr(nodes, name)(*arguments)), file=sys.__stdout__, flush=True)
    finally:
        nodes.cluster.shutdown()


if __name__ == "__main__":
    sys.stdout = sys.stderr  # Ray prints, too
    main()
