"""Start one worker process a device and keep them together: if one ends, all end, with an error that says which.

The starter is no rank: it only waits, so that it can always answer, cancel, and clear away.
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
from types import TracebackType
from typing import Any, Self

from wanduet.distributed.interrupts import WithoutInterrupts
from wanduet.distributed.rank import Cancel, Command, Failure, Message, Result, pack, serve
from wanduet.errors import ConfigError, WanduetError

# How long a collective may take, in seconds, where the caller does not know how long a step takes.
COLLECTIVE_TIMEOUT = 300.0
# After the first sign of failure, how long others may say what they saw, and how long a process may take to
# end after its work is done.
GRACE, LEAVE = 0.5, 10.0
PIPE_BYTES = 2**20  # what Linux allows everybody

# What may be behind the exit code of a process that said nothing.
_HINTS: dict[int | None, str] = {
    1: "If this is a script of your own, start the work under `if __name__ == '__main__':`.",
    -9: "The system may have run out of host memory.",
    -6: "A collective may have taken longer than its timeout, or a kernel failed.",
}


class RankFailedError(WanduetError):
    """A worker process of a group failed, died or fell silent; the group has been ended.

    `rank` is the one that is to blame as far as can be seen; `details` its traceback, where it left one.
    """

    code = "rank_failed"

    def __init__(self, message: str, rank: int, details: str = "", *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.rank = rank
        self.details = details
        if details:
            self.add_note(details)


class RankGroup:
    """Worker processes, one a device, that run `work(rank, *args)`; see Rank for what they are given.

    `work` must be importable and `args` picklable, because processes are spawned. Use as a context manager:
    leaving it ends every process, also by an exception or Ctrl-C. If the starter itself is killed, the
    workers notice and end. Methods are for one thread, `cancel` for any.
    """

    def __init__(
        self,
        work: Callable[..., object],
        devices: Sequence[str],
        *args: object,
        timeout_s: float = COLLECTIVE_TIMEOUT,
    ) -> None:
        """Start the processes. `devices` like "cuda:0" or "cpu", one a rank; `timeout_s` is how long a
        collective may take before the rank that waits gives up. Raises ConfigError for no devices."""
        if not devices:
            raise ConfigError("A group needs at least one device.")
        self.devices = tuple(devices)
        self._folder = tempfile.TemporaryDirectory(prefix="wanduet-ranks-", ignore_cleanup_errors=True)
        # A file, not a port: nothing to race for, no firewall that asks.
        rendezvous = (Path(self._folder.name) / "store").as_uri()
        self._processes: list[BaseProcess] = []
        self._to_ranks: list[Connection[Any, Any]] = []
        self._from_ranks: list[Connection[Any, Any]] = []
        self._results: dict[int, object] = {}
        self._failures: dict[int, Failure] = {}
        self._inbox: deque[tuple[int, Message]] = deque()
        self._sent = 0
        self._error: WanduetError | None = None
        context = get_context("spawn")
        try:
            for index in range(len(self.devices)):
                incoming, to_rank = _wide_pipe(context)
                from_rank, outgoing = _wide_pipe(context)
                self._to_ranks.append(to_rank)
                self._from_ranks.append(from_rank)
                process = context.Process(
                    target=WithoutInterrupts(serve),
                    args=(index, self.devices, rendezvous, timeout_s, incoming, outgoing, work, args),
                    name=f"wanduet-rank-{index}",
                    daemon=True,
                )
                with _unsearched_folder(), _interrupts_held():
                    process.start()
                self._processes.append(process)
                # Only the worker may hold its ends, or its death would not close the pipes.
                incoming.close()
                outgoing.close()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def send(self, message: object, rank: int | None = None) -> int:
        """Give a picklable message to one rank's `receive`, or to every rank's. Returns its number, for `cancel`."""
        self._sent += 1
        self._tell(Message(message, self._sent), range(len(self.devices)) if rank is None else [rank])
        return self._sent

    def cancel(self, task: int = 0) -> None:
        """Let `Rank.cancelled` say so, on all ranks at the same step, while they work on that message; 0 stands for
        what they do before they receive any. It may come before a rank has started, or after the work is done, and
        never concerns another message. To end the ranks at once, leave the group."""
        self._tell(Cancel(task), range(len(self.devices)))

    def receive(self, timeout_s: float | None = None, task: int | None = None) -> tuple[int, object] | None:
        """The next message that a rank reported, with its index; None when all ranks' work is done. With `task`, the next
        that was reported about that message; those about others are dropped.

        Raises RankFailedError, or the WanduetError that a rank raised, after all processes have been ended and
        every message that still arrived has been given out; TimeoutError if nothing came for `timeout_s`.
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
        """All that the ranks report, until their work is done. Raises what `receive` raises."""
        while (item := self.receive()) is not None:
            yield item

    def results(self) -> list[object]:
        """What the work returned on each rank, in order; messages not yet read are dropped. Raises what
        `receive` raises."""
        for _ in self.messages():
            pass
        return [self._results[index] for index in range(len(self.devices))]

    def close(self) -> None:
        """End every process and wait until it is gone; done twice, it does nothing."""
        if len(self._results) == len(self.devices):
            self._tell("leave", range(len(self.devices)))
            deadline = time.monotonic() + LEAVE
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

    def _tell(self, item: Message | Cancel | Command, ranks: Sequence[int]) -> None:
        data = pack(item)
        for index in ranks:
            try:
                self._to_ranks[index].send_bytes(data)
            except OSError:  # it is gone; `receive` will say so
                continue

    def _read(self, index: int) -> Message | Result | Failure | None:
        """The next thing from a rank, noted; None if it is gone without a word."""
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
        """End the group and say who is to blame. A rank that lost another one fails too; hence the short wait
        for what others have to say, and the order in which they are believed."""
        deadline = time.monotonic() + GRACE
        silent: list[int] = []
        pending = set(range(len(self.devices))) - set(self._results) - set(self._failures)
        while pending and (left := deadline - time.monotonic()) > 0:
            ready = connection.wait([self._from_ranks[index] for index in pending], left)
            for index in sorted(pending):
                if self._from_ranks[index] in ready:
                    item = self._read(index)
                    if item is None:
                        silent.append(index)
                    if not isinstance(item, Message):
                        pending.discard(index)
        for index in silent:
            self._processes[index].join(GRACE)
        exit_codes = {index: self._processes[index].exitcode for index in silent}
        self.close()
        return self._blame(exit_codes, sorted(pending))

    def _blame(self, exit_codes: dict[int, int | None], mute: list[int]) -> WanduetError:
        """The error for what is known: what ranks said, how those that said nothing ended, who still runs."""
        by_time = sorted(self._failures.items(), key=lambda item: item[1].when)
        causes = [(index, failure) for index, failure in by_time if not failure.echo]
        if not causes and exit_codes:
            index, code = next(iter(exit_codes.items()))
            return RankFailedError(f"{self._name(index)} died: {_exit(code)}.", index, hint=_HINTS.get(code))
        index, failure = (causes or by_time)[0]
        if failure.error is not None:
            return failure.raised_again()
        message = f"{self._name(index)} failed: {failure.summary}"
        if failure.echo and mute:
            hint = f"{' and '.join(map(self._name, mute))} did not answer."
            return RankFailedError(message, mute[0], failure.traceback, hint=hint)
        return RankFailedError(message, index, failure.traceback)

    def _name(self, index: int) -> str:
        return f"Rank {index} ({self.devices[index]})"


