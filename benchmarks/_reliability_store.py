"""The job store under attack, in figures: files swept by databases that are not the folder's own, reads beside a locked
database, retention beside a queue. `reliability.py` calls `main`; alone, it prints what it finds as JSON.

    PYTHONPATH=src python benchmarks/_reliability_store.py [--jobs 100000] [--lock-seconds 10]
"""

import argparse
import json
import logging
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
import structlog
from sqlalchemy.exc import SQLAlchemyError

from wanduet.errors import WanduetError
from wanduet.jobs.files import JobFiles
from wanduet.jobs.housekeeping import Housekeeper
from wanduet.jobs.places import ID_FILE, TRASH
from wanduet.jobs.records import NewJob, OutputFile, make_id
from wanduet.jobs.schema import jobs
from wanduet.jobs.store import JobStore

NEW = NewJob("ann", "miniature", {"prompt": "a red circle " * 10, "seed": 1})
DAY = 86400.0


def main(out: dict[str, Any], jobs_count: int = 100_000, lock_seconds: float = 10.0) -> None:
    """Add this file's figures to `out`; `jobs_count` finished jobs expire, a lock is held for `lock_seconds`."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with tempfile.TemporaryDirectory() as folder:
        out["files lost to a strange database"] = strange_databases(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        out["reads while the database is locked"] = locked_reads(Path(folder), lock_seconds)
    with tempfile.TemporaryDirectory() as folder:
        out["retention beside a queue"] = retention(Path(folder), jobs_count)


def finish(store: JobStore) -> None:
    """One job, made as a worker makes it."""
    store.submit(NEW)
    lease = store.claim("w", 30.0)
    assert lease is not None
    path = store.files.work_path(lease.job.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"video")
    store.complete(lease, [store.files.publish(lease.job.id, lease.token, 0, path)])
    store.files.discard_work(lease.job.id)


def insert_finished(store: JobStore, count: int, expires_at: float | None, *, chunk: int = 500) -> None:
    """Finished jobs with a file each, like one that `finish` has made, by the hundred."""
    finish(store)
    with store.database.connect() as connection:
        row = dict(connection.execute(sa.select(jobs).limit(1)).mappings().one())
    newest = "video_" + "0" * 32
    for begin in range(0, count - 1, chunk):
        rows = []
        for _ in range(min(chunk, count - 1 - begin)):
            newest = make_id(0.0, newest)
            name = f"{newest}.1-0.mp4"
            (store.files.videos / name).write_bytes(b"video")
            file = {"variant": "video", "index": 0, "name": name, "num_bytes": 5}
            rows.append(row | {"id": newest, "files": [file], "expires_at": expires_at})
        with store.database.begin() as connection:
            connection.execute(sa.insert(jobs), rows)
    with store.database.begin() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == row["id"]).values(expires_at=expires_at))


def strange_databases(folder: Path, count: int = 66) -> dict[str, Any]:
    """Each way to a database that does not know the folder's files, and how many files are gone afterwards."""
    found: dict[str, Any] = {}

    def other_address(data: Path) -> JobStore:
        return JobStore(JobFiles(data), f"sqlite:///{data.with_suffix('.sqlite3')}")

    def moved_away(data: Path) -> JobStore:
        (data / "jobs.sqlite3").rename(data / "away")
        return JobStore(JobFiles(data))

    def of_the_version_before(data: Path) -> JobStore:
        (data / ID_FILE).unlink()
        return moved_away(data)

    def rows_deleted(data: Path) -> JobStore:
        store = JobStore(JobFiles(data))
        with store.database.begin() as connection:
            connection.execute(sa.delete(jobs))
        return store

    def damaged_index(data: Path) -> JobStore:
        empty_index_page(data / "jobs.sqlite3")
        return JobStore(JobFiles(data))

    for attack in (other_address, moved_away, of_the_version_before, rows_deleted, damaged_index):
        data = folder / attack.__name__
        with closing(JobStore(JobFiles(data))) as store:
            insert_finished(store, 300 if attack is damaged_index else count, None)
        before = len(list((data / "videos").iterdir()))
        refused = ""
        try:
            with closing(attack(data)) as store:
                store.sweep()
        except WanduetError as error:
            refused = error.code
        left = len(list((data / "videos").iterdir()))
        trash = len(list((data / TRASH).rglob("*.mp4")))
        found[attack.__name__] = {"files": before, "lost": before - left - trash, "trash": trash, "refused": refused}
    return found


