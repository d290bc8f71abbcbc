"""An engine without models: it counts to `num_inference_steps`, keeps checkpoints, writes a few bytes.

Every step and every finished video is one line of `DATA/journal`, so a test can count what ran how often.
The prompt says what goes wrong: `die N` kills the process at step N, `once N` the first time only, `stop N` stops
it there once (SIGSTOP), `stick N` never goes on there once, deaf to a cancel, while the rest of the process lives,
`freeze N` the same, but no other thread runs either, `raise N` raises there, `full N` cannot write there, `hold N` stays there until it is cancelled,
`opened N` has no more file descriptors there once, until a file `descriptors` is in DATA; `orphan N` kills it N times between publishing the video and committing it.
"""

import ctypes
import hashlib
import os
import queue
import random
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from wanduet.config import EngineConfig
from wanduet.errors import CancelledError, OutOfMemoryError, OutputError
from wanduet.jobs.files import JobFiles
from wanduet.jobs.hooks import EngineHooks
from wanduet.jobs.records import NewJob, StoredJob
from wanduet.jobs.store import JobStore
from wanduet.media.files import write_atomically
from wanduet.request import GenerationRequest

STEP_SECONDS = float(os.environ.get("FAKE_STEP_SECONDS", "0.01"))


@dataclass(frozen=True)
class Event:
    phase: str
    done: int = 0
    total: int = 0
    video: int = 0
    seconds_left: float | None = None


@dataclass(frozen=True)
class Output:
    path: Path
    resume: bool


@dataclass(frozen=True)
class Video:
    path: Path
    seed: int


@dataclass(frozen=True)
class Result:
    videos: tuple[Video, ...]
    timings: dict[str, float]
    peak_memory_bytes: dict[str, int]
    warnings: tuple[str, ...] = ()


def first_time(marker: Path) -> bool:
    """Whether nobody asked before, in any process."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    return True


class FakeJob:
    def __init__(
        self,
        data: Path,
        request: GenerationRequest,
        output: Output,
        watch: Any,
        pace: "Pace | None" = None,
    ) -> None:
        self.data, self.request, self.output, self.watch = data, request, output, watch
        self.pace = pace or (lambda job, step: time.sleep(STEP_SECONDS))
        self.cancelled = threading.Event()
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._result: Result | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        self.cancelled.set()

    def events(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            yield event
            if event.phase in ("done", "failed"):
                return

    def result(self, timeout: float | None = None) -> Result:
        self._thread.join(timeout)
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._work()
            self._events.put(Event("done"))
        except BaseException as error:
            self._error = error
            self._events.put(Event("failed"))

    def _work(self) -> Result:
        total = self.request.num_inference_steps or 5
        word, _, number = self.request.prompt.partition(" ")
        name = self.output.path.parent.name
        checkpoint = self.output.path.with_name("checkpoint")
        start = int(checkpoint.read_text()) if self.output.resume and checkpoint.exists() else 0
        for step in range(start, total):
            if self.cancelled.is_set():
                raise CancelledError("cancelled")
            if number.isdigit() and step == int(number):
                if word == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                if word in ("once", "stop") and first_time(self.data / f"{name}.{word}"):
                    os.kill(os.getpid(), signal.SIGKILL if word == "once" else signal.SIGSTOP)
                if word in ("stick", "freeze") and first_time(self.data / f"{name}.{word}"):
                    helper = subprocess.Popen(["sleep", "3600"])  # as a rank would be left behind
                    (self.data / "helper").write_text(str(helper.pid))
                    self._note(f"{name} {word}")
                    if word == "freeze":
                        ctypes.PyDLL(None).sleep(3600)  # keeps Python's lock
                    threading.Event().wait()
                if word == "hold":
                    self.cancelled.wait()
                    continue
                if word == "raise":
                    raise RuntimeError("a secret detail")
                if word == "full":
                    raise OutputError(f"Cannot write {self.data}: the disk is full.")
                if word == "opened" and first_time(self.data / f"{name}.opened"):
                    _use_up_descriptors(self.data / "descriptors")
                    raise OutputError(f"Cannot write {self.data}: the first sign.")
                if word == "oom":
                    raise OutOfMemoryError(f"Out of memory in {self.data}.")
            self.pace(self, step)
            write_atomically(checkpoint, str(step + 1).encode())
            self._note(f"{name} step {step}")
            if self.watch is not None:
                self.watch(step)
            self._events.put(Event("denoise", step + 1, total, seconds_left=(total - step - 1) * STEP_SECONDS))
        if word == "orphan":
            write_atomically(self.output.path.with_name("deaths"), number.encode())
        videos = []
        count = self.request.num_videos_per_prompt
        for index in range(count):
            path = self.output.path if count == 1 else self.output.path.with_stem(f"video-{index + 1}")
            seed = (self.request.seed or 0) + index
            write_atomically(path, content(self.request.prompt, seed))
            videos.append(Video(path, seed))
        self._note(f"{name} done")
        return Result(tuple(videos), {"denoise_s": 1.0, "total_s": 2.0}, {"cpu": 123})

    def _note(self, line: str) -> None:
        handle = os.open(self.data / "journal", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.write(handle, f"{line}\n".encode())
        os.close(handle)


def _use_up_descriptors(until: Path) -> None:
    """Let this process open no more files until there is one of that name."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def give_back() -> None:
        while not until.exists():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    threading.Thread(target=give_back, daemon=True).start()


