"""Stages on nodes of their own: an encoder and a decoder are killed at work, and no job is any worse for it.

One card denoises, one decodes, one node without a GPU encodes; all of them only declared.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from fleet import SMALL, Fleet, Local, fleet, kill_worker, pid_of, wait

pytestmark = [pytest.mark.skipif(os.name != "posix", reason="POSIX signals"), pytest.mark.timeout(900)]

NODES = {"card": "1x24GiB", "old": "1x24GiB decode", "cpu": " encode"}
LONG_DECODE = {**SMALL, "size": "96x96", "num_frames": "17"}  # seconds, after a moment's denoise
PROMPTS = [f"a {colour} circle moving left on a black background" for colour in ("red", "green", "blue", "white")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    flags = ("--parallel", "1", "--stages", "apart", "--checkpoint-seconds", "0.2")
    with fleet(tmp_path_factory.mktemp("data"), NODES, *flags) as found:
        yield found


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    local = Local(tmp_path_factory.mktemp("local"))
    yield local
    local.close()


def member(cluster: Fleet, shape: str) -> str | None:
    """The worker's name of the replica, the decoder or the encoder."""
    return next((one["worker"] for one in cluster.replicas() if one["shape"] == shape), None)


def embeddings(cluster: Fleet) -> int:
    return len(list((cluster.folder / "embeddings").glob("*.safetensors")))


@contextmanager
def stopped(worker: str) -> Iterator[None]:
    os.kill(pid_of(worker), signal.SIGSTOP)
    yield
    with suppress(ProcessLookupError):  # it may have been killed
        os.kill(pid_of(worker), signal.SIGCONT)


@pytest.mark.slow
def test_an_encoder_and_a_decoder_that_die_at_work_cost_a_decode(cluster: Fleet, local: Local) -> None:
    ids = [cluster.server.create(PROMPTS[0], seed="1", **SMALL)["id"]]  # with work there, all three are started
    replica, decoder, encoder = (
        wait(f"there is {shape}", lambda shape=shape: member(cluster, shape))
        for shape in ("1x24GiB", "1x24GiB decode", "cpu encode")
    )
    wait("the first job is finished", lambda: cluster.finished(ids))

    known = embeddings(cluster)
    with stopped(replica):
        ids.append(cluster.server.create(PROMPTS[1], seed="2", **SMALL)["id"])
        wait("its text is encoded ahead", lambda: embeddings(cluster) > known)

    long = cluster.server.create(PROMPTS[2], seed="3", **LONG_DECODE)["id"]
    at_work = wait("its decode is under way", lambda: cluster.running(long, 90.5))
    with stopped(at_work):  # in the middle of it, and so it stays
        assert at_work == decoder
        kill_worker(encoder)
        ids += [long, cluster.server.create(PROMPTS[3], seed="4", **SMALL)["id"]]
        kill_worker(decoder)
    jobs = cluster.check(ids, local)
    assert (jobs[2].attempts, jobs[2].crashes) == (3, 1)  # denoised, half decoded, decoded
    assert jobs[2].report["worker"] == replica
    assert jobs[2].report["timings"]["denoise_s"] > 0  # the first attempt's: it was not done again
    assert embeddings(cluster) == len(PROMPTS)


@pytest.mark.slow  # the cluster takes as long to start as for a test that shows more
def test_the_verdict_is_told(cluster: Fleet) -> None:
    told: dict[str, Any] = wait("the controller has looked once", cluster.store.stages)
    assert told["apart"] is True
    assert set(told["nodes"].values()) <= {"decode", "encode"}  # all nodes here have this machine's name
    assert "as labelled" in told["reason"]
