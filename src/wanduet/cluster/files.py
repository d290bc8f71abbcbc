"""Jobs' files where every node can read them: in a folder that all share, or in an object store through fsspec.

    STORAGE/videos/<name>                  published files
    STORAGE/work/<job>/<name>              what an attempt made so far: latents, videos, its result
    STORAGE/work/<job>/checkpoints/<name>  the engine's checkpoints
    STORAGE/work/<job>/embeddings/<name>   what an encoder made of its prompts, ahead of the first attempt
    STORAGE/store-id, STORAGE/trash        see `jobs.places`

The engine writes to its node's own disk as ever. While an attempt runs, what is new is copied to the store; the
next attempt, on whatever node, gets it back. An object appears whole or not at all, and one that an outlived worker
writes late is still a true state of the same job, so no lock is needed: at worst some steps are done again.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from wanduet.cluster.storage_place import StoragePlace
from wanduet.errors import ConfigError, OutputError
from wanduet.jobs.files import PUBLISHED_NAME, JobFiles, older
from wanduet.jobs.records import OutputFile, is_job_id
from wanduet.media.files import PARTIAL_SUFFIX, atomic_output

log = structlog.get_logger(__name__)

LOOK_SECONDS = 1.0  # between two looks at what an attempt has written
TRIES = 3  # of a copy
ABANDONED_SECONDS = 86400.0  # after which a node deletes what a killed attempt left on its own disk
WHOLE_WRITES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "adl", "r2", "oss", "memory"})
_PREVIEW = "preview.webp"
_EMBEDDINGS = "embeddings/"

Stamp = tuple[int, int]  # a file's time and size, to see whether it changed


def open_files(folder: Path, storage: str | None) -> JobFiles:
    """The files of a data folder; with `storage`, what others need of them is kept there too. Raises ConfigError."""
    return JobFiles(folder) if storage is None else StoredFiles(folder, storage)


class StoredFiles(JobFiles):
    """A node's own data folder, with what other nodes need of it in an object store."""

    def __init__(self, folder: Path, storage: str) -> None:
        """Raises ConfigError for an address that fsspec does not know, or whose package is missing."""
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
        self._sent: dict[str, dict[str, Stamp]] = {}  # by running job: what is in the store already
        self._storage = StoragePlace(self._fs, self._root)
        self.places = (*self.places, self._storage)

    # While an attempt runs.

    @contextmanager
    def attempt(self, job_id: str, resume: bool) -> Iterator[None]:
        """Bring what encoders and earlier attempts left; then copy what this one writes, until it ends. Raises nothing
        itself.
        """
        self._remove_abandoned()
        self._sent[job_id] = self._bring(job_id, "" if resume else _EMBEDDINGS)
        stop = threading.Event()
        thread = threading.Thread(target=self._follow, args=(job_id, stop), name=f"store-{job_id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._sent.pop(job_id, None)
            self._discard_here(job_id)  # from this disk only: the store has it, where it is still wanted

    def keep(self, job_id: str) -> bool:
        """Copy the last of an attempt; an error costs the steps since the last copy. Whether all was copied."""
        return self._send(job_id)

    def offer(self, job_id: str, paths: Iterable[Path]) -> None:
        """Put a job's embeddings where its attempts look first; they go with its work. An error costs the encoding."""
        for path in paths:
            try:
                self._put(path, f"work/{job_id}/{_EMBEDDINGS}{path.name}")
            except Exception as error:
                log.warning("not copied to the store", job=job_id, name=path.name, error=type(error).__name__)

    def _follow(self, job_id: str, stop: threading.Event) -> None:
        while not stop.wait(LOOK_SECONDS):
            self._send(job_id)

    def _send(self, job_id: str) -> bool:
        whole = True
        with self._guard:
            sent = self._sent.get(job_id)
            if sent is None:
                return False
            for name, path in self._written(job_id):
                try:
                    about = path.stat()
                    stamp = (about.st_mtime_ns, about.st_size)
                    if sent.get(name) != stamp:
                        self._put(path, f"work/{job_id}/{name}")
                        sent[name] = stamp
                except FileNotFoundError:  # replaced or removed just now
                    continue
                except Exception as error:  # whatever the store's client raises
                    log.warning("not copied to the store", job=job_id, name=name, error=type(error).__name__)
                    whole = False
        return whole

    def _written(self, job_id: str) -> list[tuple[str, Path]]:
        """Names in the store and files of a job, the result last: who has it has all."""
        work = self.work_path(job_id).parent
        found = [(path.name, path) for path in work.glob("*") if path.is_file() and PARTIAL_SUFFIX not in path.name]
        for key in self._keys(job_id):
            paths = (self.folder / "checkpoints").glob(f"{key}.safetensors")
            found += [(f"checkpoints/{path.name}", path) for path in paths]
        return sorted(found, key=lambda one: one[0] == "result.json")

    def _keys(self, job_id: str) -> list[str]:
        try:
            return list(json.loads(self._checkpoints_note(job_id).read_bytes()))
        except (OSError, ValueError):
            return []

    def _bring(self, job_id: str, part: str = "") -> dict[str, Stamp]:
        brought: dict[str, Stamp] = {}
        try:
            for remote in self._storage.list_names(f"work/{job_id}/{part}".rstrip("/"), deep=True):
                name = remote.rpartition(f"work/{job_id}/")[2]
                if name == _PREVIEW or name.endswith(".part"):
                    continue
                shared = name.startswith(("checkpoints/", _EMBEDDINGS))
                folder = self.folder if shared else self.work_path(job_id).parent
                if name.startswith(_EMBEDDINGS) and (folder / name).exists():  # the cache knows the prompt
                    continue
                self._get(remote, folder / name)
                about = (folder / name).stat()
                brought[name] = (about.st_mtime_ns, about.st_size)
        except Exception as error:  # then it begins anew: that costs work, and no job
            log.warning("earlier work cannot be read", job=job_id, error=type(error).__name__)
        return brought

    def _remove_abandoned(self) -> None:
        """Clear this disk of what killed attempts left, which the store has. Another process may run an attempt here:
        then some file of it is younger.
        """
        for path in self.work.iterdir():
            with suppress(OSError):
                newest = max(one.stat().st_mtime for one in (path, *path.iterdir()))
                old = time.time() - newest > ABANDONED_SECONDS
                if old and is_job_id(path.name) and path.name not in self._sent:
                    self._discard_here(path.name)

    # Published files.

    def publish(self, job_id: str, token: int, index: int, source: Path) -> OutputFile:
        """As in a shared folder, and in the store. Raises OutputError."""
        return self._published(super().publish(job_id, token, index, source))

    def publish_bytes(self, job_id: str, token: int, index: int, variant: str, data: bytes) -> OutputFile:
        """As in a shared folder, and in the store. Raises OutputError."""
        return self._published(super().publish_bytes(job_id, token, index, variant, data))

    def _published(self, file: OutputFile) -> OutputFile:
        path = self.videos / file.name
        for left in reversed(range(TRIES)):
            try:
                self._put(path, f"videos/{file.name}")
                break
            except Exception as error:
                if not left:
                    path.unlink(missing_ok=True)
                    raise OutputError(f"{file.name} cannot be stored ({type(error).__name__}).") from error
                time.sleep(LOOK_SECONDS)
        path.unlink(missing_ok=True)  # whoever serves it fetches it
        return file

    def path(self, name: str) -> Path | None:
        """A published file, fetched from the store when it is first asked for; None if it is gone."""
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
        """The picture of what a running job foresees, wherever it runs."""
        found = super().preview(job_id)
        if found is not None:
            return found
        with suppress(Exception):
            data: bytes = self._fs.cat_file(f"{self._root}/work/{job_id}/{_PREVIEW}")
            return data
        return None

    # Deleting.

    def remove(self, names: Iterable[str]) -> None:
        """Delete published files, here and in the store."""
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
        """Delete what attempts left behind, here and in the store."""
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
