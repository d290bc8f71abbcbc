"""One attempt at one job: run it, renew its lease, publish its videos or store why it failed.

Two threads: the attempt's own follows the engine; the LeaseKeeper's renews the lease, stores progress and
notices that the job was cancelled, deleted or given to another worker.
"""

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import structlog
from sqlalchemy.exc import (
    DBAPIError,
    InterfaceError,
    InternalError,
    OperationalError,
    SQLAlchemyError,
    StatementError,
)

from wanduet.errors import CancelledError, InvalidRequestError, OutputError, WanduetError
from wanduet.jobs.hooks import EngineHooks, RunningJob, VideoEngine
from wanduet.jobs.keeper import AttemptSettings, LeaseKeeper
from wanduet.jobs.logs import describe_error
from wanduet.jobs.prompts import forget_prompts
from wanduet.jobs.records import (
    InputLostError,
    JobError,
    Lease,
    LoraLostError,
    OutputFile,
    StaleLeaseError,
    UnknownJobError,
)
from wanduet.jobs.store import JobStore
from wanduet.jobs.watchdog import FOREVER, Activity, Patience, Watchdog
from wanduet.media.files import write_atomically
from wanduet.request import INPUT_HASH, GenerationRequest

if TYPE_CHECKING:  # the engine imports torch, which a process that only manages jobs does not load
    from wanduet.engine.job import JobResult

log = structlog.get_logger(__name__)


