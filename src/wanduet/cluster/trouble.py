"""Explains why a cluster makes no videos, and what to do about it, in a sentence for people. Pure."""

from collections.abc import Iterable, Sequence

from wanduet.cluster.autoscaler import ScaleSettings
from wanduet.cluster.shapes import Node, ReplicaView

NO_GPUS = (
    "Start Ray on a machine with GPUs; or serve with --devices cpu; or, to try a cluster out, declare GPUs: "
    "`ray start --num-gpus 1 --labels wanduet.io/gpus=1x24GiB`."
)


def find_trouble(nodes: Sequence[Node], replicas: Iterable[ReplicaView], scale: ScaleSettings) -> str | None:
    """Return what keeps all replicas from doing jobs until somebody acts; None if nothing is known to.

    A replica that is starting, and nodes that Ray's own autoscaler can still add, are no trouble.
    """
    if any(one.state != "draining" for one in replicas) or scale.expected:
        return None
    if not nodes:
        return "No node is ready yet: weights are being fetched to them, or none is up, which `ray status` says."
    names = ", ".join(sorted(node.name for node in nodes))
    if not any(node.devices or node.computes for node in nodes):
        return f"Replicas want GPUs, and no node of this cluster has any ({names}). {NO_GPUS}"
    staying = [node for node in nodes if not node.draining]
    if not staying:
        return f"Every node is being emptied ({names}). Let one work again: `wanduet cluster undrain NODE`."
    if not any(tuple(node.shapes(scale.gpus)) for node in staying):
        most = max(len(node.devices) for node in staying)
        return f"Replicas are to have {scale.gpus} GPUs, and no node has so many. Try --replica-gpus {max(1, most)}."
    if all(node.resting or not tuple(node.shapes(scale.gpus)) for node in staying):
        return f"Replicas fail to come up on {names}; they are tried again. The replicas' logs in Ray say why they end."
    return None
