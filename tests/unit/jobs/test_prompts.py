"""After a job was deleted its prompt can be read nowhere in the data folder."""

from pathlib import Path

import pytest
import torch
from fake_engine import open_store

from wanduet.jobs.prompts import forget_prompts
from wanduet.jobs.records import NewJob
from wanduet.jobs.store import JobStore
from wanduet.media.embeddings import PromptEmbeds, save_embeddings

SECRET = "a surprise party for ann"
WORD = b"surprise"


def keep(folder: Path, name: str, text: str) -> Path:
    path = folder / "embeddings" / f"{name}.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_embeddings(path, PromptEmbeds(torch.ones(3, 8), text, "", "encoder", "float32"))
    return path


def submit(store: JobStore, prompt: str = SECRET, **values: str) -> str:
    return store.submit(NewJob("ann", "m", {"prompt": prompt, **values})).job.id


def holding(folder: Path, word: bytes = WORD) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and word in path.read_bytes()]


def test_a_deleted_jobs_prompt_is_readable_nowhere(store: JobStore) -> None:
    folder = store.files.folder
    # The cache has the text as the encoder saw it, and one entry for each model and length.
    entries = [keep(folder, "a", SECRET), keep(folder, "b", SECRET), keep(folder, "c", "no surprise clowns")]
    other = keep(folder, "d", "a fox")
    job_id = submit(store, f"  {SECRET} ", negative_prompt="no  surprise clowns")
    for _ in range(30):
        submit(store, "a fox")
    lease = store.claim("w", 30.0)
    assert lease is not None
    for percent in range(30):
        store.progress(lease, float(percent), "denoise")
    store.complete(lease, [])
    assert holding(folder)
    store.delete(job_id)
    assert not any(path.exists() for path in entries)
    assert other.exists()
    assert holding(folder) == []


def test_retention_forgets_prompts_too(tmp_path: Path) -> None:
    now = [1000.0]
    store = open_store(tmp_path, clock=lambda: now[0], retention_seconds=50.0)
    keep(tmp_path, "a", SECRET)
    for _ in range(3):
        store.cancel(submit(store))
    assert store.expire() == 0
    now[0] = 2000.0
    assert store.expire() == 3
    assert holding(tmp_path) == []
    store.close()


def test_a_busy_database_does_not_hold_a_deletion_up(store: JobStore) -> None:
    job_id = submit(store)
    submit(store, "a fox")
    with store.database.connect() as reader, reader.begin():
        reader.exec_driver_sql("SELECT count(*) FROM jobs").all()
        store.delete(job_id)
    assert len(store.list().jobs) == 1
    with store.database.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 5000


@pytest.mark.parametrize("content", [b"", b"x" * 100, (2**60).to_bytes(8, "little"), b"\2" + bytes(7) + b"{}"])
def test_entries_that_cannot_be_read_go_too(store: JobStore, content: bytes) -> None:
    damaged = keep(store.files.folder, "a", "a fox")
    damaged.write_bytes(content)
    partial = damaged.with_name("b.safetensors.0.partial")
    partial.write_bytes(content)
    job = store.get(submit(store))
    assert forget_prompts(store.files.folder, [job]) == 1
    assert (damaged.exists(), partial.exists()) == (False, True), "somebody may be writing that one"


def test_nothing_is_done_where_nothing_is_kept(tmp_path: Path, store: JobStore) -> None:
    assert forget_prompts(tmp_path / "elsewhere", [store.get(submit(store))]) == 0
