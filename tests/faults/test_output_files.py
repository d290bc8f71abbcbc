"""Outputs under attack: killed writers, full disks, failing system calls.

What stands under the final name is always the old file or the whole new one.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.forked import start_program
from wanduet.errors import OutputError
from wanduet.media import video as video_module
from wanduet.media.files import STALE_SECONDS, write_atomically
from wanduet.media.latents import save_latents
from wanduet.media.read import frame_hashes, probe, read_metadata
from wanduet.media.video import VideoSpec, VideoWriter, write_video

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and limits")
NUM_FRAMES = 12


def frames(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (NUM_FRAMES, 64, 96, 3), dtype=np.uint8)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def is_whole(path: Path) -> bool:
    return len(frame_hashes(path).frames) == NUM_FRAMES and "seed" in read_metadata(path)


# Writes the same path again and again; the parent kills it at some moment.
ENDLESS = """
import sys
import numpy as np
from wanduet.media.video import write_video
path = sys.argv[1]
frames = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), dtype=np.uint8)
write_video(frames, path, metadata={"seed": 0})
print("ready", flush=True)
seed = 0
while True:
    seed += 1
    write_video(frames, path, metadata={"seed": seed})
"""


@posix
def test_killed_at_random_moments(tmp_path) -> None:
    path = tmp_path / "a.mp4"
    dice = random.Random(0)
    kills = mid_write = whole = 0
    while mid_write < 6 and kills < 300:
        kills += 1
        process = start_program(ENDLESS, [str(path)], tmp_path, os.environ)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(dice.uniform(0, 0.12))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left = [n for n in names(tmp_path) if n != "a.mp4"]
        assert all(n.endswith(".partial") for n in left)
        mid_write += bool(left)
        whole += is_whole(path)
        for name in left:
            long_ago = time.time() - 2 * STALE_SECONDS
            os.utime(tmp_path / name, (long_ago, long_ago))
    assert whole == kills
    assert mid_write >= 6  # or the attack hit nothing
    write_video(frames(), path, metadata={"seed": 1})
    assert names(tmp_path) == ["a.mp4"]


# Ends the process, without any cleaning up, at the n-th call of a function.
AT_CALL = """
import os, sys
import numpy as np
from wanduet.media import files, video
path, place, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
owner, name = (os, place[3:]) if place.startswith("os.") else (video._Encoder, place)
call, left = getattr(owner, name), count
def deadly(*args, **more):
    global left
    left -= 1
    if left == 0:
        os._exit(9)
    return call(*args, **more)
setattr(owner, name, deadly)
frames = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), dtype=np.uint8)
video.write_video(frames, path, metadata={"seed": 5})
"""


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("place", "count", "complete"),
    [("add", 1, False), ("add", 12, False), ("finish", 1, False), ("os.fsync", 1, False), ("os.replace", 1, False),
     ("os.fsync", 2, True)],
)  # fmt: skip
def test_ended_at_each_stage(tmp_path, place, count, complete, old) -> None:
    path = tmp_path / "a.mp4"
    if old:
        write_video(frames(1), path, metadata={"seed": 1})
    before = path.read_bytes() if old else None
    process = start_program(AT_CALL, [str(path), place, str(count)], tmp_path, os.environ)
    process.communicate()
    assert process.returncode == 9
    if complete:
        assert is_whole(path)
        assert read_metadata(path)["seed"] == 5
    elif old:
        assert path.read_bytes() == before
    else:
        assert not path.exists()


# Writes under each of several limits on the size of files; after each, the old file must stand alone.
LIMITED = """
import os, resource, sys
import numpy as np
from wanduet.errors import OutputError
from wanduet.media.video import VideoSpec, write_video
path, what, limits = sys.argv[1], sys.argv[2], [int(x) for x in sys.argv[3].split(",")]
frames = np.random.default_rng(0).integers(0, 256, (12, 64, 96, 3), dtype=np.uint8)
outcomes = []
for limit in limits:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        if what == "latents":
            import torch
            from wanduet.media.latents import save_latents
            save_latents(path, torch.zeros(16, 3, 32, 32), {"seed": 1})
        else:
            write_video(frames, path, VideoSpec(64, 96, codec=what), {"seed": 1})
        outcomes.append("written")
    except OutputError as error:
        assert open(path, "rb").read() == b"old" and len(os.listdir(os.path.dirname(path))) == 1, limit
        outcomes.append(error.message)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("\\n".join(outcomes))
