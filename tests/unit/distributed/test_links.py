"""The link between the GPUs of ranks, and the NCCL setting for it. No GPUs are used: ranks run with gloo on the CPU."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from tests.forked import forked_ranks
from wanduet.distributed import launch
from wanduet.distributed.launch import run_on_ranks
from wanduet.distributed.links import attention_comm_bytes, configure_nccl, link_between
from wanduet.distributed.mesh import Layout
from wanduet.distributed.rank import Rank, rank_main

ROOT = Path(__file__).parents[3]
GPUS = ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("devices", "peer_access", "nccl", "link"),
    [
        (GPUS, True, True, "direct"),
        (GPUS, False, True, "host"),
        (GPUS, True, False, "gloo"),
        (("cuda:0", "cpu"), True, True, "gloo"),
        (("cuda:1",), False, True, "direct"),
        (("cpu", "cpu"), False, False, "direct"),
    ],
)
def test_links(
    monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...], peer_access: bool, nccl: bool, link: str
) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: nccl)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: peer_access and one != other)
    assert link_between([torch.device(name) for name in devices]) == link


def test_two_gpus_that_share_a_sequence_send_6_gigabytes_a_guided_step() -> None:
    a_step = 2 * 30 * attention_comm_bytes(Layout(ulysses=2), 32760, 1536, 2)
    assert a_step == pytest.approx(6.04e9, rel=0.001)
    assert attention_comm_bytes(Layout(cfg=2), 32760, 1536, 2) == 0
    assert attention_comm_bytes(Layout(ring=2), 100, 10, 2) == 2 * 50 * 10 * 2  # keys and values of its half


def rank_main_with(peer_access: bool) -> Callable[..., None]:
    """`rank_main` on a machine whose GPUs have peer access to each other, or have not."""
    initialise = dist.init_process_group

    def initialise_gloo(backend: str, **settings: object) -> None:
        # NCCL reads the variable once, when its first group is created.
        os.environ["SEEN_BY_NCCL"] = os.environ.get("NCCL_P2P_DISABLE", "unset") if "nccl" in backend else "no NCCL"
        initialise("gloo", **{**settings, "device_id": None})

    def patched_rank_main(*arguments: object) -> None:
        dist.is_nccl_available = lambda: True
        dist.init_process_group = initialise_gloo
        torch.cuda.set_device = lambda device: None
        torch.cuda.can_device_access_peer = lambda one, other: peer_access
        rank_main(*arguments)

    return patched_rank_main


def with_peer_access(*arguments: object) -> None:
    rank_main_with(True)(*arguments)


def without_peer_access(*arguments: object) -> None:
    rank_main_with(False)(*arguments)


def link_and_setting(rank: Rank) -> tuple[str, str, int]:
    total = torch.tensor(rank.index + 1)
    dist.all_reduce(total)
    return rank.link, os.environ["SEEN_BY_NCCL"], int(total)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize(
    ("main", "expected"),
    [
        (with_peer_access, ("direct", "unset", 3)),
        (without_peer_access, ("host", "1", 3)),
    ],
)
def test_nccl_uses_the_host_where_gpus_have_no_peer_access(
    monkeypatch: pytest.MonkeyPatch, main: Callable[..., None], expected: tuple[str, str, int]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # workers import this file by its name from the repository's root
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.setattr(launch, "rank_main", main)
    with forked_ranks():
        assert run_on_ranks(link_and_setting, GPUS, timeout_s=30.0) == [expected, expected]


def test_a_setting_of_nccl_by_the_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    configure_nccl("host")
    assert os.environ["NCCL_P2P_DISABLE"] == "0"
