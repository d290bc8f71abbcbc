"""A job runs on the model that it was accepted for, or fails with a reason; it never keeps others from running."""

from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa
from fake_engine import FakeEngine, open_store
from test_runner import QUICK, finished, running, wait

from wanduet.jobs.files import JobFiles
from wanduet.jobs.model_watch import ModelWatch
from wanduet.jobs.records import ModelId, NewJob
from wanduet.jobs.store import JobStore

OURS, THEIRS, RETRAINED = ModelId("ours", "1" * 64), ModelId("theirs", "2" * 64), ModelId("ours", "3" * 64)
REQUEST = {"prompt": "x", "num_inference_steps": 2, "seed": 7}


def submit(store: JobStore, model: ModelId) -> str:
    return store.submit(NewJob("ann", model.name, REQUEST, model_hash=model.hash)).job.id


def hooks(model: ModelId) -> dict[str, object]:
    return {"hooks": replace(FakeEngine.hooks, model_of=lambda engine: model)}


@pytest.mark.parametrize(
    ("wanted", "served", "taken"),
    [
        (OURS, OURS, True),
        (ModelId("./ours", OURS.hash), OURS, True),  # the same weights by another path
        (ModelId("ours"), OURS, True),  # stored before hashes were
        (OURS, ModelId("ours"), True),
        (THEIRS, OURS, False),
        (RETRAINED, OURS, False),
        (ModelId("theirs"), OURS, False),
        (THEIRS, None, True),
    ],
)
def test_a_job_is_claimed_for_its_own_model_only(
    store: JobStore, wanted: ModelId, served: ModelId | None, taken: bool
) -> None:
    submit(store, wanted)
    assert (store.claim("w", 30.0, model=served) is not None) == taken
    assert (served is not None and bool(store.other_models(served))) == (not taken)


@pytest.mark.parametrize("wanted", [THEIRS, RETRAINED, ModelId("theirs")])
def test_what_nobody_has_fails_with_a_reason_and_blocks_nothing(store: JobStore, wanted: ModelId) -> None:
    strange, ours = submit(store, wanted), submit(store, OURS)
    with running(store, replace(QUICK, model_seconds=0.0), **hooks(OURS)) as engine:
        assert finished(store, ours).status == "completed"
        job = finished(store, strange)
        assert len(engine.jobs) == 1
    assert job.error is not None
    assert (job.status, job.error.code, job.attempts) == ("failed", "model_changed", 0)
    assert wanted.name in job.error.message
    assert "Submit it anew" in job.error.message


class Bench:
    def __init__(self, store: JobStore) -> None:
        self.now = 1000.0
        self.watch = ModelWatch(store, 60.0, lambda: self.now)

    def after(self, seconds: int) -> int:
        refused = 0
        for _ in range(seconds):
            self.now += 1.0
            refused += self.watch.look(OURS)
        return refused


def test_a_model_that_is_back_in_time_finds_its_jobs(store: JobStore) -> None:
    job_id, bench = submit(store, THEIRS), Bench(store)
    assert bench.after(55) == 0
    assert store.claim("w", 30.0, model=THEIRS) is not None
    assert bench.after(200) == 0
    assert store.get(job_id).status == "in_progress"


def test_jobs_of_a_model_that_is_at_work_wait_however_long(store: JobStore) -> None:
    """Two servers with two models over one queue."""
    bench = Bench(store)
    submit(store, THEIRS)
    lease = store.claim("w", 30.0, model=THEIRS)
    waiting = submit(store, THEIRS)
    assert bench.after(1000) == 0
    store.complete(lease, [])
    assert bench.after(50) == 0
    assert bench.after(20) == 1
    assert store.get(waiting).error.code == "model_changed"


def test_a_watcher_that_was_away_has_seen_nothing(store: JobStore) -> None:
    submit(store, THEIRS)
    bench = Bench(store)
    for _ in range(30):
        bench.now += 3600.0
        assert bench.watch.look(OURS) == 0


def test_a_queue_from_before_goes_on_by_name(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    known, other = submit(store, ModelId("ours")), submit(store, ModelId("theirs"))
    if store.database.dialect.name == "sqlite":
        with store.database.begin() as connection:
            connection.execute(sa.text("ALTER TABLE jobs DROP COLUMN model_hash"))
            connection.execute(sa.text("UPDATE state SET version = 2"))
    store.close()
    store = JobStore(JobFiles(tmp_path), None) if store.database.dialect.name == "sqlite" else open_store(tmp_path)
    with running(store, replace(QUICK, model_seconds=0.0), **hooks(OURS)):
        assert finished(store, known).status == "completed"
        assert finished(store, other).error.code == "model_changed"
    store.close()


def test_a_model_that_cannot_be_read_is_said_by_its_jobs(store: JobStore) -> None:
    from wanduet.errors import WeightsError

    def damaged(engine: FakeEngine) -> ModelId:
        raise WeightsError("A file is damaged.")

    job_id = submit(store, OURS)
    with running(store, hooks=replace(FakeEngine.hooks, model_of=damaged)) as engine:
        assert wait(lambda: engine.jobs), "its engine then says what is wrong"
        finished(store, job_id)
