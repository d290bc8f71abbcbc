"""Folders are made with those above them, but not in the place of one that is gone; files get others' names."""

import os
import stat
import sys
import time
from pathlib import Path

import pytest

from wanduet.errors import OutputError
from wanduet.folders import REPLACE_ATTEMPTS, make_folder, never_make, replace_file
from wanduet.media.files import write_atomically


def test_only_the_folder_itself_gets_the_mode(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b", 0o700)
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) != 0o700
    make_folder(tmp_path / "a" / "b")
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_a_file_in_its_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(OSError, match=r"exists|directory"):
            make_folder(folder)


def test_nothing_is_made_in_the_place_of_a_folder_that_is_gone(tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_folder(data)
    never_make(data)
    make_folder(data / "work")
    data.rename(tmp_path / "moved")
    with pytest.raises(OutputError, match="was moved or removed while it was in use"):
        write_atomically(data / "work" / "job" / "file", b"x")
    assert not data.exists()
    (tmp_path / "moved").rename(data)
    write_atomically(data / "work" / "job" / "file", b"x")


@pytest.mark.parametrize(
    ("platform", "refusals", "replaced"),
    [("win32", 3, True), ("win32", REPLACE_ATTEMPTS, False), ("linux", 1, False)],
)
def test_a_file_that_is_open_elsewhere_is_waited_for_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, refusals: int, replaced: bool
) -> None:
    source, target = tmp_path / "new", tmp_path / "old"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    replace, left = os.replace, [PermissionError(13, "Access is denied")] * refusals

    def refuse_at_first(*names: Path) -> None:
        if left:
            raise left.pop()
        replace(*names)

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "replace", refuse_at_first)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    if replaced:
        replace_file(source, target)
    else:
        with pytest.raises(PermissionError):
            replace_file(source, target)
    assert target.read_bytes() == (b"new" if replaced else b"old")
