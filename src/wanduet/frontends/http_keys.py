"""API keys: random, shown once, kept as hashes. A key's id is the owner of the jobs made with it."""

import hashlib
import hmac
import json
import os
import secrets
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from wanduet.errors import ConfigError
from wanduet.media.files import write_atomically

PREFIX = "wanduet-"
KEYS_FILE = "keys.json"  # in the data folder
LOCAL_OWNER = "local"  # whose jobs they are where no key is asked for


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as it is stored. The key has 256 random bits, so one plain SHA-256 cannot be searched back."""

    id: str
    name: str
    sha256: str


class KeyRing:
    """The keys of a server, in a JSON file that only its user may read. Changes of the file count at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp: tuple[int, int, int] | None = None
        self._records: tuple[KeyRecord, ...] = ()
        self._guard = threading.Lock()

    def add(self, name: str) -> str:
        """Make a key and return it; it cannot be shown again."""
        key = PREFIX + secrets.token_urlsafe(32)
        record = KeyRecord(secrets.token_hex(8), name, _hash(key))
        self._save((*self.records(), record))
        return key

    def remove(self, key_id: str) -> bool:
        """Revoke a key by its id; False if there is none."""
        records = self.records()
        left = tuple(record for record in records if record.id != key_id)
        self._save(left)
        return len(left) < len(records)

    def records(self) -> tuple[KeyRecord, ...]:
        """What is stored now. Raises ConfigError for a damaged file: a server must not open up because of it."""
        with self._guard:
            try:
                status = self._path.stat()
            except FileNotFoundError:
                self._stamp, self._records = None, ()
                return ()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                self._records = self._read()
                self._stamp = stamp
            return self._records

    def owner(self, key: str) -> str | None:
        """Whose key this is. Takes the same time whichever key it is, or none."""
        given = _hash(key)
        found = None
        for record in self.records():
            if hmac.compare_digest(record.sha256, given):
                found = record.id
        return found

    def _read(self) -> tuple[KeyRecord, ...]:
        try:
            return tuple(KeyRecord(**record) for record in json.loads(self._path.read_text("utf-8"))["keys"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError("The file of API keys cannot be read.", hint=f"Repair or remove {self._path}.") from error

    def _save(self, records: tuple[KeyRecord, ...]) -> None:
        self._path.parent.mkdir(0o700, parents=True, exist_ok=True)
        text = json.dumps({"keys": [asdict(record) for record in records]}, indent=1)
        write_atomically(self._path, text.encode())
        with suppress(OSError):  # Windows has no such modes
            os.chmod(self._path, 0o600)


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
