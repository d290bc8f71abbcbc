"""Files and folders that `--output` can name."""

from pathlib import Path

import pytest

from wanduet.doors.cli.places import parse_place


def test_what_is_a_folder(tmp_path: Path) -> None:
    for text in (str(tmp_path), "", ".", "..", "videos/", f"{tmp_path}/new/", "videos/.."):
        assert parse_place(text).is_folder
    for text in (str(tmp_path / "clip.mp4"), "clip", "x" * 5000, "nul\0"):
        assert not parse_place(text).is_folder


def test_a_path_is_shown_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = parse_place("a/clip.mp4")
    assert place.path == tmp_path / "a" / "clip.mp4"
    assert place.shown(place.path) == str(Path("a/clip.mp4"))
    assert place.shown(tmp_path / "clip.mp4") == str(tmp_path / "clip.mp4")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    assert place.shown(place.path) == str(place.path)
