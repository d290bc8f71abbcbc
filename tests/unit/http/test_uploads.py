"""Videos that people send: whatever is in them, the server lives and says what is wrong."""

import errno
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from wanduet.doors.http.errors import ApiError
from wanduet.doors.http.uploads import MAX_ANSWER_BYTES, MetadataReader, SourceReader
from wanduet.errors import InvalidRequestError, WanduetError
from wanduet.media.files import UnreadableFileError
from wanduet.media.video import write_video

ABOUT = {"request": {"prompt": "a fox"}, "seed": 7}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("uploads") / "video.mp4"
    write_video([np.zeros((5, 32, 32, 3), np.uint8)], path, metadata=ABOUT)
    return path.read_bytes()


def test_what_made_a_video_is_read(tmp_path: Path, video: bytes) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    assert MetadataReader().read(path) == ABOUT


def test_what_a_request_starts_from_is_read(tmp_path: Path, video: bytes) -> None:
    path = tmp_path / "0123"
    path.write_bytes(video)
    found = SourceReader().read(path, "input_video", "clip.mp4")
    assert (found.height, found.width, found.sha256) == (32, 32, hashlib.sha256(video).hexdigest())
    assert found.seconds == pytest.approx(5 / 16)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    with pytest.raises(InvalidRequestError, match=r"fox\.png.*picture; image to video needs another model") as refused:
        SourceReader().read(path, "input_reference", "fox.png")
    assert refused.value.field == "input_reference"
    assert path.name not in str(refused.value)


@pytest.mark.parametrize(
    "answer",
    ["{'source': {}}", "{'source': 3}", "{}", "{'source': {'sha256': '', 'height': -1, 'width': 1, 'seconds': 1}}",
     "{'source': {'sha256': '', 'height': 'x', 'width': 1, 'seconds': 1}}"],
)  # fmt: skip
def test_a_parser_that_is_taken_over_says_nothing_impossible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    name = program(tmp_path, "hostile_parser", f"import json\nprint(json.dumps({answer}))", monkeypatch)
    with pytest.raises(InvalidRequestError, match=r"clip\.mp4"):
        SourceReader(module=name).read(tmp_path / "video", "input_video", "clip.mp4")


def test_damaged_files_are_told_apart_from_none(tmp_path: Path, video: bytes) -> None:
    dice = random.Random(0)
    path = tmp_path / "video.mp4"
    for content in (b"", b"x" * 1000, video[:200], bytes(dice.randrange(256) for _ in range(5000))):
        path.write_bytes(content)
        with pytest.raises(UnreadableFileError, match=r"read|no video|not a video|is empty|cut off"):
            MetadataReader().read(path)
    path.unlink()
    with pytest.raises(UnreadableFileError):
        MetadataReader().read(path)


def program(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A parser that does as it is told."""
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return name


@pytest.mark.skipif(os.name != "posix", reason="POSIX signals and limits")
@pytest.mark.parametrize(
    "deed",
    [
        f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})",
        "print('{\"about\": {')",
        "print('[1]')",
        "print('{\"about\": 3}')",
        "print('[' * 100000)",
        "raise SystemExit(3)",
        f"print('x' * {2 * MAX_ANSWER_BYTES})",
    ],
)
def test_a_parser_that_dies_or_talks_nonsense_is_an_unreadable_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deed: str
) -> None:
    name = program(tmp_path, "broken_parser", deed, monkeypatch)
    with pytest.raises(UnreadableFileError, match="damaged"):
        MetadataReader(module=name).read(tmp_path / "video.mp4")


def test_a_parser_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import os, sys, time\nopen(sys.argv[1], 'w').write(str(os.getpid()))\ntime.sleep(10000)"
    name = program(tmp_path, "hanging_parser", text, monkeypatch)
    path = tmp_path / "video.mp4"
    with pytest.raises(WanduetError, match="too long"):
        MetadataReader(timeout_seconds=2.0, module=name).read(path)
    if sys.platform == "linux" and path.exists() and (pid := path.read_text()):  # it had come so far
        assert not Path(f"/proc/{pid}").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("greed", ["b'x' * 2**33", "open('big', 'wb').write(b'x' * 2**22)"])
def test_a_parser_that_wants_too_much_gets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, greed: str) -> None:
    text = (
        "import sys\nfrom wanduet.doors.http import uploads as http_uploads\nfrom wanduet.media import read\n"
        f"def greedy(path):\n    return {{'size': len(str({greed}))}}\n"
        "read.read_metadata = greedy\nhttp_uploads.main()\n"
    )
    name = program(tmp_path, "greedy_parser", text, monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnreadableFileError, match="damaged"):
        MetadataReader(module=name).read(tmp_path / "video.mp4")


def test_no_secret_of_the_environment_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    text = "import json, os\nprint(json.dumps({'about': dict(os.environ)}))"
    name = program(tmp_path, "telling_parser", text, monkeypatch)
    assert "HF_TOKEN" not in MetadataReader(module=name).read(tmp_path / "video.mp4")


def test_programs_of_the_folder_where_the_server_runs_are_not_run(
    tmp_path: Path, video: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    for name in ("json", "av", "wanduet"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert MetadataReader().read(path) == ABOUT
    assert not (tmp_path / "ran").exists()


def test_a_process_that_cannot_be_started_is_no_fault_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(ApiError) as refused:
        MetadataReader().read(tmp_path / "video.mp4")
    assert (refused.value.status, refused.value.code) == (503, "overloaded")


@pytest.mark.skipif(os.name != "posix", reason="POSIX paths")
def test_a_full_folder_for_temporary_files_does_not_spoil_reading(
    tmp_path: Path, video: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert MetadataReader().read(path) == ABOUT


def test_what_lies_in_the_folder_of_the_server_is_not_executed(
    tmp_path: Path, video: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, mark = tmp_path / "folder", tmp_path / "executed"
    folder.mkdir()
    for name in ("json", "av", "numpy", "structlog", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write({name!r})\nraise SystemExit(9)\n")
    path = tmp_path / "video.mp4"
    path.write_bytes(video)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", "") + os.pathsep)  # an empty entry: this folder
    assert MetadataReader().read(path) == ABOUT
    assert not mark.exists()