def make_previews(path: Path) -> dict[str, bytes]:
    deaths = path.with_name("deaths")
    if deaths.exists() and (left := int(deaths.read_text())):
        write_atomically(deaths, str(left - 1).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    return {"thumbnail": b"webp" + path.read_bytes(), "spritesheet": b"jpeg" + path.read_bytes()}


class FakeWatcher:
    """Shows the step it has seen."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, info: int) -> None:
        write_atomically(self.path, b"step %d" % info)


def checkpoint_key(request: GenerationRequest) -> str:
    return hashlib.sha256(f"{request.prompt}/{request.seed}".encode()).hexdigest()[:32]


def measure_memory(engine: "FakeEngine") -> dict[str, dict[str, int]]:
    if (engine.data / "stick-loop").exists() and first_time(engine.data / "loop.stick"):
        threading.Event().wait()
    return {}


class FakeEngine:
    hooks = EngineHooks(
        make_output=Output,
        make_previews=make_previews,
        watch_steps=lambda engine, path, request: FakeWatcher(path),
        checkpoint_keys=lambda engine, running: [checkpoint_key(running.request)],
        predict_seconds=lambda running: {},
        model_of=lambda engine: None,
        measure_memory=measure_memory,
    )

    def __init__(self, config: EngineConfig, pace: "Pace | None" = None) -> None:
        self.data = config.data_folder
        self.pace = pace
        self.jobs: deque[FakeJob] = deque(maxlen=100)

    def submit(self, request: GenerationRequest, output: Any, watch: Any = None) -> FakeJob:
        self.jobs.append(FakeJob(self.data, request, output, watch, self.pace))
        return self.jobs[-1]


Pace = Callable[[FakeJob, int], None]  # called before each step


class Turnstile:
    """Lets so many steps pass; the next one waits until more are let through, all are, or its job is cancelled."""

    def __init__(self, steps: int) -> None:
        self._left = threading.Semaphore(steps)
        self._open = threading.Event()

    def __call__(self, job: FakeJob, step: int) -> None:
        while not (self._open.is_set() or job.cancelled.is_set() or self._left.acquire(timeout=0.005)):
            pass

    def let(self, steps: int) -> None:
        self._left.release(steps)

    def open(self) -> None:
        self._open.set()


def content(prompt: str, seed: int) -> bytes:
    """What the fake video of a prompt and seed holds."""
    return hashlib.sha256(f"{prompt}/{seed}".encode()).digest() * 40


def open_store(data: Path, **options: Any) -> JobStore:
    """A store over a folder; on PostgreSQL, in a schema of that folder's own, where WANDUET_TEST_POSTGRES names one."""
    return JobStore(JobFiles(data), postgres_url(data), **options)


def finish_job(store: JobStore, prompt: str = "a red circle", owner: str = "ann") -> StoredJob:
    """A job that was submitted, claimed and completed, with one published file of 10 bytes."""
    job_id = store.submit(NewJob(owner, "miniature", {"prompt": prompt, "seed": 1})).job.id
    lease = store.claim("w1", 30.0)
    assert lease is not None
    assert lease.job.id == job_id
    path = store.files.work_path(job_id)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"0123456789")
    done = store.complete(lease, [store.files.publish(job_id, lease.token, 0, path)])
    store.files.discard_work(job_id)
    return done


def postgres_url(data: Path) -> str | None:
    base = os.environ.get("WANDUET_TEST_POSTGRES")
    if base is None:
        return None
    schema = "t" + hashlib.sha256(str(data).encode()).hexdigest()[:16]
    database = sa.create_engine(base)
    with database.begin() as connection:
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(1)"))
        connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
    database.dispose()
    url = sa.make_url(base).update_query_dict({"options": f"-csearch_path={schema}"})
    return url.render_as_string(hide_password=False)


def journal(data: Path) -> list[str]:
    path = data / "journal"
    return path.read_text().splitlines() if path.exists() else []


def work(settings: str, url: str | None, ears: Any, log: str, failpoints: tuple[str, ...], jumps: float) -> None:
    """A worker's process, for `multiprocessing`: lives until it is told to drain or `ears` hears that its parent ended.

    It dies once at each failpoint: `JobStore.complete:before`, `JobFiles.publish:after`, ... Its wall clock jumps by
    up to so many seconds, each time that it is looked at.
    """
    from wanduet.jobs.worker import WorkerSettings, run_worker

    os.dup2(ears.fileno(), 0)
    handle = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    parsed = WorkerSettings.from_json(settings)
    if jumps:
        real, dice = time.time, random.Random(os.getpid())
        time.time = lambda: real() + dice.uniform(-jumps, jumps)
        JobStore.__init__.__kwdefaults__["clock"] = time.time
    for point in failpoints:
        _arm(parsed.config.data_folder, point)
    run_worker(parsed, url)


def _arm(data: Path, point: str) -> None:
    place, _, when = point.partition(":")
    owner, _, name = place.partition(".")
    kind: Any = {"JobStore": JobStore, "JobFiles": JobFiles}[owner]
    original = getattr(kind, name)

    def die() -> None:
        if first_time(data / f"{point}.reached"):
            os.kill(os.getpid(), signal.SIGKILL)

    def attacked(self: Any, *values: Any, **named: Any) -> Any:
        if when == "before":
            die()
        found = original(self, *values, **named)
        if when == "after":
            die()
        return found

    setattr(kind, name, attacked)
