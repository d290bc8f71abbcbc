"""API keys: random, shown once, kept as hashes. A key's id is the owner of the jobs made with it."""

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
LOCK_SECONDS = 30.0  # how long a change of the keys waits for another one
LOCAL_OWNER = "local"  # whose jobs they are where no key is asked for


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as it is stored. The key has 256 random bits, so one plain SHA-256 cannot be searched back.

    An `operator`'s key sees the metrics of the whole server; its videos are its own, as with any key.
    """

    id: str
    name: str
    sha256: str
    operator: bool = False


class KeyRing:
    """The keys of a server, in a JSON file that only its user may read. Changes of the file count at once, and
    several processes may make them at the same time: each reads, changes and writes under a lock.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: bytes | None = None
        self._records: tuple[KeyRecord, ...] = ()
        self._guard = threading.Lock()

    def add(self, name: str, *, operator: bool = False) -> str:
        """Make a key and return it; it cannot be shown again. Raises ConfigError or OutputError."""
        key = PREFIX + secrets.token_urlsafe(32)
        record = KeyRecord(secrets.token_hex(8), name, _hash(key), operator)
        with self._changing():
            self._save((*self.records(), record))
        return key

    def remove(self, key_id: str) -> bool:
        """Revoke a key by its id; False if there is none. Raises ConfigError or OutputError."""
        with self._changing():
            records = self.records()
            left = tuple(record for record in records if record.id != key_id)
            if len(left) < len(records):
                self._save(left)
            return len(left) < len(records)

    def records(self) -> tuple[KeyRecord, ...]:
        """What is stored now. Raises ConfigError for a damaged file: a server must not open up because of it."""
        with self._guard:
            try:
                # Its bytes are compared, not its time: a quick change after another one may have the same time.
                content = self._path.read_bytes()
            except FileNotFoundError:
                self._content, self._records = None, ()
                return ()
            except OSError as error:
                raise self._unreadable() from error
            if content != self._content:
                self._records = self._parse(content)
                self._content = content
            return self._records

    def owner(self, key: str) -> str | None:
        """Whose key this is. Takes the same time whichever key it is, or none."""
        given = _hash(key).encode()
        found = None
        for record in self.records():
            if hmac.compare_digest(record.sha256.encode(), given):
                found = record.id
        return found

    def is_operator(self, owner: str) -> bool:
        """Whether an owner may see what concerns everybody: the key of an operator, or whoever needs none."""
        return owner == LOCAL_OWNER or any(record.operator for record in self.records() if record.id == owner)

    def _parse(self, content: bytes) -> tuple[KeyRecord, ...]:
        try:
            return tuple(map(_record, json.loads(content)["keys"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._unreadable() from error

    def _unreadable(self) -> ConfigError:
        return ConfigError("The file of API keys cannot be read.", hint=f"Repair or remove {self._path}.")

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Keep other processes from changing the file meanwhile."""
        try:
            self._path.parent.mkdir(0o700, parents=True, exist_ok=True)
            with FileLock(f"{self._path}.lock", timeout=LOCK_SECONDS, mode=0o600):
                yield
        except Timeout:
            text = f"Another process has been changing the API keys for {LOCK_SECONDS:g} s."
            raise ConfigError(text, hint="Try again, or end that process.") from None
        except OSError as error:
            raise output_error(self._path, error) from error

    def _save(self, records: tuple[KeyRecord, ...]) -> None:
        text = json.dumps({"keys": [asdict(record) for record in records]}, indent=1)
        with atomic_output(self._path) as partial:
            with suppress(OSError):  # Windows has no such modes
                os.chmod(partial, 0o600)  # before anything is in it
            partial.write_text(text, "utf-8")


def _record(stored: dict[str, Any]) -> KeyRecord:
    record = KeyRecord(**stored)
    if [type(value) for value in asdict(record).values()] != [str, str, str, bool]:
        raise TypeError("a key's id, name and hash are texts")
    return record


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def came_encrypted(headers: Mapping[str, str], scheme: str) -> bool:
    """Whether a browser sent a request over TLS, to this server or to a proxy in front of it.

    Nobody is trusted by this: it can only make a cookie stricter, and who sends such a header sends it for themselves.
    """
    forwarded = re.search(r"(?:^|[;,\s])proto=\"?(\w+)", headers.get("forwarded", ""), re.IGNORECASE)
    first = headers.get("x-forwarded-proto", "").partition(",")[0].strip()
    page = headers.get("origin", "").partition("://")[0]
    return "https" in (scheme, first.lower(), page.lower(), forwarded[1].lower() if forwarded else "")
