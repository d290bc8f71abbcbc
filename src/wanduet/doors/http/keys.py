"""API keys: random, shown once, stored as hashes. A key's id is the owner of the jobs made with it."""

import hashlib
import hmac
import json
import os
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from wanduet.errors import ConfigError
from wanduet.media.files import atomic_output, output_error

PREFIX = "wanduet-"
KEYS_FILE = "keys.json"  # in the data folder
LOCK_SECONDS = 30.0  # how long a change of the key file waits for the lock
LOCAL_OWNER = "local"  # the owner of all jobs where no key is required


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A stored key. It has 256 random bits, so a single SHA-256 is enough to store it safely.

    `operator` allows the key to read the metrics of the whole server; it gives no access to other owners' videos.
    """

    id: str
    name: str
    sha256: str
    operator: bool = False


class KeyRing:
    """The keys of a server, in a JSON file that only its user may read. Changes of the file take effect at once.

    Several processes may change it at the same time: each reads, changes and writes under a file lock.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: bytes | None = None
        self._records: tuple[KeyRecord, ...] = ()
        self._guard = threading.Lock()

    def add(self, name: str, *, operator: bool = False) -> str:
        """Create a key and return it; it cannot be shown again. Raises ConfigError or OutputError."""
        key = PREFIX + secrets.token_urlsafe(32)
        record = KeyRecord(secrets.token_hex(8), name, _hash(key), operator)
        with self._changing():
            self._save((*self.records(), record))
        return key

    def remove(self, key_id: str) -> bool:
        """Revoke a key by its id; return False if there is none. Raises ConfigError or OutputError."""
        with self._changing():
            records = self.records()
            left = tuple(record for record in records if record.id != key_id)
            if len(left) < len(records):
                self._save(left)
            return len(left) < len(records)

    def records(self) -> tuple[KeyRecord, ...]:
        """Return the stored keys. Raises ConfigError for a damaged file, which must not make the server open."""
        with self._guard:
            try:
                # Compare the bytes, not the modification time: two quick changes may have the same time.
                content = self._path.read_bytes()
            except FileNotFoundError:
                self._content, self._records = None, ()
                return ()
            except OSError as error:
                raise self._unreadable(str(error.strerror)) from error
            if content != self._content:
                self._records = self._parse(content)
                self._content = content
            return self._records

    def owner(self, key: str) -> str | None:
        """Return the owner of a key, or None. Runs in constant time, whether or not the key is valid."""
        given = _hash(key).encode()
        found = None
        for record in self.records():
            if hmac.compare_digest(record.sha256.encode(), given):
                found = record.id
        return found

    def is_operator(self, owner: str) -> bool:
        """Return whether an owner may see the whole server's metrics: an operator, or anybody if no key is required."""
        return owner == LOCAL_OWNER or any(record.operator for record in self.records() if record.id == owner)

    def _parse(self, content: bytes) -> tuple[KeyRecord, ...]:
        try:
            return tuple(map(_record, json.loads(content)["keys"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._unreadable("it is damaged") from error

    def _unreadable(self, reason: str) -> ConfigError:
        return ConfigError(f"The file of API keys cannot be read: {reason}.", hint=f"Repair or remove {self._path}.")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Lock the key file against changes by other processes."""
        try:
            self._path.parent.mkdir(0o700, parents=True, exist_ok=True)
            with FileLock(f"{self._path}.lock", timeout=LOCK_SECONDS, mode=0o600):
                yield
        except Timeout:
            text = f"Another process has been changing the API keys for {LOCK_SECONDS:g} s."
            raise ConfigError(text, hint="Try again, or end that process.") from None
        except OSError as error:
            raise output_error(self._path, error, "--data-dir") from error

    def _save(self, records: tuple[KeyRecord, ...]) -> None:
        text = json.dumps({"keys": [asdict(record) for record in records]}, indent=1)
        with atomic_output(self._path) as partial:
            with suppress(OSError):  # Windows has no such modes
                os.chmod(partial, 0o600)  # before anything is written to it
            partial.write_text(text, "utf-8")


def _record(stored: dict[str, Any]) -> KeyRecord:
    record = KeyRecord(**stored)
    if [type(value) for value in asdict(record).values()] != [str, str, str, bool]:
        raise TypeError("a key's id, name and hash are texts")
    return record


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def came_encrypted(headers: Mapping[str, str], scheme: str) -> bool:
    """Return whether a browser sent a request over TLS, to this server or to a proxy in front of it.

    Forging the header is harmless: the result only decides whether the sender's own cookie is made `Secure`.
    """
    forwarded = re.search(r"(?:^|[;,\s])proto=\"?(\w+)", headers.get("forwarded", ""), re.IGNORECASE)
    first = headers.get("x-forwarded-proto", "").partition(",")[0].strip()
    page = headers.get("origin", "").partition("://")[0]
    return "https" in (scheme, first.lower(), page.lower(), forwarded[1].lower() if forwarded else "")