"""


@posix
@pytest.mark.parametrize(
    ("what", "name"), [("h264", "a.mp4"), ("h264", "a.mkv"), ("ffv1", "a.mkv"), ("latents", "a.safetensors")]
)
def test_file_size_limit_at_every_point(tmp_path, what, name) -> None:
    """The disk refuses a write at 40 points of the file, the last byte among them; then it has just room enough."""
    path = tmp_path / name
    if what == "latents":
        save_latents(path, torch.zeros(16, 3, 32, 32), {"seed": 1})
    else:
        write_video(frames(), path, VideoSpec(64, 96, codec=what), {"seed": 1})
    size = path.stat().st_size
    limits = sorted({*range(0, size, max(1, size // 40)), size - 1})
    path.write_bytes(b"old")
    command = [sys.executable, "-c", LIMITED, str(path), what, ",".join(map(str, [*limits, size]))]
    outcomes = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    refused = f"Cannot write {path}: the file is larger than this system allows."
    assert outcomes == [refused] * len(limits) + ["written"]
    assert path.stat().st_size == size
    assert names(tmp_path) == [name]


# Fills a file system of 256 KiB, which only this process and its children see.
FULL = """
import os, sys
import numpy as np
from wanduet.errors import OutputError
from wanduet.media.read import probe
from wanduet.media.video import VideoSpec, write_video
path, codec, quality = sys.argv[1], sys.argv[2], 100 if sys.argv[2] == "h264" else None
open(path, "wb").write(b"old")
noise = np.random.default_rng(0).integers(0, 256, (96, 64, 96, 3), dtype=np.uint8)
spec = VideoSpec(64, 96, codec=codec, quality=quality)
try:
    write_video(noise, path, spec)
except OutputError as error:
    print(error)
