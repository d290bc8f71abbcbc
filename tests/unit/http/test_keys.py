"""API keys changed by several processes at once, and what a server sees of it."""

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from wanduet.doors.http import keys as http_keys
from wanduet.doors.http.keys import KeyRing
from wanduet.errors import ConfigError

PROGRAM = """
import sys
from pathlib import Path
from wanduet.doors.http.keys import KeyRing
keys = KeyRing(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for number in range(5):
    keys.add(f"{sys.argv[2]}-{number}")
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_keys_made_at_the_same_time_by_several_processes_are_all_kept(path: Path) -> None:
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, path, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in "abcdefgh"
    ]
    for maker in makers:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("go\n")
        maker.stdin.flush()
    for maker in makers:
        maker.communicate(timeout=60)
        assert maker.returncode == 0
    assert sorted(record.name for record in KeyRing(path).records()) == [
        f"{a}-{i}" for a in "abcdefgh" for i in range(5)
    ]


def test_a_key_revoked_while_another_is_made_stays_revoked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    revoked = KeyRing(path).add("stolen")
    stolen = KeyRing(path).owner(revoked)
    assert stolen is not None
    read, go_on = threading.Event(), threading.Event()
    save = KeyRing._save

    def slow(self: KeyRing, records: Any) -> None:
        if not read.is_set():  # the addition, which has read the file that still holds the key
            read.set()
            assert go_on.wait(60)
        save(self, records)

    monkeypatch.setattr(KeyRing, "_save", slow)
    made: list[str] = []
    adding = threading.Thread(target=lambda: made.append(KeyRing(path).add("new")))
    removing = threading.Thread(target=lambda: KeyRing(path).remove(stolen))
    adding.start()
    assert read.wait(60)
    removing.start()
    removing.join(0.2)  # without a lock it ends here, and the addition then brings the key back
    go_on.set()
    for thread in (adding, removing):
        thread.join(60)
    keys = KeyRing(path)
    assert keys.owner(revoked) is None
    assert keys.owner(made[0]) is not None


def test_a_change_that_never_ends_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_keys, "LOCK_SECONDS", 0.05)
    keys = KeyRing(path)
    with keys._changing(), pytest.raises(ConfigError, match="Another process"):
        KeyRing(path).add("b")
    assert keys.records() == ()


def test_changes_are_seen_though_the_file_has_the_same_time_and_size(path: Path) -> None:
    server, other = KeyRing(path), KeyRing(path)
    first = other.add("a")
    assert server.owner(first) is not None
    before = path.stat()
    content = path.read_text().replace(str(server.owner(first)), "0" * 16)
    path.write_text(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert server.owner(first) == "0" * 16


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_nobody_else_may_read_the_file_at_any_moment(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    replace = os.replace

    def look(source: Any, target: Any) -> None:
        modes.append(stat.S_IMODE(os.stat(source).st_mode))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    KeyRing(path).add("a")
    path.chmod(0o644)
    KeyRing(path).add("b")
    assert modes == [0o600, 0o600]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"keys": [{"id": 1, "name": "a", "sha256": "b"}]}', '{"keys": [[]]}', "[" * 100_000]
)
def test_a_damaged_file_is_never_written_over(path: Path, content: str) -> None:
    path.write_text(content)
    for change in (KeyRing(path).records, lambda: KeyRing(path).add("a"), lambda: KeyRing(path).remove("1")):
        with pytest.raises(ConfigError, match="keys"):
            change()
    assert path.read_text() == content