def run_on_ranks(
    work: Callable[..., object], devices: Sequence[str], *args: object, timeout_s: float = COLLECTIVE_TIMEOUT
) -> list[object]:
    """Run `work(rank, *args)` on every device and return the results in order. See RankGroup; raises what
    `RankGroup.receive` raises."""
    with RankGroup(work, devices, *args, timeout_s=timeout_s) as group:
        return group.results()


def _wide_pipe(context: BaseContext) -> "tuple[Connection[Any, Any], Connection[Any, Any]]":
    """A one-way pipe, its reader first, that takes a large message in few pieces where the system lets it: latents and
    frames go through it, and for each piece writer and reader wait for each other."""
    reader, writer = context.Pipe(duplex=False)
    if sys.platform == "linux":
        import fcntl

        with suppress(OSError):  # the user's pipes hold as much as they may
            fcntl.fcntl(writer.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return reader, writer


@contextmanager
def _unsearched_folder() -> Iterator[None]:
    """What is started meanwhile does not look for modules in the current folder, where a `json.py` may lie that is no
    business of this program. Afterwards it gets this process's own module path."""
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
def _interrupts_held() -> Iterator[None]:
    """What is started meanwhile is born deaf to a terminal's Ctrl-C, until it says itself what to do with it (see
    `serve`): it would else die with a traceback in the seconds that its imports take."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows: `WithoutInterrupts` does so a moment later
        yield
        return
    resource_tracker.ensure_running()  # else the first start would do that, which lets go of interrupts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit(code: int | None) -> str:
    """`killed by SIGKILL`, `exit status 3`."""
    if code is None:
        return "its connection broke"
    if code >= 0:
        return f"exit status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
