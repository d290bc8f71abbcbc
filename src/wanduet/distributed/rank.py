"""One worker process of a group: how it joins the process group and exchanges messages with its parent process."""

import io
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed as dist

from wanduet.distributed.collectives import uses_nccl
from wanduet.distributed.common_stop import CommonStop
from wanduet.distributed.links import Link, configure_nccl, link_between
from wanduet.distributed.mesh import Layout, Mesh
from wanduet.errors import WanduetError

# Exit status of a worker whose parent process has ended, and of one that has reported an error.
EXIT_ORPHANED, EXIT_FAILED = 3, 1


@dataclass(frozen=True, slots=True)
class Failure:
    """A worker's report of the exception that ended it.

    `secondary`: the exception only says that another rank was lost. `when`: Unix time in seconds. `error`: class,
    arguments and attributes of a WanduetError, which the parent process raises again; None for any other exception.
    `task`: the number of the message that the worker had received last, 0 if none.
    """

    summary: str
    traceback: str
    secondary: bool
    when: float
    error: tuple[type[WanduetError], tuple[Any, ...], dict[str, Any]] | None
    task: int = 0

    @classmethod
    def from_exception(cls, error: BaseException, task: int = 0) -> "Failure":
        """Create the report of an exception."""
        return cls(
            f"{type(error).__name__}: {error}",
            "".join(traceback.format_exception(error)),
            isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()),
            time.time(),
            (type(error), error.args, dict(vars(error))) if isinstance(error, WanduetError) else None,
            task,
        )

    def to_error(self) -> WanduetError:
        """Return the worker's WanduetError, with its traceback as a note. Raises ValueError for any other exception."""
        if self.error is None:
            raise ValueError(f"{self.summary} is no WanduetError.")
        kind, arguments, attributes = self.error
        error = kind.__new__(kind)  # without its constructor, whose arguments an exception does not store
        error.args = arguments
        vars(error).update(attributes)
        error.add_note(self.traceback)
        return error


@dataclass(frozen=True, slots=True)
class Message:
    """A message between parent and worker.

    `task` is the message's own number if the parent sends it; if a worker does, the number of the message that it is
    working on (0: none yet).
    """

    content: object
    task: int = 0


@dataclass(frozen=True, slots=True)
class Cancel:
    """Cancels the task of this number; 0 is the work that a worker does before it receives a message."""

    task: int


@dataclass(frozen=True, slots=True)
class Result:
    """What `work` returned on a worker."""

    value: object


Command = Literal["exit"]


class _Pickler(pickle.Pickler):
    """Pickles a CPU tensor as its bytes: PyTorch writes a zip file for each, which takes ten times as long."""

    def reducer_override(self, item: object) -> Any:
        """Return the function that restores `item` and its arguments, or NotImplemented for pickle's default."""
        if type(item) is not torch.Tensor or item.device.type != "cpu" or item.requires_grad:
            return NotImplemented
        return _restore_tensor, (item.reshape(-1).view(torch.uint8).numpy(), item.dtype, tuple(item.shape))


