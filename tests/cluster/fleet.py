"""A cluster on one machine: a real PostgreSQL, Ray nodes with GPUs that are only declared, and `wanduet serve`."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import sqlalchemy as sa
from postgres import need, postgres

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from real_server import LONG as LONG
from real_server import SMALL, Server, serving

from wanduet.cluster.fit import Fitter
from wanduet.cluster.shapes import Node, declared_devices
from wanduet.cluster.store import ClusterStore
from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.jobs.files import JobFiles
from wanduet.jobs.keeper import SPANS
from wanduet.jobs.records import StoredJob, demand_of
from wanduet.jobs.schema import jobs
from wanduet.planning.hardware import CUDA_CONTEXT_BYTES
from wanduet.planning.planner import HEADROOM_BYTES
from wanduet.request import GenerationRequest
from wanduet.runtime.models import Models

BIG = {**SMALL, "size": "352x352"}  # more than the small GPUs of `mixed_nodes` have
PATIENCE = 240.0  # seconds; a busy machine may need most of them, a good one needs few


def wait(what: str, condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """What the condition gives as soon as it gives something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"this did not come about in time: {what}")


class Ray:
    """Nodes of one Ray cluster, each with a raylet of its own, in the hands of `ray_nodes.py`."""

    def __init__(self, folder: str, log: Path) -> None:
        # A token of this cluster's own: no other on this machine can be reached by mistake, nor this one by others.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        # Ray notes a cluster's address where RAY_TMPDIR says, in a folder that it takes for granted.
        Path(folder, "ray").mkdir()
        # Replicas are what the nodes are for: Ray gives its workers a lower priority than other programs have.
        self.environment = token | {"RAY_gcs_rpc_server_reconnect_timeout_s": "10", "RAY_worker_niceness": "0"}
        self.environment |= {"RAY_prestart_worker_first_driver": "0"}  # of workers that nobody will use
        self._log = open(log, "ab")  # noqa: SIM115 - closed by `shutdown`
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ray_nodes.py")), folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **self.environment, "RAY_TMPDIR": folder},
            start_new_session=True,
        )
        self.nodes: dict[str, str] = {}  # name to id
        self.address = self.head()

    @property
    def pid(self) -> int:
        """The process that started all of Ray's."""
        return self._process.pid

    def _ask(self, *words: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(words).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"Ray's nodes have ended: {self._log.name}"
        return json.loads(answer)

    def head(self, port: int = 0) -> str:
        """Start the head; returns the cluster's address."""
        address, self.client_address = self._ask("head", port)
        return address

    def add(self, name: str, gpus: str, cpus: int | None = None) -> str:
        """Start a node whose GPUs are declared, with a CPU for each unless said; returns its id."""
        self.nodes[name] = self._ask("add", name, gpus, cpus)
        return self.nodes[name]

    def kill(self, name: str) -> None:
        """End a node as a power cut would: raylet and workers at once."""
        self.nodes.pop(name, None)
        self._ask("kill", name)

    def shutdown(self) -> None:
        with self._process as process:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        self._log.close()


def mixed_nodes(small_nodes: int = 1) -> dict[str, str]:
    """Nodes with a GPU between what the model's default and BIG need, and one with plenty."""
    models = Models(EngineConfig(model="miniature"))
    tiny = declared_devices("1x700MiB")
    fit = Fitter(models.memory, models.config).on(Node("", "", tiny, 2**34, 1).shape(1))
    needs = [fit(demand_of(request)).peak_bytes for request in ({}, _request(BIG))]
    assert needs[0] < needs[1]
    small = (sum(needs) // 2 + HEADROOM_BYTES + CUDA_CONTEXT_BYTES) / 2**20
    return {**{f"small{n}": f"1x{small:.2f}MiB" for n in range(small_nodes)}, "large": "1x24GiB"}


def _request(fields: dict[str, str]) -> dict[str, Any]:
    width, height = (int(side) for side in fields["size"].split("x"))
    rest = {name: int(value) for name, value in fields.items() if name != "size"}
    return {**rest, "width": width, "height": height}


@dataclass
class Fleet:
    """Everything that runs."""

    ray: Ray
    server: Server
    store: ClusterStore
    url: str
    folder: Path
    nodes: dict[str, str]
    shapes: dict[str, str] = field(default_factory=dict)  # of workers, as the controller told

    def replicas(self, state: str = "ready") -> list[dict[str, Any]]:
        found = [one for one in self.store.replicas() if one["state"] == state]
        self.shapes |= {one["worker"]: one["shape"] for one in found if one["worker"]}
        return found

    def running(self, job_id: str, progress: float = 0.0) -> str | None:
        """The worker of a job that has come so far."""
        job = self.store.get(job_id)
        return job.worker if job.status == "in_progress" and job.progress > progress else None

    def steps_done(self, job_id: str) -> int:
        """Steps of a running job with one video, as far as they have been told."""
        start, end = SPANS["denoise"]
        job = self.store.get(job_id)
        return round(job.request["num_inference_steps"] * (job.progress - start) / (end - start))

    def finished(self, ids: list[str]) -> list[StoredJob] | None:
        self.replicas()
        found = [self.store.get(job_id) for job_id in ids]
        return found if all(job.finished for job in found) else None

    def completions(self) -> int:
        """How often any job was completed since the database began: more than jobs would mean twice."""
        return self.store.statistics().stages["queue_s"][1]

    def rows(self) -> int:
        with self.store.database.connect() as connection:
            return connection.scalar(sa.select(sa.func.count()).select_from(jobs)) or 0

    def check(self, ids: list[str], local: "Local", seconds: float = PATIENCE) -> list[StoredJob]:
        """All done, each once, and the same frames as on one machine."""
        found = wait("all jobs are finished", lambda: self.finished(ids), seconds)
        assert [(job.status, job.error) for job in found] == [("completed", None)] * len(ids)
        for job in found:
            assert np.array_equal(self.server.frames(job.id), local.frames(job.request)), job.id
        assert self.completions() == self.rows()
        return found

    def check_fits(self, found: list[StoredJob]) -> None:
        """No big job was made on a small GPU; its decode alone does fit there."""
        big = {self.shapes[job.report["worker"]] for job in found if job.request["height"] == 352}
        assert big
        assert {shape for shape in big if not shape.endswith(" decode")} <= {"1x24GiB"}

    def node_of(self, worker: str) -> str:
        """The id of the node where a worker runs: of its process's parent, the raylet, which has it as an argument."""
        parent = int(Path(f"/proc/{pid_of(worker)}/stat").read_text().rpartition(")")[2].split()[1])
        arguments = Path(f"/proc/{parent}/cmdline").read_bytes().decode().split("\0")
        return next(one.partition("=")[2] for one in arguments if one.startswith("--node_id="))

    def name_of(self, node_id: str) -> str:
        return next(name for name, known in self.ray.nodes.items() if known == node_id)


def pid_of(worker: str) -> int:
    return int(worker.split(".")[1])


def kill_worker(worker: str) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid_of(worker), signal.SIGKILL)


@contextmanager
def fleet(
    folder: Path, nodes: dict[str, str], *flags: str, cpus: int | None = None, **database: object
) -> Iterator[Fleet]:
    """A cluster of the nodes (name to GPUs), ready when a replica on each takes jobs. `database`: PostgreSQL's settings."""
    need("ray", "psycopg")
    with postgres(**database) as url, tempfile.TemporaryDirectory(prefix="wray", dir="/tmp") as sockets:
        ray = Ray(sockets, folder / "ray.log")
        try:
            for name, gpus in nodes.items():
                ray.add(name, gpus, cpus)
            arguments = ("--no-page", "--cluster", ray.address, "--database-url", url, *flags)
            with (
                pytest.MonkeyPatch.context() as patch,
                closing(ClusterStore(JobFiles(folder), url)) as store,
            ):
                for name, value in ray.environment.items():
                    patch.setenv(name, value)
                with serving(folder, *arguments) as server:
                    yield Fleet(ray, server, store, url, folder, nodes)
        finally:
            ray.shutdown()


class Local:
    """The same videos on this machine alone, with as many threads as a replica has."""

    def __init__(self, folder: Path) -> None:
        import torch

        from wanduet.engine.pipeline import Engine

        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self._engine = Engine(EngineConfig(model="miniature", devices="cpu", data_dir=folder))
        self._folder = folder
        self._made: dict[str, np.ndarray] = {}

    def frames(self, request: dict[str, Any]) -> np.ndarray:
        key = repr(sorted(request.items()))
        if key not in self._made:
            path = self._folder / f"{len(self._made)}.mp4"
            self._engine.submit(GenerationRequest.parse(**request), OutputOptions(path)).result(PATIENCE)
            with av.open(path) as container:  # as the server's videos are read
                self._made[key] = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        return self._made[key]

    def close(self) -> None:
        import torch

        self._engine.close()
        torch.set_num_threads(self._threads)
