"""The object store of a cluster's jobs, for housekeeping: its owner mark, its entries, their deletion."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import structlog

from wanduet.errors import OutputError
from wanduet.jobs.places import ID_FILE, TRASH, Entry, Mark, UnreachablePlaceError, is_old, new_heap
from wanduet.jobs.records import is_job_id

log = structlog.get_logger(__name__)


class StoragePlace:
    """The object store as a place for housekeeping. Errors of its client become UnreachablePlaceError."""

    def __init__(self, fs: Any, root: str) -> None:
        """`fs` is fsspec's file system, `root` the folder of the jobs in it."""
        self.name = root
        self._fs = fs
        self._root = root

    def mark(self) -> Mark | None:
        """As in `jobs.places`."""
        path = f"{self._root}/{ID_FILE}"
        try:
            self._fs.invalidate_cache()
            return Mark.from_json(self._fs.cat_file(path), path)
        except FileNotFoundError:
            return None
        except OutputError:
            raise
        except Exception as error:
            raise _unreachable(path, error) from error

    def set_mark(self, mark: Mark, *, replace: bool = False) -> Mark:
        """As in `jobs.places`. Object stores lack exclusive creation: of two concurrent writers the later may win."""
        found = None if replace else self.mark()
        if found is not None:
            return found
        path = f"{self._root}/{ID_FILE}"
        try:
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(path, mark.to_json())
        except Exception as error:
            raise _unreachable(path, error) from error
        return self.mark() or mark

    def entries(self) -> Iterator[Entry]:
        """As in `jobs.places`. Raises UnreachablePlaceError."""
        with self._reached():
            found = [*self.list_names("videos"), *self.list_names("work")]
        for remote in found:
            name = remote.rstrip("/").rpartition("/")[2]
            job_id = name.partition(".")[0]
            if is_job_id(job_id):
                yield job_id, name

    def remove(self, entries: Iterable[Entry]) -> int:
        """As in `jobs.places`."""
        return sum(self.delete(_within(entry)) for entry in entries)

    def throw_away(self, entries: Iterable[Entry]) -> tuple[int, str]:
        """As in `jobs.places`; checkpoints are in a job's folder here."""
        heap, moved = f"{self._root}/{TRASH}/{new_heap()}", 0
        for entry in entries:
            try:
                target = f"{heap}/{_within(entry)}"
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._fs.mv(f"{self._root}/{_within(entry)}", target, recursive=entry[0] == entry[1])
                moved += 1
            except FileNotFoundError:
                continue
            except Exception as error:
                log.error("cannot be moved to the trash", name=entry[1], error=type(error).__name__)
        return moved, heap

    def empty_trash(self, days: float) -> int:
        """As in `jobs.places`. Raises UnreachablePlaceError."""
        with self._reached():
            heaps = [remote.rstrip("/").rpartition("/")[2] for remote in self.list_names(TRASH)]
        return sum(self.delete(f"{TRASH}/{heap}") for heap in heaps if is_old(heap, days))

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise _unreachable(self.name, error) from error

    def list_names(self, name: str, deep: bool = False) -> list[str]:
        """Return names directly under a name, or all files below it (`deep`); empty if there are none.

        Raises what the client raises.
        """
        self._fs.invalidate_cache()
        with suppress(FileNotFoundError):
            where = f"{self._root}/{name}"
            found: Any = self._fs.find(where) if deep else self._fs.ls(where, detail=False)
            return [str(one) for one in found]
        return []

    def delete(self, name: str) -> bool:
        """Delete an object, or all under a name; return whether it existed. A later sweep retries after an error."""
        try:
            self._fs.rm(f"{self._root}/{name}", recursive=True)
        except FileNotFoundError:
            return False
        except Exception as error:
            log.warning("not deleted from the store", name=name, error=type(error).__name__)
            return False
        return True


def _unreachable(path: str, error: Exception) -> UnreachablePlaceError:
    return UnreachablePlaceError(f"{path} cannot be read or written ({type(error).__name__}).", hint="Is it reached?")


def _within(entry: Entry) -> str:
    job_id, name = entry
    return f"work/{job_id}" if name == job_id else f"videos/{name}"