class Attempt:
    """Runs one leased job in the calling thread; `run` raises nothing."""

    def __init__(
        self,
        store: JobStore,
        engine: VideoEngine,
        lease: Lease,
        draining: threading.Event,
        settings: AttemptSettings,
        hooks: EngineHooks | None = None,
    ) -> None:
        self._store = store
        self._engine = engine
        self._lease = lease
        self._settings = settings
        self._hooks = hooks or EngineHooks()
        self._checkpoints: list[str] = []
        self._keeper = LeaseKeeper(store, lease, draining, settings)
        self._activity = Watchdog().add(lease.job.id)
        self.engine_lost = False  # True after a device error: no later job can succeed in this process
        self._work = store.files.work_path(lease.job.id)
        self._log = log.bind(job=lease.job.id, attempt=lease.job.attempts)

    def run(self, activity: Activity | None = None) -> None:
        """Finish or fail the job, put it back into the queue, or drop it if another worker has it now.

        `activity` is this job's entry in the process's Watchdog; the attempt sets how long each next event may take.
        """
        self._activity = activity or self._activity
        self._keeper.on_lost = self._activity.leave
        prompt = {"prompt": self._lease.job.request.get("prompt")} if self._settings.log_prompts else {}
        self._log.info("job started", **prompt)
        resume = self._lease.job.attempts > 1
        try:
            with self._keeper, self._store.files.attempt(self._lease.job.id, resume):
                self._work_and_end()
        except Exception as error:  # the work folder could not be made, or storing the end failed
            with suppress(SQLAlchemyError, WanduetError):
                self._crashed(error)

    def _work_and_end(self) -> None:
        try:
            self._publish(self._saved_outcome() or self._generate())
        except StaleLeaseError:
            self._lost()
        except CancelledError as error:
            if self._keeper.lost.is_set():
                self._lost()
            elif self._keeper.failure is not None:
                self._crashed(self._keeper.failure)
            elif self._keeper.draining.is_set():
                self._put_back()
            else:
                self._crashed(error)
        except OutputError as error:
            self._disk_failed(error)
        except SQLAlchemyError as error:  # StoreBrokenError is a WanduetError, too, but not the job's fault
            self._crashed(error)
        except WanduetError as error:
            self._failed(error)
        except Exception as error:
            self._crashed(error)

    def _generate(self) -> dict[str, Any]:
        """Run the job on the engine. Returns the content of `result.json`."""
        request = GenerationRequest.parse(**self._lease.job.request)
        output = self._hooks.make_output(self._work, self._lease.job.attempts > 1)
        watcher = self._hooks.watch_steps(self._engine, self._store.files.preview_path(self._lease.job.id), request)
        given = self._with_input(request)
        running = self._engine.submit(given, output, watch=watcher)
        try:
            result, steps = self._follow(running, request.num_videos_per_prompt)
        except BaseException:
            # If it still runs, it must not write to the same files as the next attempt.
            running.cancel()
            with suppress(Exception):
                running.result()
            raise
        finally:
            self._activity.left()
        outcome = {
            "videos": [video.path.name for video in result.videos],
            "report": {
                "timings": result.timings,
                "steps": steps,
                "peak_memory_bytes": result.peak_memory_bytes,
                "warnings": list(result.warnings),
                "seeds": [video.seed for video in result.videos],
                "worker": self._lease.worker,
            },
        }
        # After a kill from here on, the next attempt finds this file and the videos and only publishes them.
        write_atomically(self._outcome_path, json.dumps(outcome).encode())
        return outcome

    def _with_input(self, request: GenerationRequest) -> GenerationRequest:
        """Return the request with its input video's path in place of the hash. Raises InputLostError."""
        if request.input_video is None:
            return request
        path = self._store.files.bring_input(self._lease.job.id)
        if path is None:
            raise InputLostError("The video that this job starts from is missing.", hint="Upload it again.")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if request.input_video != f"{INPUT_HASH}{found}":
            raise InputLostError(
                "The video that this job starts from has changed since it was uploaded.", hint="Upload it again."
            )
        return request.model_copy(update={"input_video": str(path)})

    def _of_input(self, error: InvalidRequestError) -> WanduetError:
        """Return the error for an input video that the engine cannot read: it is lost, or else damaged, which nobody saw
        when it was uploaded."""
        try:
            self._with_input(GenerationRequest.parse(**self._lease.job.request))
        except InputLostError as lost:
            return lost
        return InvalidRequestError(error.field, "the uploaded file", error.allowed)

    def _follow(self, running: RunningJob, videos: int) -> tuple["JobResult", int]:
        """Wait for the engine's job. Returns its result and its number of steps, raises the error it failed with."""
        self._keeper.watch(running)
        self._checkpoints = self._hooks.checkpoint_keys(self._engine, running)
        self._store.files.note_checkpoints(self._lease.job.id, self._checkpoints)
        patience = Patience(self._activity.settings, self._hooks.predict_seconds(running))
        steps, before = 0, (0, 0)
        for event in running.events():
            self._activity.expect(patience.after(event))
            self._keeper.note(event, videos)
            if event.phase == "denoise":  # the first event of a video gives the step it starts at
                steps += before == (event.video, event.done - 1)
                before = event.video, event.done
        return running.result(), steps

    def _put_back(self) -> None:
        self._store.files.keep(self._lease.job.id)
        self._end(lambda: self._store.release(self._lease), "released")

    @property
    def _outcome_path(self) -> Path:
        return self._work.with_name("result.json")

    def _saved_outcome(self) -> dict[str, Any] | None:
        """Return the outcome of an earlier attempt that was killed after its last video; None if work is left."""
        if self._lease.job.attempts < 2:
            return None
        try:
            outcome = json.loads(self._outcome_path.read_bytes())
        except (OSError, ValueError):
            # Videos are written atomically, so if all exist, the engine was done.
            count = self._lease.job.request.get("num_videos_per_prompt") or 1
            names = [self._work.name] if count == 1 else [f"{self._work.stem}-{i + 1}.mp4" for i in range(count)]
            outcome = {"videos": names, "report": {}}
        return outcome if all((self._work.parent / name).is_file() for name in outcome["videos"]) else None

    def _publish(self, outcome: dict[str, Any]) -> None:
        """Publish the files, then commit: a reader who sees a completed job finds its files."""
        self._store.check(self._lease)
        files: list[OutputFile] = []
        try:
            for index, name in enumerate(outcome["videos"]):
                self._activity.expect(self._activity.settings.phase_seconds)
                files += self._publish_video(index, self._work.with_name(name))
            self._settle(lambda: self._store.complete(self._lease, files, outcome["report"]), "completed")
        except BaseException:
            self._unpublish(files)
            raise
        if self._lease.job.attempts > 1:
            self._store.files.remove_older(self._lease.job.id, self._lease.token)
        self._store.files.discard_work(self._lease.job.id)

    def _unpublish(self, files: list[OutputFile]) -> None:
        """Delete published files, except those of a commit that succeeded although the database reported an error."""
        with suppress(SQLAlchemyError):  # unknown what was committed: a later sweep, or the next attempt, deletes them
            try:
                committed = self._store.get(self._lease.job.id).files
            except UnknownJobError:
                committed = ()
            self._store.files.remove(file.name for file in files if file not in committed)

    def _publish_video(self, index: int, path: Path) -> list[OutputFile]:
        job_id, token = self._lease.job.id, self._lease.token
        files = [self._store.files.publish(job_id, token, index, path)]
        try:
            previews = self._hooks.make_previews(path)
            files += [self._store.files.publish_bytes(job_id, token, index, *one) for one in previews.items()]
        except Exception as error:  # publish the video without a thumbnail rather than fail
            self._log.warning("no previews", error=type(error).__name__)
        return files

    def _lost(self) -> None:
        """Handle a lost lease: delete the attempt's files if the job was finished or deleted by somebody else."""
        self._log.info("job lost")
        with suppress(SQLAlchemyError):  # otherwise a later sweep deletes them
            try:
                unwanted = self._store.get(self._lease.job.id).finished
            except UnknownJobError:
                # A row that is not found proves nothing: an index may be damaged.
                unwanted = self._store.was_deleted(self._lease.job.id)
                # This attempt may have cached the prompt after the deletion.
                forget_prompts(self._store.files.folder, [self._lease.job])
            if unwanted:
                self._store.files.discard_checkpoints(self._checkpoints)
                self._store.files.discard_work(self._lease.job.id)

    def _failed(self, error: WanduetError) -> None:
        about = getattr(error, "field", None)
        if about == "loras" and self._store.lacks_loras(self._lease.job):
            return self._end(lambda: self._store.release(self._lease), f"given back: {error.code}")
        if isinstance(error, InvalidRequestError) and about in ("input_video", "loras"):
            error = LoraLostError(error.given) if about == "loras" else self._of_input(error)
        if error.__cause__ is not None or bool(
            getattr(error, "details", "")
        ):  # a rank's traceback, or the error behind this one
            self._log.warning("job failed", code=error.code, **describe_error(error))
        kind, param = "server_error", None
        if isinstance(error, InvalidRequestError):
            kind, param = "invalid_request_error", error.field
        reason = JobError(error.code, self._public_message(error), kind, param)
        return self._end(lambda: self._store.fail(self._lease, reason), f"failed: {error.code}")

    def _disk_failed(self, error: OutputError) -> None:
        """Put the job back once the disk has room and can be written: a full disk is not the job's fault."""
        waited = 0
        self._activity.expect(FOREVER)
        while (reason := self._store.files.find_no_room(self._settings.reserve_bytes)) is not None:
            if waited % 240 == 0:
                self._log.error(
                    "the data folder's disk cannot be written or is full",
                    reserve=self._settings.reserve_bytes,
                    reason=reason,  # the present one; the job's own error may be an earlier symptom
                )
            waited += 1
            self._activity.expect(FOREVER, f"the worker waits until the data folder can be written: {reason}")
            if self._keeper.lost.wait(self._settings.poll_seconds):
                return self._lost()
            if self._keeper.draining.is_set():
                break
        if waited:
            return self._end(lambda: self._store.release(self._lease), "released: no room on the disk")
        failure = JobError(error.code, self._public_message(error))  # the disk has room, but not enough for this job
        return self._end(lambda: self._store.retry(self._lease, failure, self._settings.max_crashes), "no room for it")

    def _public_message(self, error: WanduetError) -> str:
        return str(error).replace(str(self._store.files.folder), "the data folder")

    def _crashed(self, error: BaseException) -> None:
        self._log.error("job crashed", **describe_error(error))
        self.engine_lost = self.engine_lost or _is_device_lost(error)
        self._store.files.keep(self._lease.job.id)
        if _is_short_of_threads(error):  # which may pass, and is not the job's fault
            self._activity.expect(FOREVER, "the worker waits for threads, of which the system has no more")
            self._keeper.draining.wait(20 * self._settings.poll_seconds)
            return self._end(lambda: self._store.release(self._lease), "released: no more threads")
        reason = JobError("internal_error", f"The engine failed unexpectedly ({type(error).__name__}).")
        return self._end(lambda: self._store.retry(self._lease, reason, self._settings.max_crashes), "crashed")

    def _end(self, commit: Callable[[], object], what: str) -> None:
        try:
            self._settle(commit, what)
        except StaleLeaseError:
            self._lost()

    def _settle(self, commit: Callable[[], object], what: str) -> None:
        """Commit; retry for as long as the database cannot be written, for example on a full disk.

        Raises StaleLeaseError, also if the database refuses this commit for good.
        """
        pause = self._settings.poll_seconds
        self._activity.expect(FOREVER)
        while True:
            try:
                commit()
            except SQLAlchemyError as error:
                self._log.warning("the job store cannot be written", error=type(error).__name__)
                self._activity.expect(FOREVER, "the worker cannot write the job database, and waits for it")
                if _is_permanent(error):
                    self._give_up(error)
                if self._keeper.draining.is_set():  # the next worker finds result.json
                    raise StaleLeaseError("The job store could not be written before the worker had to end.") from error
                time.sleep(pause)
                pause = min(pause * 2, 5.0)
            else:
                self._log.info("job ended", outcome=what)
                return

    def _give_up(self, error: SQLAlchemyError) -> NoReturn:
        """Fail the job because the database refuses its commit for good, if the database accepts at least that."""
        self._log.error("what came of the job cannot be stored", **describe_error(error))
        reason = JobError("not_stored", f"The job database refused what came of the job ({type(error).__name__}).")
        with suppress(SQLAlchemyError):
            self._store.fail(self._lease, reason)
        raise StaleLeaseError(reason.message) from error