def empty_index_page(path: Path) -> None:
    """One page of the index of ids loses all entries but its first, as a disk that forgets a write leaves it."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_jobs_1'"
        (root,) = database.execute(query).fetchone()
        (size,) = database.execute("PRAGMA page_size").fetchone()
    with path.open("r+b") as file:
        file.seek((root - 1) * size)
        page = file.read(size)
        cell = int.from_bytes(page[12:14], "big")
        child = int.from_bytes(page[cell : cell + 4], "big")
        file.seek((child - 1) * size + 3)
        file.write((1).to_bytes(2, "big"))


def locked_reads(folder: Path, seconds: float, writers: int = 8) -> dict[str, Any]:
    """Reads beside threads that want to write, while another connection has the write lock."""
    waits: list[float] = []
    written = [0]
    with closing(JobStore(JobFiles(folder))) as store:
        for _ in range(20):
            finish(store)
        ids = [job.id for job in store.list().jobs]
        stop = threading.Event()

        def write() -> None:
            while not stop.is_set():
                began = time.perf_counter()
                try:
                    store.submit(NEW)
                    written[0] += 1
                except SQLAlchemyError:
                    waits.append(time.perf_counter() - began)

        with locked(folder):
            threads = [threading.Thread(target=write) for _ in range(writers)]
            for thread in threads:
                thread.start()
            reads = [timed(lambda: JobStore(JobFiles(folder)).close())]
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                reads += [timed(lambda: store.get(ids[0])), timed(store.list), timed(store.statistics)]
                time.sleep(0.01)
            stop.set()
            opened = reads[0]
            for thread in threads:
                thread.join()
    reads.sort()
    return {
        "lock_s": seconds,
        "reads": len(reads),
        "read_p99_ms": round(1000 * reads[int(0.99 * (len(reads) - 1))], 2),
        "read_max_ms": round(1000 * reads[-1], 2),
        "open_ms": round(1000 * opened, 2),
        "writers": writers,
        "written": written[0],
        "refused": len(waits),
        "writer_waits_max_s": round(max(waits), 2),
    }


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    with closing(sqlite3.connect(folder / "jobs.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def retention(folder: Path, count: int) -> dict[str, Any]:
    """A worker's loop without pauses: a round of housekeeping, then a job is claimed, completed and another one queued."""
    process = psutil.Process()
    with closing(JobStore(JobFiles(folder), clock=lambda: DAY, retention_seconds=10 * DAY)) as store:
        insert_finished(store, count, DAY / 2)
        store.submit(NEW)
        keeper = Housekeeper(store, max_crashes=3, tidy_seconds=1.0, max_bytes=10**15)
        before = peak = process.memory_info().rss
        waits: list[float] = []
        began = time.perf_counter()
        expired_after = None
        swept = False
        while not swept:
            round_began = time.perf_counter()
            keeper.run_once()
            lease = store.claim("w", 30.0)
            waits.append(time.perf_counter() - round_began)
            assert lease is not None, "the queue stands still"
            store.complete(lease, [OutputFile("video", 0, f"{lease.job.id}.1-0.mp4", 5)])
            store.submit(NEW)
            peak = max(peak, process.memory_info().rss)
            if expired_after is None:
                with store.database.connect() as connection:
                    old = connection.scalar(sa.select(jobs.c.id).where(jobs.c.expires_at <= DAY).limit(1))
                if old is None:
                    expired_after = time.perf_counter() - began
            else:
                swept = not store.sweeping and not any(store.files.videos.iterdir())
    waits.sort()
    return {
        "jobs": count,
        "expired_after_s": round(expired_after or 0.0, 1),
        "claims_meanwhile": len(waits),
        "claim_wait_p50_ms": round(1000 * waits[len(waits) // 2], 1),
        "claim_wait_p99_ms": round(1000 * waits[int(0.99 * (len(waits) - 1))], 1),
        "claim_wait_max_ms": round(1000 * waits[-1], 1),
        "rss_before_mib": round(before / 2**20, 1),
        "rss_growth_mib": round((peak - before) / 2**20, 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--lock-seconds", type=float, default=10.0)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    main(figures, options.jobs, options.lock_seconds)
    print(json.dumps(figures, indent=2))
