"""Groups of worker processes: results, messages, errors, and that no process outlives the group."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from tests.forked import forked_ranks
from wanduet.distributed import launch
from wanduet.distributed.launch import RankFailedError, RankGroup, run_on_ranks
from wanduet.distributed.mesh import Layout
from wanduet.distributed.rank import Rank, dumps
from wanduet.errors import CancelledError, ConfigError, NonFiniteLatentsError

ROOT = Path(__file__).parents[3]
PYTHONPATH = os.pathsep.join((str(ROOT), str(ROOT / "src")))
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # workers import this file by its name from the repository's root


@pytest.fixture
def forked() -> Iterator[None]:
    """For what does not depend on how ranks start."""
    with forked_ranks():
        yield


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] == "Z"


def add_up(rank: Rank, offset: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = offset + rank.index
    dist.all_reduce(total)
    return rank.index, total


def echo(rank: Rank) -> list[object]:
    received = [rank.receive()]
    rank.report(("received", received[0], rank.index))
    received.append(rank.receive())
    return received


def steps_until_cancelled(rank: Rank) -> int:
    step = 0
    while not rank.cancelled():
        step += 1
        rank.report((step, os.getpid()))
        time.sleep(0.01 * (rank.index + 1))
    return step


def world(rank: Rank, *_: object) -> int:
    return dist.get_world_size()


def die(rank: Rank, how: str) -> None:
    rank.report(os.getpid())
    dist.barrier()
    if rank.index == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            os._exit(7)
        if how == "raises":
            raise KeyError("shape")
        if how == "wanduet":
            raise NonFiniteLatentsError(4)
        if how == "hangs":
            os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.zeros(1))
    time.sleep(600)


def sleep(rank: Rank) -> None:
    rank.report(os.getpid())
    time.sleep(600)


def test_results_come_back_in_order() -> None:
    results = run_on_ranks(add_up, ["cpu", "cpu"], torch.tensor([10.0, 20.0]))
    assert [index for index, _ in results] == [0, 1]
    assert all(total.tolist() == [21.0, 41.0] for _, total in results)


@pytest.mark.usefixtures("forked")
def test_messages_go_both_ways() -> None:
    with RankGroup(echo, ["cpu", "cpu"]) as group:
        group.send("all")
        assert sorted(group.receive(60.0) for _ in range(2)) == [
            (0, ("received", "all", 0)),
            (1, ("received", "all", 1)),
        ]
        with pytest.raises(TimeoutError):
            group.receive(0.05)
        group.send("second")
        assert group.results() == [["all", "second"], ["all", "second"]]


@pytest.mark.usefixtures("forked")
def test_cancel_stops_all_ranks_at_the_same_step_and_ranks_ignore_ctrl_c() -> None:
    with RankGroup(steps_until_cancelled, ["cpu", "cpu"]) as group:
        for _, (step, pid) in group.messages():
            if step == 1:
                os.kill(pid, signal.SIGINT)  # a terminal sends it to all processes in the foreground
            if step == 3:
                group.cancel()
        first, second = group.results()
    assert first == second >= 3


def tasks(rank: Rank) -> None:
    while (name := rank.receive()) is not None:
        rank.report((name, rank.cancelled()))


@pytest.mark.usefixtures("forked")
def test_a_cancel_concerns_its_task_only_however_early_or_late_it_comes() -> None:
    with RankGroup(tasks, ["cpu", "cpu"]) as group:
        group.send("before")
        unwanted = group.send("unwanted")
        group.cancel(unwanted)  # long before a rank has started
        group.send("after")
        reports = [group.receive(60.0) for _ in range(6)]
        group.cancel(unwanted)  # it is done
        group.send("last")
        reports += [group.receive(60.0) for _ in range(2)]
        group.send(None)
        group.results()
    expected = [("before", False), ("unwanted", True), ("after", False), ("last", False)]
    for rank in range(2):
        assert [report for index, report in reports if index == rank] == expected


def work_that_fails(rank: Rank) -> None:
    while (name := rank.receive()) is not None:
        rank.report(name)
        while name == "cancelled" and not rank.cancelled_locally():
            time.sleep(0.002)
        if name != "made":
            raise NonFiniteLatentsError(2)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("name", "error"), [("fails", NonFiniteLatentsError), ("cancelled", RankFailedError)], ids=["alone", "cancelled"]
)
def test_an_error_in_work_that_is_cancelled_is_that_of_a_lost_rank_to_the_next(
    name: str, error: type[Exception]
) -> None:
    with RankGroup(work_that_fails, ["cpu"]) as group:
        group.send("made")
        number = group.send(name)
        assert group.receive(60.0, number) == (0, name)
        if name == "cancelled":
            group.cancel(number)
        following = group.send("following")
        with pytest.raises(error, match="step 3"):
            group.receive(60.0, following)


@pytest.mark.usefixtures("forked")
def test_receive_drops_messages_about_another_task() -> None:
    with RankGroup(tasks, ["cpu"]) as group:
        group.send("first")
        second = group.send("second")
        assert group.receive(60.0, second) == (0, ("second", False))
        with pytest.raises(TimeoutError):
            group.receive(0.05, second)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("killed", r"Rank 1 \(cpu\) died: killed by SIGKILL"),
        ("exits", r"Rank 1 \(cpu\) died: exit status 7"),
        ("raises", r"Rank 1 \(cpu\) failed: KeyError: 'shape'"),
    ],
)
def test_a_rank_that_dies_takes_the_group_down_and_is_named(how: str, message: str) -> None:
    with RankGroup(die, ["cpu", "cpu"], how) as group:
        first = group.receive()
        started = time.monotonic()
        second = group.receive()
        with pytest.raises(RankFailedError, match=message) as caught:
            group.results()
    assert time.monotonic() - started < launch.COLLECTIVE_TIMEOUT / 2, "long before a collective gives up"
    assert caught.value.rank == 1
    assert ("in die" in caught.value.details) == (how == "raises")
    assert first is not None
    assert second is not None
    assert all(gone(pid) for _, pid in (first, second))


@pytest.mark.usefixtures("forked")
def test_a_rank_that_hangs_is_named_after_the_timeout() -> None:
    with (
        RankGroup(die, ["cpu", "cpu"], "hangs", timeout_s=6.0) as group,
        pytest.raises(RankFailedError, match=r"Rank 1 \(cpu\) did not answer") as caught,
    ):
        group.results()
    assert caught.value.rank == 1


def hang_in_an_axis(rank: Rank) -> None:
    mesh = rank.mesh(Layout(cfg=2, ulysses=2))
    dist.barrier()
    if rank.index == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank.index == 2:
        dist.all_reduce(torch.zeros(1), group=mesh.ulysses)
    time.sleep(600)


@pytest.mark.usefixtures("forked")
def test_the_timeout_holds_for_every_axis() -> None:
    with RankGroup(hang_in_an_axis, ["cpu"] * 4, timeout_s=8.0) as group, pytest.raises(RankFailedError) as caught:
        group.receive(120.0)
    assert "Rank 2 (cpu) failed" in caught.value.message
    assert "Rank 3 (cpu)" in str(caught.value.hint)


@pytest.mark.usefixtures("forked")
def test_a_wanduet_error_is_raised_as_it_was() -> None:
    with pytest.raises(NonFiniteLatentsError, match="step 5") as caught:
        run_on_ranks(die, ["cpu", "cpu"], "wanduet")
    assert caught.value.step == 4


@pytest.mark.usefixtures("forked")
def test_leaving_by_an_exception_ends_every_process() -> None:
    pids: list[int] = []

    def leave_early() -> None:
        with RankGroup(sleep, ["cpu", "cpu"]) as group:
            for _, pid in group.messages():
                pids.append(pid)
                if len(pids) == 2:
                    raise CancelledError("enough")

    with pytest.raises(CancelledError):
        leave_early()
    assert len(pids) == 2
    assert all(gone(pid) for pid in pids)


INTERRUPTED = """
import os, signal
import torch
from tests.unit.distributed.test_launch import add_up
from wanduet.distributed.launch import RankGroup
if __name__ == "__main__":
    for _ in range(2):  # the first group of a process starts differently
        with RankGroup(add_up, ["cpu", "cpu"], torch.tensor(0.0)) as group:
            for process in group._processes:  # long before their imports are done
                os.kill(process.pid, signal.SIGINT)
            print([result[0] for result in group.results()], flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot start a process with SIGINT blocked")
def test_ranks_ignore_ctrl_c_while_they_start(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(INTERRUPTED)
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["[0, 1]"] * 2
    assert "Traceback" not in done.stderr


class RaisesSigintWhenUnpickled:
    """Raises SIGINT in the process that unpickles it."""

    def __reduce__(self) -> Any:
        return signal.raise_signal, (signal.SIGINT,)


def test_ranks_ignore_ctrl_c_during_their_imports_where_signals_cannot_be_blocked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on Windows: before `rank_main` runs, its arguments are unpickled, which imports modules."""
    monkeypatch.setattr(launch, "_sigint_blocked", nullcontext)
    assert run_on_ranks(world, ["cpu"], RaisesSigintWhenUnpickled()) == [1]


def test_no_devices_are_refused() -> None:
    with pytest.raises(ConfigError):
        run_on_ranks(sleep, [])


SCRIPT = """
from tests.unit.distributed.test_launch import sleep
from wanduet.distributed.launch import RankGroup
if __name__ == "__main__":
    with RankGroup(sleep, ["cpu", "cpu"]) as group:
        for _, pid in group.messages():
            print(pid, flush=True)
"""


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),  # which a script of this kind cannot tell from SIGKILL
        signal.SIGINT,
    ],
)
def test_no_rank_outlives_a_killed_parent(tmp_path: Path, how: signal.Signals) -> None:
    script = tmp_path / "parent.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(how)
        parent.wait(60)
    deadline = time.monotonic() + 60
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "sent",
    [
        torch.randn(3, 4),
        torch.randn(3, 4).t(),
        torch.randn(5, 3)[1:3],
        torch.randn(2, 3).to(torch.bfloat16),
        torch.tensor(7),
        torch.tensor([True, False]),
        torch.empty(0, 4),
        torch.nn.Parameter(torch.randn(2)),
    ],
    ids=["plain", "transposed", "part", "bfloat16", "scalar", "bool", "empty", "parameter"],
)
def test_tensors_arrive_as_they_were_sent(sent: torch.Tensor) -> None:
    got = pickle.loads(dumps({"x": sent}))["x"]
    assert type(got) is type(sent)
    assert (got.dtype, got.shape, got.requires_grad) == (sent.dtype, sent.shape, sent.requires_grad)
    assert torch.equal(got, sent)
    got.detach().zero_()  # the receiver owns writable memory


def test_ranks_do_not_execute_what_lies_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, mark = tmp_path / "folder", tmp_path / "executed"
    folder.mkdir()
    for name in ("pickle", "json", "torch", "structlog", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write({name!r})\nraise SystemExit(9)\n")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert run_on_ranks(world, ["cpu"]) == [1]
    assert not mark.exists()
    assert "PYTHONSAFEPATH" not in os.environ, "the environment of the program must not change"
