"""Where jobs' files live: names that the server makes, inside the data folder, whatever a client sends.

    DATA/jobs.sqlite3             the store, unless a database's address was given
    DATA/work/<job>/video.mp4     where an attempt writes and where the next one finds it
    DATA/work/<job>/preview.webp, checkpoints.json    what is foreseen; which of DATA/checkpoints are the job's
    DATA/videos/<job>.<token>-0.mp4, .webp, .jpg    published files of a completed job
    DATA/workers/<worker>.lock    held by a living worker
    DATA/store-id, DATA/trash     see `jobs.places`

A published name holds the lease's token, so a worker that lost its job can never replace the file of the
one that has it. Knows nothing of the database: whether a file is wanted is the store's to say.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from wanduet.errors import OutputError
from wanduet.folders import make_folder, sync_folder
from wanduet.jobs.places import FolderPlace, Place
from wanduet.jobs.records import OutputFile, is_job_id
from wanduet.media.files import atomic_output, output_error, write_atomically

EXTENSIONS = {"video": ".mp4", "thumbnail": ".webp", "spritesheet": ".jpg"}

PRIVATE_FOLDER = (
    0o700  # prompts and videos are no business of the machine's other users; a folder that is there keeps its mode
)
_CHECKPOINT = re.compile(r"[0-9a-f]{16,64}")
PUBLISHED_NAME = re.compile(r"video_[0-9a-f]{32}\.(?P<token>\d+)-\d+\.(mp4|webp|jpg)")


class JobFiles:
    """The files of all jobs under one data folder."""

    def __init__(self, folder: Path) -> None:
        """Create the folders. Raises OutputError."""
        self.folder = folder.absolute()
        self.videos = self.folder / "videos"
        self.work = self.folder / "work"
        self.workers = self.folder / "workers"
        for path in (self.folder, self.videos, self.work, self.workers):
            try:
                make_folder(path, PRIVATE_FOLDER)
            except OSError as error:
                raise output_error(path, error) from error
        # Whatever looks after all files looks at each of these.
        self.places: tuple[Place, ...] = (FolderPlace(self.folder, self._discard_here, self._checkpoints_of),)

    @property
    def default_url(self) -> str:
        """The address of the SQLite database in the data folder."""
        return f"sqlite:///{self.folder / 'jobs.sqlite3'}"

    def work_path(self, job_id: str) -> Path:
        """The video that the attempts of a job write. Raises ValueError for what is no job id."""
        if not is_job_id(job_id):
            raise ValueError("not a job id")
        return self.work / job_id / "video.mp4"

    def preview_path(self, job_id: str) -> Path:
        """The picture of what a running job foresees. Raises ValueError for what is no job id."""
        return self.work_path(job_id).with_name("preview.webp")

    def preview(self, job_id: str) -> bytes | None:
        """That picture, an animated WebP; None if there is none yet, or no more."""
        try:
            return self.preview_path(job_id).read_bytes()
        except OSError:
            return None

    @contextmanager
    def attempt(self, job_id: str, resume: bool) -> Iterator[None]:
        """Around an attempt. With `resume`, what earlier ones left is brought here; all of it lies here already."""
        yield

    def keep(self, job_id: str) -> bool:
        """Before a job is put back: what was made of it is where the next worker looks. Here, it is.

        False if something of it could not be brought there.
        """
        return True

    def offer(self, job_id: str, paths: Iterable[Path]) -> None:
        """Let a job's attempts find entries of the embeddings' cache wherever they run. Here, they do."""

    def publish(self, job_id: str, token: int, index: int, source: Path) -> OutputFile:
        """Give a finished video its public name; the working copy stays until `discard_work`. Raises OutputError."""
        target = self._target(job_id, token, index, "video")
        try:
            target.unlink(missing_ok=True)  # the same lease tries again after an error
            try:
                os.link(source, target)
                sync_folder(self.videos)
            except OSError:  # a file system without hard links
                with atomic_output(target) as partial:
                    shutil.copyfile(source, partial)
            return OutputFile("video", index, target.name, target.stat().st_size)
        except OSError as error:
            raise output_error(target, error) from error

    def publish_bytes(self, job_id: str, token: int, index: int, variant: str, data: bytes) -> OutputFile:
        """Write a thumbnail or sprite sheet under its public name. Raises OutputError."""
        target = self._target(job_id, token, index, variant)
        write_atomically(target, data)
        return OutputFile(variant, index, target.name, len(data))

    def path(self, name: str) -> Path | None:
        """A published file by its stored name; None if it is gone or leads out of the folder."""
        if not PUBLISHED_NAME.fullmatch(name):
            return None
        path = self.videos / name
        if path.is_symlink() or not path.is_file() or path.resolve().parent != self.videos.resolve():
            return None
        return path

    def free_bytes(self) -> float:
        """Free space of the disk; infinite where that cannot be known."""
        try:
            return shutil.disk_usage(self.folder).free
        except OSError:
            return math.inf

    def find_no_room(self, num_bytes: int) -> str | None:
        """Why the disk has not so much free, or cannot be written just now; None if it has and can."""
        if self.free_bytes() < num_bytes:
            return f"fewer than {num_bytes} bytes are free"
        try:
            write_atomically(self.folder / "disk-check", b"x")
        except OutputError as error:
            return error.message
        return None

    def remove(self, names: Iterable[str]) -> None:
        """Delete published files; one that is gone already is fine."""
        for name in names:
            if PUBLISHED_NAME.fullmatch(name):
                with suppress(OSError):
                    (self.videos / name).unlink(missing_ok=True)

    def remove_older(self, job_id: str, token: int) -> None:
        """Delete what attempts before the one with this token published and were killed before they could commit.

        A writer that still lives loses a file that nobody will ever ask for, and ends at its own commit.
        """
        self.remove_older_of({job_id: token})

    def remove_older_of(self, tokens: Mapping[str, int]) -> None:
        """The same for many jobs, in one look at the folder: their tokens by their ids."""
        self.remove(list(older(_names_of(self.videos, tuple(tokens)), tokens)))

    def note_checkpoints(self, job_id: str, keys: Iterable[str]) -> None:
        """Write down which of the engine's checkpoints are a job's, so that they go when its work goes."""
        write_atomically(self._checkpoints_note(job_id), json.dumps(list(keys)).encode())

    def discard_work(self, job_id: str) -> None:
        """Delete what the attempts of a job left behind, the engine's checkpoints too."""
        self._discard_here(job_id)

    def _discard_here(self, job_id: str) -> None:
        self.discard_checkpoints(self._noted_checkpoints(job_id))  # first: a kill in between leaves the note
        shutil.rmtree(self.work_path(job_id).parent, ignore_errors=True)

    def discard_checkpoints(self, keys: Iterable[str]) -> None:
        """Delete checkpoints of the engine by their keys."""
        for path in self._checkpoint_paths(keys):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _checkpoints_of(self, job_id: str) -> Iterator[Path]:
        return self._checkpoint_paths(self._noted_checkpoints(job_id))

    def _checkpoint_paths(self, keys: Iterable[str]) -> Iterator[Path]:
        folder = self.folder / "checkpoints"
        for name in _names_of(folder, tuple(key for key in keys if _CHECKPOINT.fullmatch(key))):
            yield folder / name

    def _noted_checkpoints(self, job_id: str) -> list[str]:
        try:
            return [str(key) for key in json.loads(self._checkpoints_note(job_id).read_bytes())]
        except (OSError, ValueError, TypeError):
            return []

    def _checkpoints_note(self, job_id: str) -> Path:
        return self.work_path(job_id).with_name("checkpoints.json")

    def _target(self, job_id: str, token: int, index: int, variant: str) -> Path:
        if not is_job_id(job_id):
            raise ValueError("not a job id")
        return self.videos / f"{job_id}.{token:d}-{index:d}{EXTENSIONS[variant]}"


def older(names: Iterable[str], tokens: Mapping[str, int]) -> Iterator[str]:
    """Of published names, those of a job's attempts before the one with its token."""
    for name in names:
        token = tokens.get(name.partition(".")[0])
        match = PUBLISHED_NAME.fullmatch(name)
        if token is not None and match is not None and int(match["token"]) < token:
            yield name


def _names_of(folder: Path, stems: tuple[str, ...]) -> Iterator[str]:
    """The files `STEM.*` of a folder that may hold very many; `Path.glob` keeps its pattern, and every name at once."""
    if stems:
        wanted = frozenset(stems)
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.partition(".")[0] in wanted:
                    yield entry.name
