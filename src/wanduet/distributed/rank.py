"""One worker process of a group: how it joins the others, and how it talks with the process that started it."""

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

from wanduet.distributed.collectives import goes_directly
from wanduet.distributed.links import Link, keep_nccl_to, link_between
from wanduet.distributed.mesh import Layout, Mesh
from wanduet.errors import WanduetError

# Exit status of a worker whose starter is gone (nobody is left to read it) and of one that reported an error.
ABANDONED, FAILED = 3, 1


@dataclass(frozen=True, slots=True)
class Failure:
    """What a worker says of an exception that ended it.

    `echo`: only the loss of another rank was noticed. `error`: class, arguments and attributes of a
    WanduetError, which is raised again in the starter; None for any other exception.
    """

    summary: str
    traceback: str
    echo: bool
    when: float
    error: tuple[type[WanduetError], tuple[Any, ...], dict[str, Any]] | None

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Describe an exception."""
        return cls(
            f"{type(error).__name__}: {error}",
            "".join(traceback.format_exception(error)),
            isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()),
            time.time(),
            (type(error), error.args, dict(vars(error))) if isinstance(error, WanduetError) else None,
        )

    def raised_again(self) -> WanduetError:
        """The worker's WanduetError, its traceback as a note. Raises ValueError if it was none."""
        if self.error is None:
            raise ValueError(f"{self.summary} is no WanduetError.")
        kind, arguments, attributes = self.error
        error = kind.__new__(kind)  # not by its constructor, whose arguments an exception does not keep
        error.args = arguments
        vars(error).update(attributes)
        error.add_note(self.traceback)
        return error


@dataclass(frozen=True, slots=True)
class Message:
    """Something for the other side. `task` is its number, where the starter sends it; the number of the task that it is
    about, where a worker does (0: of none)."""

    content: object
    task: int = 0


@dataclass(frozen=True, slots=True)
class Cancel:
    """The task of that number is not wanted any more; 0: what a worker does without having been sent anything."""

    task: int


@dataclass(frozen=True, slots=True)
class Result:
    """What a worker's work returned."""

    value: object


Command = Literal["leave"]


class _Pickler(pickle.Pickler):
    """Writes a tensor of the host as its bytes: PyTorch makes a zip file of each, which takes ten times as long."""

    def reducer_override(self, item: object) -> Any:
        """A way to restore it, or NotImplemented for pickle's own."""
        if type(item) is not torch.Tensor or item.device.type != "cpu" or item.requires_grad:
            return NotImplemented
        return _tensor, (item.reshape(-1).view(torch.uint8).numpy(), item.dtype, tuple(item.shape))


