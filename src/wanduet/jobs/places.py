"""A place for jobs' files, a folder or a bucket, as sweeps and retention use it: its owner, its entries, its trash.

    PLACE/store-id       which job database the place belongs to
    PLACE/trash/<time>/  what a sweep removed, under the same relative paths; deleted after some days

To restore files from the trash, move them back. `jobs.files` has the operations on single jobs' files.
"""

import errno
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import structlog

from wanduet.errors import OutputError
from wanduet.folders import make_folder, replace_file
from wanduet.jobs.records import is_job_id
from wanduet.media.files import output_error

log = structlog.get_logger(__name__)

ID_FILE = "store-id"
TRASH = "trash"
TRASH_DAYS = 7.0
CLOCK_FORMAT = "%Y%m%dT%H%M%SZ"
Entry = tuple[str, str]  # a job's id and a file's name in `videos`, or the id twice for the job's folder in `work`

_ENTRY = re.compile(r"video_[0-9a-f]{32}(?=\.)")


class UnreachablePlaceError(OutputError):
    """A place on the network does not answer."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Which database a place belongs to: the id that is stored in both, and the database's address, for people."""

    id: str
    database: str

    def to_json(self) -> bytes:
        """Return the content of `store-id`."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes, name: str) -> "Mark":
        """Parse what `to_json` returned. Raises OutputError: an unreadable mark must not count as none."""
        try:
            values = json.loads(data)
            return cls(str(values["id"]), str(values["database"]))
        except (ValueError, LookupError, TypeError):
            raise OutputError(
                f"{name} is damaged; it holds which job database these files belong to.",
                hint="`wanduet jobs adopt` writes it anew for the database that you name.",
            ) from None


class Place(Protocol):
    """A folder or a bucket."""

    name: str  # its address, for people

    def mark(self) -> Mark | None:
        """Read the mark; None if there is none. Raises OutputError."""

    def set_mark(self, mark: Mark, *, replace: bool = False) -> Mark:
        """Write the mark if there is none, or with `replace`; return the one that is there afterwards."""

    def entries(self) -> Iterator[Entry]:
        """Return all files and folders that are named after a job's id. Raises OSError, UnreachablePlaceError."""

    def remove(self, entries: Iterable[Entry]) -> int:
        """Delete entries; return how many were deleted."""

    def throw_away(self, entries: Iterable[Entry]) -> tuple[int, str]:
        """Move entries to the trash; return how many were moved, and the target."""

    def empty_trash(self, days: float) -> int:
        """Delete what has been in the trash for `days`; return how many sweeps' folders were deleted."""


class FolderPlace:
    """The `videos` and `work` of a data folder. `discard_work` deletes a job's folder and checkpoints, which
    `checkpoints_of` lists.
    """

    def __init__(
        self, folder: Path, discard_work: Callable[[str], None], checkpoints_of: Callable[[str], Iterable[Path]]
    ) -> None:
        self.name = str(folder)
        self._folder = folder
        self._discard_work = discard_work
        self._checkpoints_of = checkpoints_of

    def mark(self) -> Mark | None:
        """As in `Place`."""
        path = self._folder / ID_FILE
        try:
            return Mark.from_json(path.read_bytes(), str(path))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise output_error(path, error, "--data-dir") from error

    def set_mark(self, mark: Mark, *, replace: bool = False) -> Mark:
        """As in `Place`; if several processes write at once, all return the same mark. Raises OutputError."""
        path = self._folder / ID_FILE
        new = path.with_name(f"{ID_FILE}.{secrets.token_hex(4)}")
        try:
            _write(new, mark.to_json())
            if replace:
                replace_file(new, path)
                return mark
            try:
                os.link(new, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                with suppress(FileExistsError):
                    _write(path, mark.to_json())
        except OSError as error:
            raise output_error(path, error, "--data-dir") from error
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)
        return self.mark() or mark

    def entries(self) -> Iterator[Entry]:
        """As in `Place`; includes partial files. Raises OSError."""
        with os.scandir(self._folder / "videos") as found:
            for entry in found:
                if match := _ENTRY.match(entry.name):
                    yield match[0], entry.name
        with os.scandir(self._folder / "work") as found:
            yield from ((entry.name, entry.name) for entry in found if is_job_id(entry.name))

    def remove(self, entries: Iterable[Entry]) -> int:
        """As in `Place`."""
        removed = 0
        for job_id, name in entries:
            if name == job_id:
                self._discard_work(job_id)
                removed += not self._path(job_id, name).exists()
            else:
                with suppress(OSError):
                    self._path(job_id, name).unlink()
                    removed += 1
        return removed

    def throw_away(self, entries: Iterable[Entry]) -> tuple[int, str]:
        """As in `Place`; moves a job's checkpoints with its folder. Entries that cannot be moved stay."""
        heap = self._folder / TRASH / new_heap()
        moved = 0
        for job_id, name in entries:
            source = self._path(job_id, name)
            checkpoints = list(self._checkpoints_of(job_id)) if name == job_id else []
            try:
                _move(source, heap / source.parent.name / name)
                moved += 1
                for path in checkpoints:
                    _move(path, heap / path.parent.name / path.name)
            except FileNotFoundError:  # another process moved or deleted it
                continue
            except OSError as error:
                log.error("cannot be moved to the trash", name=name, error=error.strerror)
        return moved, str(heap)

    def empty_trash(self, days: float) -> int:
        """As in `Place`."""
        removed = 0
        with suppress(OSError), os.scandir(self._folder / TRASH) as found:
            for entry in found:
                if is_old(entry.name, days):
                    shutil.rmtree(entry.path, ignore_errors=True)
                    removed += 1
        return removed

    def _path(self, job_id: str, name: str) -> Path:
        return self._folder / ("work" if name == job_id else "videos") / name


def _write(path: Path, data: bytes) -> None:
    """Write a new file, readable by its owner only, and sync it."""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def new_heap() -> str:
    """Return a name for a folder in the trash, made of the time."""
    return f"{datetime.now(UTC).strftime(CLOCK_FORMAT)}-{secrets.token_hex(2)}"


def is_old(heap: str, days: float) -> bool:
    """Return whether a folder in the trash is at least `days` old. False for names that `new_heap` did not make."""
    try:
        made = datetime.strptime(heap.partition("-")[0], CLOCK_FORMAT).replace(tzinfo=UTC)
    except ValueError:
        return False
    return time.time() - made.timestamp() > 86400 * days


def _move(source: Path, target: Path) -> None:
    make_folder(target.parent, 0o700)
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.move(source, target)  # not a rename: `videos` may be on another disk
