"""Where jobs' files are: names made by the server, inside the data folder, independent of what a client sends.

    DATA/jobs.sqlite3             the database, by default
    DATA/work/<job>/video.mp4     what an attempt writes, and the next attempt resumes
    DATA/work/<job>/preview.webp, checkpoints.json    the preview; which of DATA/checkpoints belong to the job
    DATA/videos/<job>.<token>-0.mp4, .webp, .jpg    published files of a completed job
    DATA/videos/<job>.input       the video that a job starts from, as it was uploaded; kept as long as the job
    DATA/uploads/<random>         an upload, until its job is stored
    DATA/workers/<worker>.lock    locked by a living worker
    DATA/store-id, DATA/trash     see `jobs.places`

A published name contains the lease's token, so a worker that lost its job cannot replace the file of the one that has
it. Does not use the database: the store decides whether a file is wanted.
"""

import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from wanduet.errors import OutputError
from wanduet.folders import make_folder, sync_folder
from wanduet.jobs.places import FolderPlace, Place
from wanduet.jobs.records import INPUT, OutputFile, is_job_id
from wanduet.media.files import atomic_output, output_error, write_atomically

EXTENSIONS = {"video": ".mp4", "thumbnail": ".webp", "spritesheet": ".jpg"}

PRIVATE_FOLDER = 0o700  # other users must not read prompts and videos; an existing folder keeps its mode
_CHECKPOINT = re.compile(r"[0-9a-f]{16,64}")
PUBLISHED_NAME = re.compile(r"video_[0-9a-f]{32}\.((?P<token>\d+)-\d+\.(mp4|webp|jpg)|input)")
UPLOAD_SECONDS = 3600.0  # an upload to which nothing was written for so long is a killed server's