def _tensor(data: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(data).view(dtype).view(shape)


def pack(item: object) -> memoryview:
    """Bytes that outlive their sender: multiprocessing's own way to send a tensor passes shared memory, which
    is lost if the sender ends before it is read."""
    packed = io.BytesIO()
    _Pickler(packed, protocol=pickle.HIGHEST_PROTOCOL).dump(item)
    return packed.getbuffer()


@dataclass(slots=True)
class Mailbox:
    """A worker's two one-way pipes to its starter. A thread reads; when the starter is gone, it ends the process."""

    incoming: "Connection[Any, Any]"
    outgoing: "Connection[Any, Any]"
    messages: queue.SimpleQueue[Message] = field(default_factory=queue.SimpleQueue)
    task: int = 0  # the number of the message that was received last
    cancelled: set[int] = field(default_factory=set)  # by number: it may come before its task is begun
    may_leave: threading.Event = field(default_factory=threading.Event)
    sending: threading.Lock = field(default_factory=threading.Lock)

    def listen(self) -> None:
        """Start to read what the starter sends."""
        threading.Thread(target=self._read, name="wanduet-mailbox", daemon=True).start()

    def receive(self) -> object:
        """Wait for the next message: its task is the current one from now on."""
        message = self.messages.get()
        self.task = message.task
        self.cancelled -= {task for task in self.cancelled if task < message.task}  # they are over
        return message.content

    def send(self, item: object) -> None:
        """Send to the starter; from any thread."""
        data = pack(item)
        with self.sending:
            self.outgoing.send_bytes(data)

    def _read(self) -> None:
        while True:
            try:
                item = pickle.loads(self.incoming.recv_bytes())
            except (EOFError, OSError):
                if self.may_leave.is_set():
                    return
                os._exit(ABANDONED)  # a collective may never return: nothing gentler ends this process surely
            if isinstance(item, Message):
                self.messages.put(item)
            elif isinstance(item, Cancel):
                self.cancelled.add(item.task)
            else:
                self.may_leave.set()


@dataclass(frozen=True, slots=True)
class Rank:
    """One of `world_size` processes with a device each; the default process group is initialised.

    `timeout_s` is how long a collective may take; `link` is what joins the ranks' devices.
    """

    index: int
    world_size: int
    device: torch.device
    timeout_s: float
    mailbox: Mailbox | None = None
    link: Link = "direct"

    def mesh(self, layout: Layout) -> Mesh:
        """The ranks in a layout; all must ask. Raises ConfigError if their number is not the layout's."""
        return Mesh.create(layout, self.timeout_s, self.device)

    def report(self, message: object) -> None:
        """Send something picklable to the starter (tensors on the CPU); nobody hears it under torchrun."""
        if self.mailbox is not None:
            self.mailbox.send(Message(message, self.mailbox.task))

    def receive(self) -> object:
        """Wait for the next message of the starter. Raises RuntimeError under torchrun, where there is none."""
        if self.mailbox is None:
            raise RuntimeError("This process was not started by wanduet: nobody sends it messages.")
        return self.mailbox.receive()

    def cancelled(self) -> bool:
        """Whether the message received last was cancelled, the same answer on every rank: all must ask together, once
        a step."""
        mailbox = self.mailbox
        asked = torch.tensor([mailbox is not None and mailbox.task in mailbox.cancelled], dtype=torch.int32)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        return bool(asked.item())


def join_torchrun(timeout_s: float) -> Rank | None:
    """Join the group that torchrun started this process in, one GPU a process where there are any; None
    outside torchrun. `timeout_s` is how long a collective may take."""
    if not dist.is_torchelastic_launched():
        return None
    index, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    link = link_between([torch.device(device.type, other) for other in range(int(os.environ["LOCAL_WORLD_SIZE"]))])
    keep_nccl_to(link)
    _join(index, size, device, "env://", timeout_s)
    return Rank(index, size, device, timeout_s, link=link)


def serve(
    index: int,
    devices: tuple[str, ...],
    rendezvous: str,
    timeout_s: float,
    incoming: "Connection[Any, Any]",
    outgoing: "Connection[Any, Any]",
    work: Callable[..., object],
    args: tuple[object, ...],
) -> None:
    """What a worker process runs: join the group, do `work(rank, *args)`, report how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches everyone; the starter decides
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # so does its end
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    mailbox = Mailbox(incoming, outgoing)
    mailbox.listen()
    try:
        _stay_on_this_machine()
        all_devices = [torch.device(name) for name in devices]
        device = all_devices[index]
        if device.type == "cpu":
            ranks_on_cpu = sum(other.type == "cpu" for other in all_devices)
            torch.set_num_threads(max(1, torch.get_num_threads() // ranks_on_cpu))
        elif device.type == "cuda":
            torch.cuda.set_device(device)
        link = link_between(all_devices)
        keep_nccl_to(link)
        _join(index, len(devices), device, rendezvous, timeout_s)
        mailbox.send(Result(work(Rank(index, len(devices), device, timeout_s, mailbox, link), *args)))
    except BaseException as error:
        mailbox.send(Failure.of(error))
        sys.stderr.flush()
        os._exit(FAILED)  # leaving in order would wait for ranks that will not come
    # A rank that leaves takes its connections along, which others may still need; not a barrier, because
    # that would time out where one rank works on alone.
    mailbox.may_leave.wait()
    dist.destroy_process_group()


def _join(index: int, size: int, device: torch.device, rendezvous: str, timeout_s: float) -> None:
    nccl = goes_directly(device)
    # A decode's rows are meant to travel one after another.
    os.environ.setdefault("TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING", "false")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        init_method=rendezvous,
        rank=index,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if nccl else None,
    )


def _stay_on_this_machine() -> None:
    """Let ranks meet over the loopback: quick, unseen by the network, and there without one."""
    loopback = {"linux": "lo", "darwin": "lo0"}.get(sys.platform)
    if loopback is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
