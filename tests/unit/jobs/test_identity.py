"""A data folder and its database belong together: another database is refused before anything can be deleted."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from fake_engine import finish_job, open_store

from wanduet.errors import OutputError
from wanduet.jobs.files import JobFiles
from wanduet.jobs.identity import take_over
from wanduet.jobs.places import ID_FILE
from wanduet.jobs.records import ForeignDatabaseError
from wanduet.jobs.schema import state
from wanduet.jobs.store import JobStore

sqlite = pytest.mark.skipif("WANDUET_TEST_POSTGRES" in os.environ, reason="database files are moved")


def url(path: Path) -> str:
    return f"sqlite:///{path}"


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for name in ("videos", "work") for path in (folder / name).rglob("*")}


def filled(folder: Path, jobs: int = 3) -> set[str]:
    with closing(open_store(folder)) as store:
        for _ in range(jobs):
            finish_job(store)
    return left(folder)


def forget_ids(folder: Path) -> None:
    """As the version before this one left them."""
    with closing(open_store(folder)) as store, store.database.begin() as old:
        for text in (
            "ALTER TABLE state DROP COLUMN store_id",
            "DROP TABLE deleted_jobs",
            "DROP INDEX jobs_with_files",
            "UPDATE state SET version = 2",
        ):
            old.execute(sa.text(text))
    (folder / ID_FILE).unlink()


@sqlite
def test_another_database_is_refused_by_name_with_what_to_do(tmp_path: Path) -> None:
    before = filled(tmp_path / "data")
    with closing(JobStore(JobFiles(tmp_path / "other"), url(tmp_path / "other.sqlite3"))) as other:
        finish_job(other)
    with pytest.raises(ForeignDatabaseError) as caught:
        JobStore(JobFiles(tmp_path / "data"), url(tmp_path / "other.sqlite3"))
    for text in (str(tmp_path / "data"), "data/jobs.sqlite3", "other.sqlite3", "--database-url", "wanduet jobs adopt"):
        assert text in str(caught.value)
    assert left(tmp_path / "data") == before


@sqlite
@pytest.mark.parametrize("make", ["new", "empty file", "tables only"])
def test_a_new_database_in_the_place_of_one_moved_away_is_refused(tmp_path: Path, make: str) -> None:
    before = filled(tmp_path)
    database = tmp_path / "jobs.sqlite3"
    database.rename(tmp_path / "away")
    if make == "empty file":
        database.touch()
    if make == "tables only":
        open_store(tmp_path / "fresh").close()
        (tmp_path / "fresh" / "jobs.sqlite3").rename(database)
    for _ in range(2):  # the second start is not fooled by what the first one left
        with pytest.raises(ForeignDatabaseError):
            open_store(tmp_path)
    assert database.exists() == (make != "new"), "no new file lies where the old one belongs"
    assert left(tmp_path) == before
    (tmp_path / "away").replace(database)
    with closing(open_store(tmp_path)) as store:
        assert store.sweep() == 0
        assert len(store.list().jobs) == 3
    assert left(tmp_path) == before


def test_an_installation_of_the_version_before_is_paired_at_its_first_start(tmp_path: Path) -> None:
    before = filled(tmp_path)
    forget_ids(tmp_path)
    orphan = tmp_path / "videos" / f"video_{'0' * 32}.1-0.mp4"
    orphan.write_bytes(b"x")
    with closing(open_store(tmp_path)) as store, store.database.connect() as connection:
        assert json.loads((tmp_path / ID_FILE).read_bytes())["id"] == connection.scalar(sa.select(state.c.store_id))
        finish_job(store)
    assert before < left(tmp_path)


@sqlite
def test_files_of_the_version_before_are_not_given_to_a_database_that_does_not_know_them(tmp_path: Path) -> None:
    before = filled(tmp_path)
    forget_ids(tmp_path)
    (tmp_path / "jobs.sqlite3").rename(tmp_path / "away")
    with pytest.raises(ForeignDatabaseError, match="does not exist"):
        open_store(tmp_path)
    with closing(JobStore(JobFiles(tmp_path / "other"))) as other:
        finish_job(other)
    with pytest.raises(ForeignDatabaseError, match="does not know"):
        JobStore(JobFiles(tmp_path), url(tmp_path / "other" / "jobs.sqlite3"))
    assert left(tmp_path) == before
    assert not (tmp_path / ID_FILE).exists()


def test_a_backup_from_before_there_were_ids_is_taken_back(tmp_path: Path) -> None:
    filled(tmp_path)
    name = json.loads((tmp_path / ID_FILE).read_bytes())["id"]
    mark = (tmp_path / ID_FILE).read_bytes()
    forget_ids(tmp_path)
    (tmp_path / ID_FILE).write_bytes(mark)
    with closing(open_store(tmp_path)) as store, store.database.connect() as connection:
        assert connection.scalar(sa.select(state.c.store_id)) == name


def test_many_that_open_a_new_folder_at_once_agree(tmp_path: Path) -> None:
    barrier = threading.Barrier(6)

    def start(_: int) -> str:
        barrier.wait()
        with closing(open_store(tmp_path)) as store, store.database.connect() as connection:
            return str(connection.scalar(sa.select(state.c.store_id)))

    with ThreadPoolExecutor(6) as pool:
        (name,) = set(pool.map(start, range(6)))
    assert json.loads((tmp_path / ID_FILE).read_bytes())["id"] == name


def test_of_two_databases_that_take_a_new_folder_at_once_one_is_refused(tmp_path: Path) -> None:
    barrier = threading.Barrier(2)

    def start(number: int) -> bool:
        barrier.wait()
        try:
            JobStore(JobFiles(tmp_path / "data"), url(tmp_path / f"{number}.sqlite3")).close()
        except ForeignDatabaseError:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(start, range(2))) == [False, True]


def test_many_folders_may_have_one_database(tmp_path: Path) -> None:
    for name in ("a", "b"):
        JobStore(JobFiles(tmp_path / name), url(tmp_path / "jobs.sqlite3")).close()
    assert (tmp_path / "a" / ID_FILE).read_bytes() == (tmp_path / "b" / ID_FILE).read_bytes()


@sqlite
def test_a_folder_is_taken_over_on_purpose(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "jobs.sqlite3").rename(tmp_path / "away")
    files = JobFiles(tmp_path)
    take_over(files, files.default_url)
    with closing(open_store(tmp_path)) as store:
        finish_job(store)
    (tmp_path / "jobs.sqlite3").unlink()
    (tmp_path / "away").rename(tmp_path / "jobs.sqlite3")
    with pytest.raises(ForeignDatabaseError):
        open_store(tmp_path)


def test_a_folder_given_away_while_it_is_served_is_not_swept(tmp_path: Path) -> None:
    with closing(open_store(tmp_path)) as store:
        finish_job(store)
        take_over(store.files, url(tmp_path / "other.sqlite3"))
        orphan = tmp_path / "videos" / f"video_{'0' * 32}.1-0.mp4"
        orphan.write_bytes(b"x")
        assert store.sweep() == 0
        assert orphan.exists()


@sqlite
def test_a_mark_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / ID_FILE).write_bytes(b"{")
    with pytest.raises(OutputError, match="wanduet jobs adopt"):
        open_store(tmp_path)
    take_over(JobFiles(tmp_path), JobFiles(tmp_path).default_url)
    open_store(tmp_path).close()


def test_a_password_is_written_nowhere(tmp_path: Path) -> None:
    from wanduet.jobs.database import public_name

    name = public_name("postgresql+psycopg://ann:secret@host/jobs?password=secret")
    assert "secret" not in name
    assert "host/jobs" in name


def test_another_kind_of_database_is_refused_too(tmp_path: Path) -> None:
    before = filled(tmp_path)
    with closing(JobStore(JobFiles(tmp_path / "other"), url(tmp_path / "other.sqlite3"))) as other:
        finish_job(other)
    with pytest.raises(ForeignDatabaseError, match="belongs to another job database"):
        JobStore(JobFiles(tmp_path), url(tmp_path / "other.sqlite3"))
    assert left(tmp_path) == before
