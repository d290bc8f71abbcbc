"""What joins the GPUs of ranks, and what NCCL is told of it. The GPUs are stand-ins: ranks with gloo on the CPU."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from wanduet.distributed import launch
from wanduet.distributed.launch import run_on_ranks
from wanduet.distributed.links import attention_bytes, keep_nccl_to, link_between
from wanduet.distributed.mesh import Layout
from wanduet.distributed.rank import Rank, serve

ROOT = Path(__file__).parents[3]
GPUS = ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("devices", "reach", "nccl", "link"),
    [
        (GPUS, True, True, "direct"),
        (GPUS, False, True, "host"),
        (GPUS, True, False, "gloo"),
        (("cuda:0", "cpu"), True, True, "gloo"),
        (("cuda:1",), False, True, "direct"),
        (("cpu", "cpu"), False, False, "direct"),
    ],
)
def test_links(monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], reach: bool, nccl: bool, link: str) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: reach and one != other)
    assert link_between([torch.device(name) for name in devices]) == link


def test_two_gpus_that_share_a_sequence_send_6_gigabytes_a_guided_step() -> None:
    a_step = 2 * 30 * attention_bytes(Layout(ulysses=2), 32760, 1536, 2)
    assert a_step == pytest.approx(6.04e9, rel=0.001)
    assert attention_bytes(Layout(cfg=2), 32760, 1536, 2) == 0
    assert attention_bytes(Layout(ring=2), 100, 10, 2) == 2 * 50 * 10 * 2  # keys and values of its half


def serve_with(reach: bool) -> Callable[..., None]:
    """`serve` where GPUs reach each other, or do not."""
    begin = dist.init_process_group

    def begin_with_gloo(backend: str, **settings: object) -> None:
        # NCCL reads it once, when its first group begins.
        os.environ["SEEN_BY_NCCL"] = os.environ.get("NCCL_P2P_DISABLE", "unset") if "nccl" in backend else "no NCCL"
        begin("gloo", **{**settings, "device_id": None})

    def serve_here(*arguments: object) -> None:
        dist.is_nccl_available = lambda: True
        dist.init_process_group = begin_with_gloo
        torch.cuda.set_device = lambda device: None
        torch.cuda.can_device_access_peer = lambda one, other: reach
        serve(*arguments)

    return serve_here


def serve_good(*arguments: object) -> None:
    serve_with(True)(*arguments)


def serve_apart(*arguments: object) -> None:
    serve_with(False)(*arguments)


def seen(rank: Rank) -> tuple[str, str, int]:
    total = torch.tensor(rank.index + 1)
    dist.all_reduce(total)
    return rank.link, os.environ["SEEN_BY_NCCL"], int(total)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize(
    ("serve_so", "expected"),
    [
        (serve_good, ("direct", "unset", 3)),
        (serve_apart, ("host", "1", 3)),
    ],
)
def test_nccl_goes_through_the_host_where_gpus_do_not_reach_each_other(
    monkeypatch: pytest.MonkeyPatch, serve_so: Callable[..., None], expected: tuple[str, str, int]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # workers import this file by its name from the repository's root
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.setattr(launch, "serve", serve_so)
    assert run_on_ranks(seen, GPUS, timeout_s=30.0) == [expected, expected]


def test_what_somebody_chose_for_nccl_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    keep_nccl_to("host")
    assert os.environ["NCCL_P2P_DISABLE"] == "0"