assert open(path, "rb").read() == b"old"
assert os.listdir(os.path.dirname(path)) == [os.path.basename(path)]
write_video(0 * noise, path, spec)
print(probe(path)["num_frames"])
"""


@posix
@pytest.mark.parametrize(("codec", "name"), [("h264", "a.mp4"), ("ffv1", "a.mkv")])
def test_full_disk(tmp_path, codec, name) -> None:
    mounted = f'mount -t tmpfs -o size=256k none "{tmp_path}" && '
    try:
        subprocess.run(["unshare", "-rm", "sh", "-c", mounted + "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting is not permitted here")
    command = ["unshare", "-rm", "sh", "-c", mounted + 'exec "$@"', "sh", sys.executable, "-c", FULL]
    done = subprocess.run([*command, str(tmp_path / name), codec], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"Cannot write {tmp_path / name}: the disk is full.",
        "  Free some space, or choose another place with --output.",
        "96",
    ]
    assert names(tmp_path) == []  # the mount was seen by no one else


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_system_call_fails_at_the_end(tmp_path, monkeypatch, call) -> None:
    """The disk tells of an error only when the data is forced out: still no file."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def fail(*_args) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OutputError, match="the disk reported an error"):
        write_video(frames(), path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.mp4"]


def test_interrupted_by_the_user(tmp_path) -> None:
    """Ctrl-C between two chunks of frames."""

    def source():
        yield frames()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(source(), tmp_path / "a.mp4")
    assert names(tmp_path) == []


@posix
def test_folder_removed_while_writing(tmp_path) -> None:
    folder = tmp_path / "outputs"
    writer = VideoWriter(folder / "a.mp4", VideoSpec(64, 96))
    writer.write(frames())
    while not folder.exists() or not names(folder):
        time.sleep(0.01)
    while folder.exists():  # the encoder may open its file anew while this goes on
        shutil.rmtree(folder, ignore_errors=True)
    with pytest.raises(OutputError, match="Cannot write"):
        writer.close()
    assert not folder.exists()


def test_many_writers_of_one_path(tmp_path) -> None:
    """The last one to finish wins; the file is whole at every moment."""
    path = tmp_path / "a.mkv"
    writers = [VideoWriter(path, VideoSpec(64, 96, codec="ffv1"), {"seed": i}) for i in range(4)]
    for i, writer in enumerate(writers):
        writer.write(frames(i))
    for i, writer in enumerate(writers):
        writer.close()
        assert is_whole(path)
        assert read_metadata(path)["seed"] == i
    assert probe(path)["num_frames"] == NUM_FRAMES
    assert names(tmp_path) == ["a.mkv"]


@posix
@pytest.mark.parametrize(
    "name", ["12:30.mp4", "file:z.mp4", "pipe:1.mp4", "concat:a.mp4", "C:\\x.mp4", "a:b/c.mp4", "-x.mp4", "\udcff.mp4"]
)
def test_a_name_that_ffmpeg_takes_for_an_address(tmp_path, monkeypatch, capfd, name) -> None:
    """Relative, as users give it: the file has that very name, and is read back by it."""
    monkeypatch.chdir(tmp_path)
    write_video(frames(), name, metadata={"seed": 1})
    assert is_whole(Path(name))
    assert probe(name)["num_frames"] == NUM_FRAMES
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.mp4")] == [name]
    assert capfd.readouterr().out == ""


def test_an_encoder_that_fails_or_writes_nothing_leaves_no_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.mp4"

    def broken(*_args) -> None:
        raise av.error.ProtocolNotFoundError(1330794744, "no such protocol")  # FFmpeg's, and no OSError

    with monkeypatch.context() as patch:
        patch.setattr(video_module._Encoder, "add", broken)
        with pytest.raises(OutputError, match="no such protocol"):
            write_video(frames(), path)
    with monkeypatch.context() as patch:
        patch.setattr(video_module._Encoder, "finish", lambda self: os.truncate(self._output.name, 0))
        with pytest.raises(OutputError, match="wrote nothing"):
            write_video(frames(), path)
    assert names(tmp_path) == []


def test_a_video_that_a_player_has_open_is_not_lost(tmp_path, monkeypatch) -> None:
    """Windows then refuses to replace it."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    (tmp_path / "a-2.mp4").write_bytes(b"mine")

    def refuse(*_args) -> None:
        raise PermissionError(13, "Access is denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match=r"a-3\.mp4"):
        write_video(frames(), path, metadata={"seed": 1})
    assert path.read_bytes() == b"old"
    assert (tmp_path / "a-2.mp4").read_bytes() == b"mine"
    assert is_whole(tmp_path / "a-3.mp4")
    assert names(tmp_path) == ["a-2.mp4", "a-3.mp4", "a.mp4"]


def test_a_finished_file_that_is_itself_open_is_kept_under_a_name_that_no_sweep_takes(tmp_path, monkeypatch) -> None:
    """A scanner that holds it lets it be read, but not renamed or removed."""
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def refuse(*_args, **_keywords) -> None:
        raise PermissionError(13, "Access is denied")

    with monkeypatch.context() as scanner:
        for name in ("replace", "rename", "unlink"):
            scanner.setattr(os, name, refuse)
        with pytest.raises(OutputError, match=r"kept as .*a-2\.mp4") as caught:
            write_atomically(path, b"finished", keep_finished=True)
        assert caught.value.hint == "Rename it once the name is free."
    for left in tmp_path.iterdir():
        os.utime(left, (0, 0))
    write_atomically(path, b"new")
    assert (tmp_path / "a-2.mp4").read_bytes() == b"finished"
    assert names(tmp_path) == ["a-2.mp4", "a.mp4"]


def test_where_no_other_name_can_be_had_the_message_says_so(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def refuse(*_args, **_keywords) -> None:
        raise PermissionError(13, "Access is denied")

    for owner, name in ((os, "replace"), (shutil, "copyfile")):
        monkeypatch.setattr(owner, name, refuse)
    with pytest.raises(OutputError, match=r"kept as .*\.partial") as caught:
        write_atomically(path, b"finished", keep_finished=True)
    assert caught.value.hint == "Rename it now: the next file that is written as a.mp4 removes it."
    assert [p.read_bytes() for p in tmp_path.glob("*.partial")] == [b"finished"]


def test_a_folder_that_takes_the_name_meanwhile(tmp_path) -> None:
    path = tmp_path / "a.mp4"
    writer = VideoWriter(path, VideoSpec(64, 96), {"seed": 1})
    writer.write(frames())
    while not names(tmp_path):
        time.sleep(0.01)
    path.mkdir()
    with pytest.raises(OutputError, match=r"is a folder now.*a-2\.mp4"):
        writer.close()
    assert is_whole(tmp_path / "a-2.mp4")