class JobFiles:
    """The files of all jobs under one data folder."""

    def __init__(self, folder: Path) -> None:
        """Create the folders. Raises OutputError."""
        self.folder = folder.absolute()
        self.videos = self.folder / "videos"
        self.work = self.folder / "work"
        self.workers = self.folder / "workers"
        self.uploads = self.folder / "uploads"
        for path in (self.folder, self.videos, self.work, self.workers, self.uploads):
            try:
                make_folder(path, PRIVATE_FOLDER)
            except OSError as error:
                raise output_error(path, error, "--data-dir") from error
        # Sweeps and retention go through all of these.
        self.places: tuple[Place, ...] = (FolderPlace(self.folder, self._discard_here, self._checkpoints_of),)

    @property
    def default_url(self) -> str:
        """The address of the SQLite database in the data folder."""
        return f"sqlite:///{self.folder / 'jobs.sqlite3'}"

    def work_path(self, job_id: str) -> Path:
        """Return the video file that attempts of a job write. Raises ValueError if `job_id` is not a job id."""
        return self.work / _checked(job_id) / "video.mp4"

    def preview_path(self, job_id: str) -> Path:
        """Return the preview file of a running job. Raises ValueError if `job_id` is not a job id."""
        return self.work_path(job_id).with_name("preview.webp")

    def preview(self, job_id: str) -> bytes | None:
        """Return the preview of a job, an animated WebP; None if there is none."""
        try:
            return self.preview_path(job_id).read_bytes()
        except OSError:
            return None

    @contextmanager
    def attempt(self, job_id: str, resume: bool) -> Iterator[None]:
        """A context around an attempt. With `resume`, fetches earlier attempts' files; in a folder, nothing to do."""
        yield

    def keep(self, job_id: str) -> None:
        """Store a job's work files where the next worker finds them; call it before the job is put back. In a folder, they
        are there already."""

    def publish(self, job_id: str, token: int, index: int, source: Path) -> OutputFile:
        """Publish a finished video; the work file stays until `discard_work`. Raises OutputError."""
        return OutputFile("video", index, *self._link(source, self._target(job_id, token, index, "video")))

    def publish_bytes(self, job_id: str, token: int, index: int, variant: str, data: bytes) -> OutputFile:
        """Publish a thumbnail or sprite sheet under its final name. Raises OutputError."""
        target = self._target(job_id, token, index, variant)
        write_atomically(target, data)
        return OutputFile(variant, index, target.name, len(data))

    def add_input(self, job_id: str, source: Path) -> OutputFile:
        """Store the video that a job starts from, which must be on the disk; `source` stays. Raises OutputError."""
        return OutputFile(INPUT, 0, *self._link(source, self.videos / _input_name(job_id)))

    def bring_input(self, job_id: str) -> Path | None:
        """Return a job's input video, on this machine's disk while the attempt runs; None if it is missing."""
        return self.path(_input_name(job_id))

    def new_upload(self) -> Path:
        """Return a name for a file that is received; it is deleted if nothing is written to it for UPLOAD_SECONDS."""
        return self.uploads / secrets.token_hex(16)

    def discard_uploads(self) -> None:
        """Delete what servers that were killed were receiving."""
        with suppress(OSError), os.scandir(self.uploads) as entries:
            for entry in entries:
                with suppress(OSError):
                    if time.time() - entry.stat().st_mtime > UPLOAD_SECONDS:
                        os.unlink(entry.path)

    def path(self, name: str) -> Path | None:
        """Return a published file or a job's input by its stored name; None unless it is a plain file in the folder."""
        if not PUBLISHED_NAME.fullmatch(name):
            return None
        path = self.videos / name
        if path.is_symlink() or not path.is_file() or path.resolve().parent != self.videos.resolve():
            return None
        return path

    def free_bytes(self) -> float:
        """Return the free bytes of the disk; infinite if it cannot be determined."""
        try:
            return shutil.disk_usage(self.folder).free
        except OSError:
            return math.inf

    def find_no_room(self, num_bytes: int) -> str | None:
        """Return why `num_bytes` cannot be written: too little free space, or a failed write. None if they can."""
        if self.free_bytes() < num_bytes:
            return f"fewer than {num_bytes} bytes are free"
        try:
            write_atomically(self.folder / "disk-check", b"x")
        except OutputError as error:
            return error.message
        return None

    def remove(self, names: Iterable[str]) -> None:
        """Delete published files and jobs' inputs; ignores those that do not exist."""
        for name in names:
            if PUBLISHED_NAME.fullmatch(name):
                with suppress(OSError):
                    (self.videos / name).unlink(missing_ok=True)

    def remove_older(self, job_id: str, token: int) -> None:
        """Delete files published by attempts with a smaller token, which were killed before their commit.

        If such an attempt still runs, its commit is refused, so its files are never served.
        """
        self.remove_older_of({job_id: token})

    def remove_older_of(self, tokens: Mapping[str, int]) -> None:
        """As `remove_older` for many jobs in one scan of the folder; `tokens` by job id."""
        self.remove(list(older(_names_of(self.videos, tuple(tokens)), tokens)))

    def note_checkpoints(self, job_id: str, keys: Iterable[str]) -> None:
        """Record which of the engine's checkpoints belong to a job, so that `discard_work` deletes them."""
        write_atomically(self._checkpoints_note(job_id), json.dumps(list(keys)).encode())

    def discard_work(self, job_id: str) -> None:
        """Delete a job's work folder and its checkpoints."""
        self._discard_here(job_id)

    def _discard_here(self, job_id: str) -> None:
        self.discard_checkpoints(
            self._noted_checkpoints(job_id)
        )  # first: after a kill in between, the list of them is still there
        shutil.rmtree(self.work_path(job_id).parent, ignore_errors=True)

    def discard_checkpoints(self, keys: Iterable[str]) -> None:
        """Delete the engine's checkpoints with these keys."""
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

    def _link(self, source: Path, target: Path) -> tuple[str, int]:
        """Give a file another name, by a copy if need be; returns that name and its bytes. Raises OutputError."""
        try:
            target.unlink(missing_ok=True)  # left by an earlier try under the same lease
            try:
                os.link(source, target)
                sync_folder(self.videos)
            except OSError:  # a file system without hard links
                with atomic_output(target) as partial:
                    shutil.copyfile(source, partial)
            return target.name, target.stat().st_size
        except OSError as error:
            raise output_error(target, error, "--data-dir") from error

    def _target(self, job_id: str, token: int, index: int, variant: str) -> Path:
        return self.videos / f"{_checked(job_id)}.{token:d}-{index:d}{EXTENSIONS[variant]}"


def older(names: Iterable[str], tokens: Mapping[str, int]) -> Iterator[str]:
    """Return those of the published names whose token is smaller than their job's in `tokens`."""
    for name in names:
        token = tokens.get(name.partition(".")[0])
        match = PUBLISHED_NAME.fullmatch(name)
        if token is not None and match is not None and match["token"] and int(match["token"]) < token:
            yield name


def _input_name(job_id: str) -> str:
    return f"{_checked(job_id)}.{INPUT}"


def _checked(job_id: str) -> str:
    if not is_job_id(job_id):
        raise ValueError("not a job id")
    return job_id


def _names_of(folder: Path, stems: tuple[str, ...]) -> Iterator[str]:
    """Yield names of files `STEM.*` in a folder, one by one: `Path.glob` would read all names into memory."""
    if stems:
        wanted = frozenset(stems)
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.partition(".")[0] in wanted:
                    yield entry.name
