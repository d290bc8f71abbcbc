import os
import time
from pathlib import Path

import pytest

from wanduet.errors import OutputError
from wanduet.media import files
from wanduet.media.files import atomic_output, check_place, check_writable, write_atomically


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_success_replaces_and_leaves_nothing_else(tmp_path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with atomic_output(path) as partial:
        assert partial.parent == path.parent
        assert partial.name.startswith("a.mp4.")
        assert partial.name.endswith(".partial")
        partial.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_failure_keeps_the_old_file(tmp_path, error) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def work() -> None:
        with atomic_output(path) as partial:
            partial.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        work()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.mp4"]


def test_bytes_and_name_are_synced_in_order(tmp_path, monkeypatch) -> None:
    """The data before the rename, the folder after it: the order in which a power cut does no harm."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(_kind(fd)), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    write_atomically(tmp_path / "a", b"x")
    assert done == ["file", "replace", "folder"]
    done.clear()
    write_atomically(tmp_path / "new" / "deep" / "a", b"x")
    assert done == ["folder", "folder", "file", "replace", "folder"]


def _kind(fd: int) -> str:
    return "folder" if Path(f"/proc/self/fd/{fd}").resolve().is_dir() else "file"


def test_two_writers_of_one_path_do_not_meet(tmp_path) -> None:
    path = tmp_path / "a"
    with atomic_output(path) as one:
        with atomic_output(path) as two:
            assert one != two
            one.write_bytes(b"one")
            two.write_bytes(b"two")
        assert path.read_bytes() == b"two"
    assert path.read_bytes() == b"one"
    assert names(tmp_path) == ["a"]


def test_a_dead_writers_partial_file_goes_but_a_live_ones_stays(tmp_path) -> None:
    path = tmp_path / "a.mp4"
    long_ago = time.time() - 1000
    dead, fresh, other = (tmp_path / n for n in ("a.mp4.00000000.partial", "a.mp4.11111111.partial", "b.mp4.2.partial"))
    for file in (dead, fresh, other):
        file.write_bytes(b"half")
    os.utime(dead, (long_ago, long_ago))
    os.utime(other, (long_ago, long_ago))
    with atomic_output(path) as live:
        os.utime(live, (long_ago, long_ago))
        write_atomically(path, b"x")
        assert live.exists()
        assert not dead.exists()
    assert names(tmp_path) == ["a.mp4", fresh.name, other.name]


def test_lost_partial_file_is_an_output_error(tmp_path) -> None:
    def work() -> None:
        with atomic_output(tmp_path / "a") as partial:
            partial.unlink()

    with pytest.raises(OutputError, match="Cannot write"):
        work()


def test_umask_is_obeyed(tmp_path) -> None:
    old = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", b"x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_check_writable_creates_the_folder_and_no_file(tmp_path) -> None:
    check_writable(tmp_path / "outputs" / "today" / "a.mp4", 1000)
    assert names(tmp_path / "outputs" / "today") == []
    (tmp_path / "a.mp4").write_bytes(b"old")
    check_writable(tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == b"old"


def test_a_relative_path_works(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_writable(Path("a.mp4"))
    write_atomically(Path("a.mp4"), b"x")
    assert names(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "it is a folder"),
        ("file/a.mp4", "file is a file, not a folder"),
        ("file/deep/a.mp4", "file is a file, not a folder"),
        ("x" * 300 + ".mp4", "the name is too long"),
        ("nul\0.mp4", "the name is not valid"),
    ],
)
def test_impossible_places_are_refused_before_and_while_writing(tmp_path, name, message) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=message):
        check_writable(tmp_path / name)
    with pytest.raises(OutputError, match=message):
        write_atomically(tmp_path / name, b"x")
    assert names(tmp_path) == ["file", "folder"]


def test_a_path_without_a_name_is_refused() -> None:
    with pytest.raises(OutputError, match="it is a folder"):
        check_writable(Path())


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="no device files")
def test_devices_are_never_replaced() -> None:
    with pytest.raises(OutputError, match="it is a device"):
        check_writable(Path("/dev/null"))
    with pytest.raises(OutputError, match="it is a device"):
        write_atomically(Path("/dev/null"), b"x")
    assert Path("/dev/null").is_char_device()


def test_write_protected_file_is_kept(tmp_path, monkeypatch) -> None:
    """As root permissions do not bind, so the answer of the system is put in place."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda p, mode: Path(p) != path)
    with pytest.raises(OutputError, match="write-protected"):
        check_writable(path)


@pytest.mark.parametrize(
    ("error", "message"), [(PermissionError(13, "no"), "permission denied"), (OSError(30, "ro"), "read-only")]
)
def test_read_only_folder(tmp_path, monkeypatch, error, message) -> None:
    def refuse(*_args) -> int:
        raise error

    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(OutputError, match=message):
        check_writable(tmp_path / "a.mp4")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind root")
def test_read_only_folder_for_real(tmp_path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="permission denied"):
            check_writable(tmp_path / "a.mp4")
    finally:
        tmp_path.chmod(0o700)


def test_too_little_space_is_refused_before_a_folder_is_made(tmp_path) -> None:
    with pytest.raises(OutputError, match=r"this needs 9094947\.02 GiB, the disk has .* free"):
        check_writable(tmp_path / "new" / "a.mp4", 9765625 * 10**9)
    assert names(tmp_path) == []


def test_longest_legal_name_can_be_written(tmp_path) -> None:
    path = tmp_path / ("字" * 83 + ".mp4")  # 253 bytes
    check_writable(path)
    write_atomically(path, b"x")
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize(
    "name", ["12:30.mp4", "a?.mp4", "clip.mp4.", "clip ", "nul.mp4", "out/COM1.txt/x.mp4", "a\tb.mp4"]
)
def test_names_that_windows_cannot_hold_are_refused_there(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="Windows"):
        check_place(Path(name), windows=True)
    check_place(Path(name), windows=False)


def test_names_that_windows_holds(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("clip.mp4", "../out/clip.mp4", ".hidden.mp4", "connect.mp4", "-x.mp4"):
        check_place(Path(name), windows=True)
