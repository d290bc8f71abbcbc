"""Starts one worker process for each device. If one process fails, all are ended, and the error names the rank.

The parent process is not a rank: it only waits for messages, so that it can always respond, cancel, and clean up.
"""

import os
import pickle
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, get_context, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

from wanduet.distributed.common_stop import CommonStop
from wanduet.distributed.interrupts import IgnoreSigint
from wanduet.distributed.rank import Cancel, Command, Failure, Member, Message, Result, dumps, rank_main
from wanduet.errors import ConfigError, WanduetError

# The longest time that a collective may take, in seconds, if the caller does not know how long a step takes.
COLLECTIVE_TIMEOUT = 300.0
# Seconds: how long other ranks may still report their errors after the first one has failed, and how long a process may
# take to exit after its work is done.
REPORT_GRACE, EXIT_TIMEOUT = 0.5, 10.0
PIPE_BYTES = 2**20  # Linux' default limit for unprivileged users

# Likely causes of an exit code, for a process that ended without a report.
_HINTS: dict[int | None, str] = {
    1: "If this is a script of your own, start the work under `if __name__ == '__main__':`.",
    -9: "The system may have run out of host memory.",
    -6: "A collective may have taken longer than its timeout, or a kernel failed.",
}


class RankFailedError(WanduetError):
    """A worker process of a group failed, died or did not respond; the group has been ended.

    `rank` is the rank that most likely caused it, `details` its traceback, or "" if it has sent none.
    """

    code = "rank_failed"

    def __init__(self, message: str, rank: int, details: str = "", *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.rank = rank
        self.details = details
        if details:
            self.add_note(details)


class RankGroup:
    """Worker processes, one for each device, that run `work(rank, *args)`, where `rank` is a `Rank`.

    `work` must be importable and `args` picklable, because processes are spawned. Use the group as a context manager:
    its exit ends every process, also after an exception or Ctrl-C. If the parent process is killed, the workers notice
    and exit. Call all methods from one thread, except `cancel`, which any thread may call.
    """

    def __init__(
        self,
        work: Callable[..., object],
        devices: Sequence[str],
        *args: object,
        timeout_s: float = COLLECTIVE_TIMEOUT,
    ) -> None:
        """Start the processes.

        `devices` has one entry for each rank, such as "cuda:0" or "cpu". `timeout_s` is the longest time that a
        collective may take, in seconds, before the waiting rank fails. Raises ConfigError if `devices` is empty.
        """
        if not devices:
            raise ConfigError("A group needs at least one device.")
        self.devices = tuple(devices)
        self._folder = tempfile.TemporaryDirectory(prefix="wanduet-ranks-", ignore_cleanup_errors=True)
        # A file, not a port: no race for a free port, no question by a firewall.
        rendezvous = (Path(self._folder.name) / "store").as_uri()
        self._processes: list[BaseProcess] = []
        self._to_ranks: list[Connection[Any, Any]] = []
        self._from_ranks: list[Connection[Any, Any]] = []
        self._results: dict[int, object] = {}
        self._failures: dict[int, Failure] = {}
        self._inbox: deque[tuple[int, Message]] = deque()
        self._sent = 0
        self._cancelled: set[int] = set()  # numbers of messages
        self._error: WanduetError | None = None
        context = get_context("spawn")
        self._stop = CommonStop(context, len(self.devices))  # kept: a rank opens its lock by name as it starts
        try:
            for index in range(len(self.devices)):
                incoming, to_rank = _large_pipe(context)
                from_rank, outgoing = _large_pipe(context)
                self._to_ranks.append(to_rank)
                self._from_ranks.append(from_rank)
                process = context.Process(
                    target=IgnoreSigint(rank_main),
                    args=(
                        Member(index, self.devices, rendezvous, timeout_s, self._stop),
                        incoming,
                        outgoing,
                        work,
                        args,
                    ),
                    name=f"wanduet-rank-{index}",
                    daemon=True,
                )
                with _safe_module_path(), _sigint_blocked():
                    process.start()
                self._processes.append(process)
                # Close the worker's ends in this process, so that the worker's death closes the pipes.
                incoming.close()
                outgoing.close()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether all processes run and none has failed."""
        return self._error is None and all(process.is_alive() for process in self._processes)

    def send(self, message: object) -> int:
        """Send a picklable message to all ranks, and return its number, for `cancel`."""
        self._sent += 1
        self._post(Message(message, self._sent))
        return self._sent

    def cancel(self, task: int = 0) -> None:
        """Make `Rank.cancelled` and `Rank.cancelled_in_step` return True, at the same step and block on all ranks, while
        they work on message number `task`.

        0 is the work that ranks do before they receive a message. A cancel may come before a rank has started, or after
        the work is done; it never affects another message. To end the ranks at once, exit the group.
        """
        self._cancelled.add(task)
        self._post(Cancel(task))

    def receive(self, timeout_s: float | None = None, task: int | None = None) -> tuple[int, object] | None:
        """Return the index of a rank and the next message that it reported; None when all ranks' work is done.

        With `task`, return the next message about that task and drop those about others. After a failure, all processes
        are ended and the messages that have arrived are returned first; then this raises RankFailedError, or the
        WanduetError that a rank raised, unless it was in work that is cancelled. Raises TimeoutError if nothing arrives
        within `timeout_s` seconds.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            while self._inbox:
                index, message = self._inbox.popleft()
                if task in (None, message.task):
                    return index, message.content
            if self._error is not None:
                raise self._error
            pending = [index for index in range(len(self.devices)) if index not in self._results]
            if not pending:
                return None
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = connection.wait([self._from_ranks[index] for index in pending], left)
            if not ready:
                raise TimeoutError(f"No rank reported anything for {timeout_s} s.")
            items = [self._read(index) for index in pending if self._from_ranks[index] in ready]
            if any(item is None or isinstance(item, Failure) for item in items):
                self._error = self._end_failed()

    def messages(self) -> Iterator[tuple[int, object]]:
        """Yield what `receive` returns, until all ranks' work is done. Raises what `receive` raises."""
        while (item := self.receive()) is not None:
            yield item

    def results(self) -> list[object]:
        """Wait for all ranks and return what `work` returned on each, in rank order; drop messages not received yet.

        Raises what `receive` raises.
        """
        for _ in self.messages():
            pass
        return [self._results[index] for index in range(len(self.devices))]

    def close(self) -> None:
        """End every process and wait until it has exited. A second call does nothing."""
        if len(self._results) == len(self.devices):
            self._post("exit")
            deadline = time.monotonic() + EXIT_TIMEOUT
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            if process.is_alive():
                process.kill()
        for process in self._processes:
            process.join()
        for pipe in (*self._to_ranks, *self._from_ranks):
            pipe.close()
        self._folder.cleanup()

    def _post(self, item: Message | Cancel | Command) -> None:
        data = dumps(item)
        for pipe in self._to_ranks:
            with suppress(OSError):  # the process has ended; `receive` raises the error
                pipe.send_bytes(data)

    def _read(self, index: int) -> Message | Result | Failure | None:
        """Read and store the next item from a rank; return None if its process has ended without a report."""
        try:
            item = pickle.loads(self._from_ranks[index].recv_bytes())
        except (EOFError, OSError):
            return None
        if isinstance(item, Result):
            self._results[index] = item.value
        elif isinstance(item, Failure):
            self._failures[index] = item
        elif isinstance(item, Message):
            self._inbox.append((index, item))
        return item

    def _end_failed(self) -> WanduetError:
        """End all processes and return the error of the rank that caused the failure.

        A rank that loses the connection to another one fails too; hence the short wait for further reports.
        """
        deadline = time.monotonic() + REPORT_GRACE
        ended: list[int] = []
        pending = set(range(len(self.devices))) - set(self._results) - set(self._failures)
        while pending and (left := deadline - time.monotonic()) > 0:
            ready = connection.wait([self._from_ranks[index] for index in pending], left)
            for index in sorted(pending):
                if self._from_ranks[index] in ready:
                    item = self._read(index)
                    if item is None:
                        ended.append(index)
                    if not isinstance(item, Message):
                        pending.discard(index)
        for index in ended:
            self._processes[index].join(EXIT_TIMEOUT)
        exit_codes = {index: self._processes[index].exitcode for index in ended}
        self.close()
        return self._root_cause(exit_codes, sorted(pending))

    def _root_cause(self, exit_codes: dict[int, int | None], unresponsive: list[int]) -> WanduetError:
        """Choose the error to raise.

        A failure that is not a lost connection comes first, then a process that ended without a report (`exit_codes`),
        then a rank that has not responded (`unresponsive`) while another one failed.
        """
        by_time = sorted(self._failures.items(), key=lambda item: item[1].when)
        causes = [(index, failure) for index, failure in by_time if not failure.secondary]
        if not causes and exit_codes:
            index, code = next(iter(exit_codes.items()))
            return RankFailedError(f"{self._name(index)} died: {_describe_exit(code)}.", index, hint=_HINTS.get(code))
        index, failure = (causes or by_time)[0]
        # What a rank raises in cancelled work is no concern of the next message: to that, the rank is lost.
        if failure.error is not None and failure.task not in self._cancelled:
            return failure.to_error()
        message = f"{self._name(index)} failed: {failure.summary}"
        if failure.secondary and unresponsive:
            hint = f"{' and '.join(map(self._name, unresponsive))} did not answer."
            return RankFailedError(message, unresponsive[0], failure.traceback, hint=hint)
        return RankFailedError(message, index, failure.traceback)

    def _name(self, index: int) -> str:
        return f"Rank {index} ({self.devices[index]})"


def run_on_ranks(
    work: Callable[..., object], devices: Sequence[str], *args: object, timeout_s: float = COLLECTIVE_TIMEOUT
) -> list[object]:
    """Run `work(rank, *args)` on every device and return the results in rank order.

    See RankGroup for the parameters. Raises what `RankGroup.receive` raises.
    """
    with RankGroup(work, devices, *args, timeout_s=timeout_s) as group:
        return group.results()


def _large_pipe(context: BaseContext) -> "tuple[Connection[Any, Any], Connection[Any, Any]]":
    """Return the reader and the writer of a one-way pipe, with a large buffer where the system allows it.

    Latents and frames go through it in pieces of the buffer's size; writer and reader wait for each other at each.
    """
    reader, writer = context.Pipe(duplex=False)
    if sys.platform == "linux":
        import fcntl

        with suppress(OSError):  # the user's limit for all pipes is reached
            fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reader, writer


@contextmanager
def _safe_module_path() -> Iterator[None]:
    """Start processes inside this without the current folder in their module path: a `json.py` may lie there.

    Once started, they get this process's own module path from multiprocessing.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("PYTHONSAFEPATH", None)
        else:
            os.environ["PYTHONSAFEPATH"] = before


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Start processes inside this with SIGINT blocked, until `rank_main` ignores it.

    Otherwise a terminal's Ctrl-C would end them with a traceback during the seconds that their imports take.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows: there only `IgnoreSigint` protects them, a moment later
        yield
        return
    resource_tracker.ensure_running()  # otherwise the first start would start it, which unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _describe_exit(code: int | None) -> str:
    """Return a text such as `killed by SIGKILL` or `exit status 3`."""
    if code is None:
        return "its connection broke"
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