def _is_device_lost(error: BaseException) -> bool:
    """Return whether this is an error after which every further call to the device fails in this process."""
    lost = type(error).__name__ == "AcceleratorError" or (
        isinstance(error, RuntimeError) and "CUDA error" in str(error)
    )
    return lost or (error.__cause__ is not None and _is_device_lost(error.__cause__))


def _is_short_of_threads(error: BaseException) -> bool:
    """Return whether a thread could not be started, for lack of threads or memory."""
    return isinstance(error, RuntimeError) and "can't start new thread" in str(error)


# SQLite's temporary errors: BUSY, LOCKED, NOMEM, INTERRUPT, IOERR, FULL, CANTOPEN, PROTOCOL, SCHEMA. All others
# (corrupt, not a database, read-only, an error in the statement) are permanent.
_PASSING = {5, 6, 7, 9, 10, 13, 14, 15, 17}


def _is_permanent(error: SQLAlchemyError) -> bool:
    """Return whether repeating a commit that failed with this error is useless."""
    if not isinstance(error, DBAPIError):
        return isinstance(
            error, StatementError
        )  # StatementError: a value that cannot be stored. Others: no free connection, for example
    if error.connection_invalidated:
        return False
    code = getattr(error.orig, "sqlite_errorcode", None)
    if isinstance(error.orig, sqlite3.Error) and code is not None:
        return code & 0xFF not in _PASSING
    return not isinstance(error, OperationalError | InterfaceError | InternalError)
