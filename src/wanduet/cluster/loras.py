"""Which jobs a node has the LoRA files for: its replicas take no other jobs, and their status names what is missing.

A file counts only with the name and the hash that the job was accepted with. Where no node has a job's files, the
controller writes so into the job.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from threading import Lock

from wanduet.cluster.scheduler import Waiting
from wanduet.cluster.shapes import Node, ReplicaView
from wanduet.errors import WanduetError
from wanduet.jobs.records import loras_tag
from wanduet.loras import Lora
from wanduet.weights.adapters.files import open_adapter

LorasOf = Callable[[str], Sequence[Lora]]  # of a job, by its id

_State = tuple[tuple[int, ...], ...]


class NodeLoras:
    """The files of a node's folder of LoRA. Methods may be called from any thread."""

    def __init__(self, folder: Path | None) -> None:
        """`folder`: need not exist; None: the node has no LoRA."""
        self._folder = folder
        self._lock = Lock()
        self._hashes: dict[str, tuple[_State, str]] = {}
        self._wanted: dict[str, Sequence[Lora]] = {}  # of waiting jobs, by the tags of their demands
        self.lacking: frozenset[str] = frozenset()  # tags of waiting jobs that the last `available` left out

    def available(self, waiting: Iterable[Waiting], loras_of: LorasOf) -> list[Waiting]:
        """Return the waiting jobs whose files are here, and those without LoRA. Hashes files that are new or changed."""
        tagged = [(one, loras_tag(one.demand)) for one in waiting]
        with self._lock:
            self._wanted = {
                tag: self._wanted.get(tag) or loras_of(one.job_id) for one, tag in tagged if tag is not None
            }
            self.lacking = frozenset(tag for tag, loras in self._wanted.items() if not self._has_all(loras))
        return [one for one, tag in tagged if tag not in self.lacking]

    def has(self, loras: Sequence[Lora]) -> bool:
        """Return whether all files are here."""
        with self._lock:
            return self._has_all(loras)

    def _has_all(self, loras: Sequence[Lora]) -> bool:
        return all(self._hash(lora.name) == lora.sha256 for lora in loras)

    def _hash(self, name: str) -> str | None:
        """Return the hash of a file or PEFT folder; None if it is not here."""
        if self._folder is None or name in (".", "..") or set(name) & {"/", "\\", ":", "\0"}:
            return None
        path = self._folder / name
        try:
            files = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
            state = tuple((one.st_mtime_ns, one.st_size, one.st_ino) for one in map(Path.stat, files))
            if name not in self._hashes or self._hashes[name][0] != state:
                self._hashes[name] = state, open_adapter(path).sha256()
        except (OSError, WanduetError):
            self._hashes.pop(name, None)
            return None
        return self._hashes[name][1]


class MissingLoras:
    """The controller's record of which nodes lack the files of waiting jobs."""

    def __init__(self) -> None:
        self._lacks: dict[str, frozenset[str]] = {}

    def note(self, replicas: Iterable[ReplicaView], waiting: Iterable[Waiting]) -> None:
        """Take over what replicas have found. What was found on a node that has none any more stays, as long as such a
        job waits: a replica that is started to look again would end idle."""
        tags = frozenset(tag for one in waiting if (tag := loras_tag(one.demand)) is not None)
        found: dict[str, frozenset[str]] = {}
        for one in replicas:
            if one.node is not None and one.state == "ready":
                found[one.node] = found.get(one.node, frozenset()) | one.lacks
        self._lacks = {node: lacks & tags for node, lacks in {**self._lacks, **found}.items() if lacks & tags}

    def on(self, node: Node) -> frozenset[str]:
        """Return the tags of the demands whose files a node lacks."""
        return self._lacks.get(node.id, frozenset())


def explain_missing(loras: Sequence[Lora], nodes: Collection[Node]) -> str:
    """Return why a job waits whose files no node has."""
    files = ", ".join(f"{lora.file_name} (SHA-256 {(lora.sha256 or '?')[:12]}…)" for lora in loras)
    names = ", ".join(sorted(node.name for node in nodes))
    what = "the LoRA" if len(loras) == 1 else "all of the LoRA"
    return (
        f"No node of this cluster ({names}) has {what} that this job was submitted with: {files}. Put what is missing, with "
        "the same content, into the folder of LoRA of a node."
    )
