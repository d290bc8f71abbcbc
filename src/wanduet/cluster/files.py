"""Jobs' files where every node can read them: in a shared folder, or in an object store through fsspec.

    STORAGE/videos/<name>                  published files, and the videos that jobs start from
    STORAGE/work/<job>/<name>              an attempt's files so far: latents, videos, its result
    STORAGE/work/<job>/checkpoints/<name>  the engine's checkpoints
    STORAGE/store-id, STORAGE/trash        see `jobs.places`

The engine writes to its node's own disk. While an attempt runs, new files are copied to the store; the next attempt, on
any node, copies them back. An object appears as a whole or not at all, and one that a superseded worker writes late is
still a valid state of the same job. So no lock is needed: at worst some steps are computed again.
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from wanduet.cluster.storage_place import StoragePlace
from wanduet.errors import ConfigError, OutputError
from wanduet.jobs.files import PUBLISHED_NAME, JobFiles, older
from wanduet.jobs.records import INPUT, OutputFile, is_job_id
from wanduet.media.files import PARTIAL_SUFFIX, atomic_output

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0  # between two scans of an attempt's files
TRIES = 3  # for each copy
ABANDONED_SECONDS = 86400.0  # after which a node deletes a killed attempt's files from its own disk
WHOLE_WRITES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "r2", "oss", "memory"})
_PREVIEW = "preview.webp"

Stamp = tuple[int, int]  # a file's modification time and size, to detect changes


def open_files(folder: Path, storage: str | None) -> JobFiles:
    """Return the files of a data folder; `storage` also keeps there what other nodes need. Raises ConfigError."""
    return JobFiles(folder) if storage is None else StoredFiles(folder, storage)


class StoredFiles(JobFiles):
    """A node's data folder, with a copy in an object store of what other nodes need."""

    def __init__(self, folder: Path, storage: str) -> None:
        """Raises ConfigError for an address that fsspec does not support, or whose package is missing."""
        super().__init__(folder)
        try:
            import fsspec

            self._fs, root = fsspec.core.url_to_fs(storage)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"storage={storage!r} cannot be used: {error}", hint="Example: s3://bucket/jobs"
            ) from None
        self._root = root.rstrip("/")
        protocols = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol
        self._whole = bool(WHOLE_WRITES.intersection(protocols))
        self._guard = threading.Lock()
        self._sent: dict[str, dict[str, Stamp]] = {}  # by running job: files that are in the store already
        self._storage = StoragePlace(self._fs, self._root)
        self.places = (*self.places, self._storage)

    # While an attempt runs.

    @contextmanager
    def attempt(self, job_id: str, resume: bool) -> Iterator[None]:
        """Fetch what earlier attempts left; then copy this attempt's files until it ends.

        Raises no error of its own.
        """
        self._remove_abandoned()
        self._sent[job_id] = self._bring(job_id) if resume else {}
        stop = threading.Event()
        thread = threading.Thread(target=self._follow, args=(job_id, stop), name=f"store-{job_id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._sent.pop(job_id, None)
            self._discard_here(job_id)  # only from this disk: the store keeps what is still needed

    def keep(self, job_id: str) -> None:
        """Copy an attempt's last files. An error costs the steps since the last copy."""
        self._send(job_id)

    def _follow(self, job_id: str, stop: threading.Event) -> None:
        while not stop.wait(LOOK_SECONDS):
            self._send(job_id)

    def _send(self, job_id: str) -> None:
        with self._guard:
            sent = self._sent.get(job_id)
            if sent is None:
                return
            for name, path in self._written(job_id):
                try:
                    about = path.stat()
                    stamp = (about.st_mtime_ns, about.st_size)
                    if sent.get(name) != stamp:
                        self._put(path, f"work/{job_id}/{name}")
                        sent[name] = stamp
                except FileNotFoundError:  # replaced or removed meanwhile
                    continue
                except Exception as error:  # the store's client may raise anything
                    log.warning("not copied to the store", job=job_id, name=name, error=type(error).__name__)

    def _written(self, job_id: str) -> list[tuple[str, Path]]:
        """Return names in the store and files of a job, the result last, so that a stored result implies all others."""
        work = self.work_path(job_id).parent
        found = [
            (path.name, path)
            for path in work.glob("*")
            if path.is_file() and path.name != INPUT and PARTIAL_SUFFIX not in path.name
        ]
        for key in self._noted_checkpoints(job_id):
            paths = (self.folder / "checkpoints").glob(f"{key}.safetensors")
            found += [(f"checkpoints/{path.name}", path) for path in paths]
        return sorted(found, key=lambda one: one[0] == "result.json")

    def _bring(self, job_id: str) -> dict[str, Stamp]:
        brought: dict[str, Stamp] = {}
        try:
            for remote in self._storage.list_names(f"work/{job_id}", deep=True):
                name = remote.rpartition(f"work/{job_id}/")[2]
                if name == _PREVIEW or name.endswith(".part"):
                    continue
                folder = self.folder if name.startswith("checkpoints/") else self.work_path(job_id).parent
                self._get(remote, folder / name)
                about = (folder / name).stat()
                brought[name] = (about.st_mtime_ns, about.st_size)
        except Exception as error:  # the attempt starts from the beginning, which costs only work
            log.warning("earlier work cannot be read", job=job_id, error=type(error).__name__)
        return brought

    def _remove_abandoned(self) -> None:
        """Delete killed attempts' files, which the store has, from this disk.

        Files that are younger than ABANDONED_SECONDS may belong to an attempt of another process.
        """
        for path in self.work.iterdir():
            with suppress(OSError):
                newest = max(one.stat().st_mtime for one in (path, *path.iterdir()))
                old = time.time() - newest > ABANDONED_SECONDS
                if old and is_job_id(path.name) and path.name not in self._sent:
                    self._discard_here(path.name)

    # Published files.

    def publish(self, job_id: str, token: int, index: int, source: Path) -> OutputFile:
        """Publish locally and to the store. Raises OutputError."""
        return self._published(super().publish(job_id, token, index, source))

    def publish_bytes(self, job_id: str, token: int, index: int, variant: str, data: bytes) -> OutputFile:
        """Publish locally and to the store. Raises OutputError."""
        return self._published(super().publish_bytes(job_id, token, index, variant, data))

    def add_input(self, job_id: str, source: Path) -> OutputFile:
        """Store locally and in the store. Raises OutputError."""
        return self._published(super().add_input(job_id, source))

    def bring_input(self, job_id: str) -> Path | None:
        """Fetch the input into the attempt's folder, which is deleted from this disk at its end; None if it is missing.

        Raises what the store's client raises after some tries.
        """
        path = self.work_path(job_id).with_name(INPUT)
        try:
            _try_again(lambda: self._get(f"{self._root}/videos/{job_id}.{INPUT}", path))
        except FileNotFoundError:
            return None
        return path

    def _published(self, file: OutputFile) -> OutputFile:
        path = self.videos / file.name
        try:
            _try_again(lambda: self._put(path, f"videos/{file.name}"))
        except Exception as error:
            raise OutputError(f"{file.name} cannot be stored ({type(error).__name__}).") from error
        finally:
            path.unlink(missing_ok=True)  # the process that serves it fetches it
        return file

    def path(self, name: str) -> Path | None:
        """Return a published file, fetched from the store at first use; None if it does not exist."""
        found = super().path(name)
        if found is not None or PUBLISHED_NAME.fullmatch(name) is None:
            return found
        try:
            self._get(f"{self._root}/videos/{name}", self.videos / name)
        except Exception as error:
            if not isinstance(error, FileNotFoundError):
                log.warning("the store cannot be read", error=type(error).__name__)
            return None
        return super().path(name)

    def preview(self, job_id: str) -> bytes | None:
        """Return a running job's preview, on whatever node it runs."""
        found = super().preview(job_id)
        if found is not None:
            return found
        with suppress(Exception):
            data: bytes = self._fs.cat_file(f"{self._root}/work/{job_id}/{_PREVIEW}")
            return data
        return None

    # Deleting.

    def remove(self, names: Iterable[str]) -> None:
        """Delete published files and jobs' inputs, here and in the store."""
        found = list(names)
        super().remove(found)
        for name in found:
            if PUBLISHED_NAME.fullmatch(name):
                self._storage.delete(f"videos/{name}")

    def remove_older_of(self, tokens: Mapping[str, int]) -> None:
        """Delete what earlier, killed attempts published, here and in the store."""
        super().remove_older_of(tokens)
        with suppress(Exception):
            names = (remote.rpartition("/")[2] for remote in self._storage.list_names("videos")) if tokens else ()
            for name in older(names, tokens):
                self._storage.delete(f"videos/{name}")

    def discard_work(self, job_id: str) -> None:
        """Delete attempts' work files, here and in the store."""
        with self._guard:
            self._sent.pop(job_id, None)
        self._discard_here(job_id)
        self._storage.delete(f"work/{job_id}")

    # The store.

    def _put(self, path: Path, name: str) -> None:
        target = f"{self._root}/{name}"
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        if self._whole:
            self._fs.put_file(str(path), target)
            return
        partial = f"{target}.{threading.get_ident()}.part"
        self._fs.put_file(str(path), partial)
        self._fs.mv(partial, target)

    def _get(self, remote: str, path: Path) -> None:
        with atomic_output(path) as partial:
            self._fs.get_file(remote, str(partial))


def _try_again(copy: Callable[[], object]) -> None:
    """Copy a file, up to TRIES times: the store's client may raise anything for a moment. A missing file stays missing."""
    for _ in range(TRIES - 1):
        try:
            copy()
            return
        except FileNotFoundError:
            raise
        except Exception:
            time.sleep(LOOK_SECONDS)
    copy()
