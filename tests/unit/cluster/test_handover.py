"""Decodes that are left to decoders: when they are, who takes them, and that none is stuck however a decoder ends."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "jobs"))

from fake_engine import FakeEngine, journal, postgres_url

from wanduet.cluster.fit import Fit
from wanduet.cluster.handover import Handover, TakeBack, leaves_decode, ready_decoders
from wanduet.cluster.scheduler import Waiting
from wanduet.cluster.store import ClusterStore
from wanduet.config import EngineConfig
from wanduet.jobs.attempt import AttemptSettings
from wanduet.jobs.files import JobFiles
from wanduet.jobs.records import DECODE, JobError, NewJob, StaleLeaseError, StoredJob, demand_of
from wanduet.jobs.runner import Runner, RunnerSettings

REQUEST = {"prompt": "a cat", "num_inference_steps": 3, "seed": 7}
DEMAND = demand_of(REQUEST)
DECODER = {"id": "d", "node": "n", "shape": "1x8GiB decode", "state": "ready", "worker": "d", "jobs": 0}


def whole(demand: str) -> Fit:
    return Fit(True, 10.0)


def decodes(demand: str) -> Fit:
    return Fit(demand.startswith(DECODE), 2.0)


def job(**values: object) -> StoredJob:
    return StoredJob(**{"id": "x", "owner": "ann", "model": "m", "request": REQUEST, "status": "in_progress", **values})


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., ClusterStore]]:
    opened: list[ClusterStore] = []

    def open_one(**options: object) -> ClusterStore:
        opened.append(ClusterStore(JobFiles(tmp_path), postgres_url(tmp_path), **options))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


def replica(open_store, **options: object) -> ClusterStore:
    return open_store(**{"fit_of": whole, "handover": Handover(lambda shape, demand: True), **options})


def run(store: ClusterStore, until: Callable[[], object], **attempt: object) -> None:
    settings = RunnerSettings(
        lease_seconds=5.0, attempt=AttemptSettings(poll_seconds=0.02, progress_seconds=0.02, **attempt)
    )
    runner = Runner(store, FakeEngine(EngineConfig(data_dir=store.files.folder)), settings, hooks=FakeEngine.hooks)
    thread = threading.Thread(target=runner.run)
    thread.start()
    end = time.monotonic() + 120
    while not until() and time.monotonic() < end:
        time.sleep(0.01)
    runner.drain()
    thread.join()
    assert until()


def test_a_decode_is_left_only_to_decoders_that_are_there_free_and_large_enough() -> None:
    shapes = ["1x8GiB decode"]
    assert leaves_decode(job(attempts=1), shapes, 0, lambda shape: True)
    assert not leaves_decode(job(attempts=1), [], 0, lambda shape: True)
    assert not leaves_decode(job(attempts=1), shapes, 1, lambda shape: True)
    assert leaves_decode(job(attempts=1), shapes * 2, 1, lambda shape: True)
    assert not leaves_decode(job(attempts=1), shapes, 0, lambda shape: False)
    assert leaves_decode(job(attempts=1), ["1x1GiB decode", *shapes], 0, lambda shape: "8GiB" in shape)


def test_what_crashed_or_went_back_and_forth_is_decoded_where_it_is_denoised() -> None:
    assert not leaves_decode(job(attempts=1, crashes=1), ["1x8GiB decode"], 0, lambda shape: True)
    assert not leaves_decode(job(attempts=3), ["1x8GiB decode"], 0, lambda shape: True)


def test_only_ready_decoders_count() -> None:
    others = [DECODER | {"state": "starting"}, DECODER | {"shape": "1x8GiB"}, DECODER | {"shape": "cpu encode"}]
    assert ready_decoders([DECODER, *others]) == ["1x8GiB decode"]


def test_a_replica_takes_back_what_waits_at_the_head_for_too_long_and_at_once_without_decoders() -> None:
    now = [0.0]
    take_back = TakeBack(30.0, lambda: now[0])
    plain = Waiting("ann", DEMAND, 0, "a", 0.0)
    left = Waiting("ann", DECODE + DEMAND, 0, "b", 0.0)
    assert take_back([plain, left], lambda: ["d"]) == [plain]
    assert take_back([plain, left], list) == [plain, left]
    now[0] = 29.0
    assert take_back([plain, left], lambda: ["d"]) == [plain]
    now[0] = 31.0
    assert take_back([plain, left], lambda: ["d"]) == [plain, left]
    after = Waiting("ann", DECODE + DEMAND, 0, "c", 0.0)  # a decoder took the first: it lives
    assert take_back([plain, after], lambda: ["d"]) == [plain]


def test_a_job_passes_from_replica_to_decoder_and_completes_once(open_store) -> None:
    store = replica(open_store)
    store.publish([DECODER])
    job_id = store.submit(NewJob("ann", "m", REQUEST)).job.id
    run(store, lambda: [one.demand for one in store.waiting()] == [DECODE + DEMAND])
    assert (store.get(job_id).status, store.get(job_id).phase) == ("queued", "")
    decoder = open_store(fit_of=decodes)
    run(decoder, lambda: store.get(job_id).finished, gives_back=True)
    found = store.get(job_id)
    assert (found.status, found.attempts, found.crashes) == ("completed", 2, 0)
    assert journal(store.files.folder)[-2:] == [f"{job_id} left", f"{job_id} done"]
    assert len([line for line in journal(store.files.folder) if "step" in line]) == 3  # none was done again
    assert store.statistics().stages["queue_s"][1] == 1


def test_without_a_decoder_a_replica_does_all_of_it(open_store) -> None:
    store = replica(open_store)
    job_id = store.submit(NewJob("ann", "m", REQUEST)).job.id
    run(store, lambda: store.get(job_id).finished)
    assert (store.get(job_id).status, store.get(job_id).attempts) == ("completed", 1)


def left_job(store: ClusterStore) -> str:
    job_id = store.submit(NewJob("ann", "m", REQUEST)).job.id
    store.release(store.claim("replica", 30.0), DECODE + DEMAND)
    return job_id


def test_a_decoder_takes_decodes_only(open_store) -> None:
    store = replica(open_store)
    left = left_job(store)
    store.submit(NewJob("ann", "m", REQUEST))
    decoder = open_store(fit_of=decodes)
    assert decoder.claim("d", 30.0).job.id == left
    assert decoder.claim("d", 30.0) is None


def test_what_a_decoder_died_on_is_a_whole_job_again_and_its_late_commit_is_refused(open_store) -> None:
    store = replica(open_store)
    store.publish([DECODER])
    job_id = left_job(store)
    assert store.claim("replica", 30.0) is None  # the decoder's
    lease = open_store(fit_of=decodes).claim("d", 30.0)
    store.recover(store.pulses()[0], 3)
    assert [one.demand for one in store.waiting()] == [DEMAND]
    again = store.claim("replica", 30.0)
    assert (again.job.id, again.job.crashes) == (job_id, 1)
    assert not store.has_decoder(again.job)
    with pytest.raises(StaleLeaseError):
        store.complete(lease, [])
    assert store.complete(again, []).status == "completed"


def test_what_fails_on_a_decoder_goes_back_whole_and_unblamed(open_store) -> None:
    store = replica(open_store)
    job_id = store.submit(NewJob("ann", "m", {**REQUEST, "prompt": "oom 1"})).job.id
    store.release(store.claim("replica", 30.0), DECODE + DEMAND)
    decoder = open_store(fit_of=decodes)
    run(decoder, lambda: [one.demand for one in store.waiting()] == [DEMAND], gives_back=True)
    assert (store.get(job_id).status, store.get(job_id).crashes) == ("queued", 0)
    run(replica(open_store), lambda: store.get(job_id).finished)  # a replica's word is the last
    assert store.get(job_id).error.code == "out_of_memory"


def test_a_decoder_that_drains_leaves_the_decode_to_the_next(open_store) -> None:
    store = replica(open_store)
    left_job(store)
    decoder = open_store(fit_of=decodes)
    decoder.release(decoder.claim("d", 30.0))
    assert [one.demand for one in store.waiting()] == [DECODE + DEMAND]
    decoder.retry(decoder.claim("d", 30.0), JobError("x", "x"), 3)
    assert [one.demand for one in store.waiting()] == [DEMAND]


def test_latents_that_others_cannot_find_are_decoded_here(open_store, monkeypatch: pytest.MonkeyPatch) -> None:
    store = replica(open_store)
    store.publish([DECODER])
    monkeypatch.setattr(store.files, "keep", lambda job_id: False)
    job_id = store.submit(NewJob("ann", "m", REQUEST)).job.id
    run(store, lambda: store.get(job_id).finished)
    assert (store.get(job_id).status, store.get(job_id).attempts) == ("completed", 1)
