"""Where jobs' files are kept, as those see it who look after all of them: whose they are, what is there, what goes.

    PLACE/store-id       which job database the place belongs to
    PLACE/trash/<time>/  what a sweep took away, as it lay in the place; deleted after some days

What is moved to the trash can be put back by moving it again. The files of single jobs are `jobs.files`' business.
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
Entry = tuple[str, str]  # a job's id, and a file's name in `videos`; or the id twice: the job's folder in `work`

_ENTRY = re.compile(r"video_[0-9a-f]{32}(?=\.)")


class UnreachablePlaceError(OutputError):
    """A place on the network does not answer just now."""


@dataclass(frozen=True, slots=True)
class Mark:
    """Which database a place belongs to: the id that is kept in both, and its address, for people."""

    id: str
    database: str

    def to_json(self) -> bytes:
        """What is written into the place."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes, name: str) -> "Mark":
        """What `to_json` made. Raises OutputError: a mark that cannot be read must not count as none."""
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
        """Whose it is; None if that was never written. Raises OutputError."""

    def set_mark(self, mark: Mark, *, replace: bool = False) -> Mark:
        """Write whose it is, unless it is written already and not to be replaced; returns what stands there."""

    def entries(self) -> Iterator[Entry]:
        """Everything that has a job's id for a name. Raises OSError, UnreachablePlaceError."""

    def remove(self, entries: Iterable[Entry]) -> int:
        """Delete what is known to be unwanted; returns how many went."""

    def throw_away(self, entries: Iterable[Entry]) -> tuple[int, str]:
        """Move entries to the trash; returns how many went, and where to."""

    def empty_trash(self, days: float) -> int:
        """Delete what has lain in the trash for so many days; returns how many sweeps' heaps went."""


class FolderPlace:
    """The `videos` and `work` of a data folder. `discard_work` deletes a job's folder with its checkpoints;
    `checkpoints_of` names those.
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
            raise output_error(path, error) from error

    def set_mark(self, mark: Mark, *, replace: bool = False) -> Mark:
        """As in `Place`; of several processes that write at once, one wins and all read the same. Raises OutputError."""
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
            raise output_error(path, error) from error
        finally:
            with suppress(OSError):
                new.unlink(missing_ok=True)
        return self.mark() or mark

    def entries(self) -> Iterator[Entry]:
        """As in `Place`; partial files too. Raises OSError."""
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
        """As in `Place`; a job's checkpoints go with its folder. What cannot be moved stays where it is."""
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
            except FileNotFoundError:  # somebody was quicker
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
    """A new file that only its owner reads, on the disk."""
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def new_heap() -> str:
    """A name in the trash that says when."""
    return f"{datetime.now(UTC).strftime(CLOCK_FORMAT)}-{secrets.token_hex(2)}"


def is_old(heap: str, days: float) -> bool:
    """Whether a heap of the trash was made so many days ago. What bears no such name is nobody's to delete."""
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
        shutil.move(source, target)  # `videos` may be a disk of its own
