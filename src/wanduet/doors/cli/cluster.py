"""The command line of clusters: the flags of `wanduet serve --cluster`, and `wanduet cluster status|drain|undrain`."""

from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Group, Parameter

from wanduet.config import EngineConfig
from wanduet.doors.cli.help import SERVE
from wanduet.doors.cli.run import emit, extra
from wanduet.errors import ConfigError

if TYPE_CHECKING:
    from wanduet.cluster.settings import ClusterSettings
    from wanduet.cluster.store import ClusterStore
    from wanduet.jobs.runner import RunnerSettings

Json = Annotated[bool, Parameter(name="--json", help="Print one JSON object on stdout.", negative="")]
DataDir = Annotated[Path | None, Parameter(help="The data folder of the server.")]
Database = Annotated[str | None, Parameter(help="The cluster's PostgreSQL, as the server was given it.")]
CLUSTER = Group("Cluster", sort_key=1)

cluster_app = App(name="cluster", help="List and manage the machines of a cluster.", group=SERVE)


@Parameter(name="*", group=CLUSTER)
@dataclass(frozen=True, slots=True)
class ClusterFlags:
    """Flags of a cluster: where workers run, and how many."""

    cluster: Annotated[
        str | None, Parameter(help="Run workers on Ray: auto, HOST:PORT or ray://HOST:PORT. Needs PostgreSQL.")
    ] = None
    storage: Annotated[
        str | None,
        Parameter(help="Where nodes find each other's files, for example s3://bucket/jobs; else --data-dir."),
    ] = None
    min_replicas: Annotated[int, Parameter(help="Replicas kept up while nothing waits; 0 frees every GPU.")] = 1
    max_replicas: Annotated[int, Parameter(help="Most replicas at a time.")] = 64
    replica_gpus: Annotated[
        int | None, Parameter(help="GPUs of each replica. Default: as many as the plan chooses.")
    ] = None
    upscale_seconds: Annotated[float, Parameter(help="A job that waits longer brings more replicas.")] = 10.0
    idle_seconds: Annotated[float, Parameter(help="A replica idle for longer may end.")] = 300.0
    expect_nodes: Annotated[
        str | None,
        Parameter(
            help="GPUs of the nodes that Ray's autoscaler can add, for example 2x24GiB,1x80GiB. "
            "Theirs is the label wanduet.io/node=2x24GiB."
        ),
    ] = None

    def settings(
        self, config: EngineConfig, runner: "RunnerSettings", retention: float | None, database_url: str | None
    ) -> "ClusterSettings | None":
        """Return the controller's settings; None without --cluster. Raises ConfigError."""
        if self.cluster is None:
            if self != ClusterFlags():
                raise ConfigError("The cluster's flags need --cluster.", hint="--cluster auto")
            return None
        if database_url is None or not database_url.startswith("postgresql"):
            raise ConfigError(
                "A cluster keeps its jobs in PostgreSQL, which every node can reach.",
                hint="--database-url postgresql+psycopg://USER:PASSWORD@HOST/DATABASE",
            )
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ConfigError(
                f"min_replicas={self.min_replicas} and max_replicas={self.max_replicas} do not go together."
            )
        if self.replica_gpus is not None and self.replica_gpus < 1:
            raise ConfigError(f"replica_gpus={self.replica_gpus}: at least one.")
        with extra("cluster"):
            for package in ("ray", "psycopg"):  # checked before anything starts; this process imports neither
                if find_spec(package) is None:
                    raise ModuleNotFoundError(package, name=package)
            from wanduet.cluster.autoscaler import ScaleSettings
            from wanduet.cluster.settings import ClusterSettings
            from wanduet.cluster.shapes import Expected, Node, declared_devices
            from wanduet.jobs.worker import WorkerSettings
        expected = []
        for label in filter(None, (self.expect_nodes or "").split(",")):
            devices = declared_devices(label)
            node = Node("", "", devices, config.ram_limit or 2**36, 8)
            expected.append(Expected(label, node.shape(self.replica_gpus or len(devices))))
        scale = ScaleSettings(
            minimum=self.min_replicas,
            maximum=self.max_replicas,
            upscale_seconds=self.upscale_seconds,
            idle_seconds=self.idle_seconds,
            gpus=self.replica_gpus,
            expected=tuple(expected),
        )
        return ClusterSettings(WorkerSettings(config, runner, retention), self.cluster, scale, self.storage)


@cluster_app.command
def status(*, data_dir: DataDir = None, database_url: Database = None, json_: Json = False) -> None:
    """The replicas, the nodes that are being emptied, the jobs that wait, and why no videos are made if none are."""
    with _store(data_dir, database_url) as store:
        replicas, drained = store.replicas(), sorted(store.drained_nodes())
        waiting = {one.demand: one.count for one in store.backlog(store.waiting())}
        trouble = store.trouble()
    if json_:
        emit({"replicas": replicas, "draining": drained, "waiting": waiting, "trouble": trouble}, as_json=True)
        return
    for one in replicas:
        print(f"{one['id']}  {one['state']:9} {one['shape']:16} {one['jobs']} jobs  on {one['node']}")
    for name in drained:
        print(f"{name} is being emptied")
    print(f"{sum(waiting.values())} jobs wait")
    if trouble is not None:
        print(f"no videos are made: {trouble}")


@cluster_app.command
def drain(node: str, *, data_dir: DataDir = None, database_url: Database = None, json_: Json = False) -> None:
    """Empty a node: its jobs are checkpointed and continue on other nodes; nothing starts there until `undrain`.

    Parameters
    ----------
    node
        Its host name, its address, or the beginning of its id in Ray.
    """
    with _store(data_dir, database_url) as store:
        store.drain_node(node)
    emit({"draining": node}, json_)


@cluster_app.command
def undrain(node: str, *, data_dir: DataDir = None, database_url: Database = None, json_: Json = False) -> None:
    """Let replicas start on a node again."""
    with _store(data_dir, database_url) as store:
        if not store.undrain_node(node):
            raise ConfigError(f"{node!r} is not being emptied.", hint="`wanduet cluster status` says which nodes are.")
    emit({"undrained": node}, json_)


def _store(data_dir: Path | None, url: str | None) -> "AbstractContextManager[ClusterStore]":
    with extra("server"):
        from wanduet.cluster.store import ClusterStore
        from wanduet.jobs.files import JobFiles
    return closing(ClusterStore(JobFiles(EngineConfig(data_dir=data_dir).data_folder), url))