def _restore_tensor(data: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(data).view(dtype).view(shape)


def dumps(item: object) -> memoryview:
    """Pickle `item` with the bytes of its tensors; restore it with `pickle.loads`.

    Multiprocessing passes tensors in shared memory, which is lost if the sender exits before it is read.
    """
    packed = io.BytesIO()
    _Pickler(packed, protocol=pickle.HIGHEST_PROTOCOL).dump(item)
    return packed.getbuffer()


@dataclass(slots=True)
class Mailbox:
    """A worker's two one-way pipes to its parent process. A thread reads; if the parent ends, it ends this process."""

    incoming: "Connection[Any, Any]"
    outgoing: "Connection[Any, Any]"
    messages: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)
    task: int = 0  # the number of the message received last
    cancelled: set[int] = field(default_factory=set)  # numbers of tasks; a cancel may arrive before its task starts
    may_exit: threading.Event = field(default_factory=threading.Event)
    send_lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Start the thread that reads what the parent process sends."""
        threading.Thread(target=self._read, name="wanduet-mailbox", daemon=True).start()

    def receive(self) -> object:
        """Wait for the next message and return its content; its number becomes the current task."""
        message = self.messages.get()
        self.task = message.task
        self.cancelled -= {task for task in self.cancelled if task < message.task}  # they are done
        return message.content

    def send(self, item: object) -> None:
        """Send `item` to the parent process; any thread may call this."""
        data = dumps(item)
        with self.send_lock:
            self.outgoing.send_bytes(data)

    def _read(self) -> None:
        while True:
            try:
                item = pickle.loads(self.incoming.recv_bytes())
            except (EOFError, OSError):
                if self.may_exit.is_set():
                    return
                os._exit(EXIT_ORPHANED)  # not a normal exit: a thread may be blocked in a collective for ever
            if isinstance(item, Message):
                self.messages.put(item)
            elif isinstance(item, Cancel):
                self.cancelled.add(item.task)
            else:
                self.may_exit.set()


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among the `world_size` processes of a group; the default process group is initialised.

    `timeout_s` is the longest time that a collective may take, in seconds; `link` joins the ranks' devices.
    """

    index: int
    world_size: int
    device: torch.device
    timeout_s: float
    mailbox: Mailbox
    link: Link
    stop: CommonStop

    def mesh(self, layout: Layout) -> Mesh:
        """Create the process groups of `layout`; all ranks must call this. Raises ConfigError if their number is not
        the layout's."""
        return Mesh.create(layout, self.timeout_s, self.device)

    def report(self, message: object) -> None:
        """Send a picklable message, with tensors on the CPU, to the parent process."""
        self.mailbox.send(Message(message, self.mailbox.task))

    def receive(self) -> object:
        """Wait for the next message of the parent process and return it."""
        return self.mailbox.receive()

    def cancelled_locally(self) -> bool:
        """Return whether the task of the message received last is cancelled, as far as this rank knows; not a
        collective, so for tasks of one rank only."""
        return self.mailbox.task in self.mailbox.cancelled

    def cancelled(self) -> bool:
        """Return whether the task of the message received last is cancelled; the same on all ranks.

        This is a collective: all ranks must call it together, before each step.
        """
        flag = torch.tensor([self.cancelled_locally()], dtype=torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        self.stop.begin_step(self.index, self.mailbox.task)
        return bool(flag.item())

    def cancelled_in_step(self) -> bool:
        """Return whether to stop before the next block of a step, because the task is cancelled.

        Call it before each block. If all ranks begin the same number of blocks in a step, it returns True before the
        same block on all of them. If the step ends first, `cancelled` returns True after it. It waits for no rank.
        """
        return self.stop.begin_block(self.index, cancelled=self.cancelled_locally())


@dataclass(frozen=True, slots=True)
class Member:
    """What a worker process needs to join its group.

    It is rank `index`, on `devices[index]`; the ranks meet at the URL `rendezvous`. A collective may take `timeout_s`
    seconds. All ranks get the same `stop`.
    """

    index: int
    devices: tuple[str, ...]
    rendezvous: str
    timeout_s: float
    stop: CommonStop


def rank_main(
    member: Member,
    incoming: "Connection[Any, Any]",
    outgoing: "Connection[Any, Any]",
    work: Callable[..., object],
    args: tuple[object, ...],
) -> None:
    """Run a worker process: join the process group, run `work(rank, *args)`, and send the result or the failure.

    `incoming` and `outgoing` are its pipes from and to the parent process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches all processes; the parent handles it
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the same holds for a closed terminal
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    mailbox = Mailbox(incoming, outgoing)
    mailbox.start()
    try:
        _use_loopback()
        all_devices = [torch.device(name) for name in member.devices]
        device = all_devices[member.index]
        if device.type == "cpu":
            ranks_on_cpu = sum(other.type == "cpu" for other in all_devices)
            torch.set_num_threads(max(1, torch.get_num_threads() // ranks_on_cpu))
        elif device.type == "cuda":
            torch.cuda.set_device(device)
        link = link_between(all_devices)
        configure_nccl(link)
        _init_process_group(member, device)
        rank = Rank(member.index, len(all_devices), device, member.timeout_s, mailbox, link, member.stop)
        mailbox.send(Result(work(rank, *args)))
    except BaseException as error:
        mailbox.send(Failure.from_exception(error, mailbox.task))
        sys.stderr.flush()
        os._exit(EXIT_FAILED)  # a normal exit would wait for ranks that are lost
    # Other ranks may still need this rank's connections. Not a barrier: it could time out while another rank works.
    mailbox.may_exit.wait()
    dist.destroy_process_group()


def _init_process_group(member: Member, device: torch.device) -> None:
    nccl = uses_nccl(device)
    # A decode's rows are sent one after the other on purpose.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        init_method=member.rendezvous,
        rank=member.index,
        world_size=len(member.devices),
        timeout=timedelta(seconds=member.timeout_s),
        device_id=device if nccl else None,
    )


def _use_loopback() -> None:
    """Let ranks connect over the loopback interface: it is fast, private, and works without a network."""
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
