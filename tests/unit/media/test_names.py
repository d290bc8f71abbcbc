"""Names for outputs: made up, and taken so that no two programs write one file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from wanduet.errors import OutputError
from wanduet.media import names as names_module
from wanduet.media.names import is_taken, names_for, slugify, take, take_given


@pytest.mark.parametrize(
    ("prompt", "slug"),
    [
        ("A red circle, moving left!", "a-red-circle-moving-left"),
        ("  ../../etc/passwd", "etc-passwd"),
        ("一只猫 在草地上", "一只猫-在草地上"),
        ("Füße", "füße"),
        ("!!!", "video"),
        ("", "video"),
        ("CON", "con-video"),
        ("com1", "com1-video"),
        ("x" * 500, "x" * 64),
        ("\ud800 broken", "broken"),
    ],
)
def test_slug(prompt, slug) -> None:
    assert slugify(prompt) == slug


def test_slug_is_short_and_ends_with_a_whole_word() -> None:
    slug = slugify("the quick brown fox jumps over the lazy dog and then it runs away from everything")
    assert slug == "the-quick-brown-fox-jumps-over-the-lazy-dog-and-then-it-runs"
    assert len(slugify("猫" * 100).encode()) <= 64


def test_names_count_up(tmp_path) -> None:
    names = names_for(tmp_path, "A cat", ".mkv")
    assert [next(names).name for _ in range(3)] == ["a-cat.mkv", "a-cat-2.mkv", "a-cat-3.mkv"]


def test_a_taken_name_is_nobody_elses_until_it_is_given_back(tmp_path) -> None:
    path = tmp_path / "new" / "a.mp4"
    with take_given([path]):
        assert is_taken(path)
        assert take([path]) is None
        assert take([tmp_path / "new" / "b.mp4", path]) is None
        assert not is_taken(tmp_path / "new" / "b.mp4")  # all or none
        with pytest.raises(OutputError, match="another run of wanduet is writing it"):
            take_given([path])
        assert not path.exists()
    assert list(path.parent.iterdir()) == []
    again = take([path])
    assert again is not None
    again.release()
    again.release()


def test_long_names_that_begin_alike_are_two(tmp_path) -> None:
    one, two = tmp_path / f"{'x' * 250}1.mp4", tmp_path / f"{'x' * 250}2.mp4"
    with take_given([one]), take_given([two]):
        assert take([one]) is None


# Takes the first free name, says so, and waits to be told to end.
OWNER = """
import os, sys
from pathlib import Path
from wanduet.media.names import names_for, take
for path in names_for(Path(sys.argv[1]), "a cat"):
    if not path.exists() and (names := take([path])) is not None:
        break
print(path.name, flush=True)
if sys.stdin.readline().strip() == "write":
    path.write_bytes(b"a video")
    names.release()
"""


def owner(folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", OWNER, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def chosen(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_as_many_names_as_programs_at_the_same_time(tmp_path) -> None:
    processes = [owner(tmp_path) for _ in range(8)]
    found = [chosen(process) for process in processes]
    assert len(set(found)) == 8
    for process in processes:
        process.communicate("write\n", timeout=60)
    assert sorted(found) == sorted(os.listdir(tmp_path))


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_killed_owner_keeps_no_name(tmp_path, monkeypatch: pytest.MonkeyPatch, has_locks: bool) -> None:
    path = tmp_path / "a-cat.mp4"
    code = OWNER
    if not has_locks:  # the mark then says whose it is
        monkeypatch.setattr(names_module, "FileLock", names_module.SoftFileLock)
        code = "import filelock; filelock.FileLock = filelock.SoftFileLock\n" + OWNER
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert chosen(process) == path.name
        assert take([path]) is None
        process.kill()
        process.wait()
    assert is_taken(path)  # what it has left is in nobody's way
    with take_given([path]):
        assert take([path]) is None
    assert list(tmp_path.iterdir()) == []
