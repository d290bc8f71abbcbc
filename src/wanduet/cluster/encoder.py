"""An encoder: a process on a node without GPUs that encodes the prompts of queued jobs ahead of time.

It leases no job. It stores embeddings where every replica's own encoder looks first, so a job never depends on it: if
it is late or dead, the replica encodes. A lock keeps two encoders from encoding the same prompt at one time; if both
did, they would write the same file.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import structlog
from sqlalchemy.exc import SQLAlchemyError

from wanduet.cluster.files import open_files
from wanduet.cluster.fit import Fitter
from wanduet.cluster.replica import ReplicaStatus, prepare_process
from wanduet.cluster.settings import REPLICA_CONNECTIONS, ReplicaOrder
from wanduet.cluster.store import ClusterStore
from wanduet.errors import CancelledError, InvalidRequestError, WanduetError
from wanduet.jobs.leases import WorkerLock
from wanduet.jobs.logs import configure_logs
from wanduet.jobs.prompts import forget_prompts
from wanduet.jobs.records import StoredJob, UnknownJobError
from wanduet.request import GenerationRequest

log = structlog.get_logger(__name__)

AHEAD = 64  # queued jobs to examine
TOGETHER = 4  # jobs whose prompts are encoded in one batch, so that streamed weights are read once for all
LOOK_SECONDS = 1.0  # between two polls of the queue, each of which reads that many prompts
REST_SECONDS = 30.0  # after a model error, which the replicas meet and report themselves


class Encoder:
    """The actor's class, with the interface of `Replica`; its methods may run concurrently."""

    def __init__(self, order: ReplicaOrder, node: Callable[[], str | None] = lambda: None) -> None:
        """Read configs and headers; weights are loaded with the first prompt. Raises errors that prevent its work."""
        prepare_process(order.shape.cpu_count)
        configure_logs()
        from wanduet.planning.text import plan_text
        from wanduet.runtime.models import Models
        from wanduet.runtime.text_host import CachedPromptEncoder

        self._order = order
        self._node = node() or order.node
        config = replace(order.settings.worker.config, devices="cpu", strategy="auto", device_speeds=None)
        models = Models(config)
        if models.folder is None:
            raise WanduetError(f"{config.model} has no text encoder.")
        self._spec = models.spec
        dtype = plan_text(models.spec, config).dtype
        residency = Fitter(models.memory, config).encoder_residency(order.shape.host_bytes)
        self._encoder = CachedPromptEncoder(models.folder, dtype, residency, config.data_folder / "embeddings")
        self._store = ClusterStore(
            open_files(config.data_folder, order.settings.storage), order.database_url, connections=REPLICA_CONNECTIONS
        )
        self._draining = threading.Event()
        self._done: set[str] = set()  # queued jobs whose prompts are encoded
        self._idle_since = time.monotonic()
        self._lock = WorkerLock(self._store.files.workers)
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
        self._thread.start()

    def status(self) -> ReplicaStatus:
        """Return its status, for the controller."""
        return ReplicaStatus(
            worker=self._lock.worker,
            jobs=(),
            idle_seconds=time.monotonic() - self._idle_since,
            draining=self._draining.is_set(),
            ended=not self._thread.is_alive(),
            shape=self._order.shape,
            node=self._node,
            pid=os.getpid(),
        )

    def drain(self) -> None:
        """Stop before the next layer; replicas encode what is unfinished."""
        self._draining.set()

    def _run(self) -> None:
        try:
            while not self._draining.is_set():
                pause = LOOK_SECONDS
                try:
                    if self.run_once():
                        self._idle_since, pause = time.monotonic(), 0.0
                except SQLAlchemyError as error:
                    log.warning("the job store cannot be reached", error=type(error).__name__)
                except CancelledError:
                    break
                except WanduetError as error:
                    log.error("prompts cannot be encoded here", error=error.code)
                    pause = REST_SECONDS
                self._draining.wait(pause)
        finally:
            self._lock.release()
            self._store.close()

    def run_once(self) -> bool:
        """Encode new prompts at the head of the queue; return whether there were any.

        Raises CancelledError while draining.
        """
        waiting = self._store.prompts_ahead(AHEAD)
        self._done &= {job.id for job in waiting}
        wanted = {job.id: self._texts(job) for job in waiting if job.id not in self._done}
        self._done |= {job_id for job_id, texts in wanted.items() if not texts}
        new = [job for job in waiting if wanted.get(job.id)][:TOGETHER]
        if not new:
            return False
        with self._store.sole([wanted[job.id][0] for job in new]) as mine:
            jobs = [job for job in new if wanted[job.id][0] in mine]
            texts = dict.fromkeys(text for job in jobs for text in wanted[job.id])
            self._encoder.encode(list(texts), should_cancel=self._draining.is_set)
            for job in jobs:
                self._offer(job, wanted[job.id])
                self._done.add(job.id)
        return bool(jobs)

    def _texts(self, job: StoredJob) -> list[str]:
        """Return the texts of a job to encode, its prompt first; none if its request is invalid."""
        try:
            request = GenerationRequest.parse(**job.request).resolve(self._spec)
        except InvalidRequestError:
            return []
        return [request.prompt, *([request.negative_prompt] if request.uses_guidance else [])]

    def _offer(self, job: StoredJob, texts: list[str]) -> None:
        files = self._store.files
        try:
            if self._store.get(job.id).status == "queued":
                files.offer(job.id, [path for text in texts if (path := self._encoder.path_of(text)) is not None])
            self._store.get(job.id)
        except UnknownJobError:  # deleted meanwhile: its prompt must not remain anywhere
            forget_prompts(files.folder, [job])
            with suppress(OSError):
                files.discard_work(job.id)
