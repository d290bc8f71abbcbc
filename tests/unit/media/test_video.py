import gc
import os
import subprocess
import sys
import threading
import time
from fractions import Fraction

import av
import numpy as np
import pytest

from wanduet.errors import InvalidRequestError, OutputError
from wanduet.media import segments, video
from wanduet.media.codecs import CODECS, ENCODER_THREADS
from wanduet.media.files import UnreadableFileError
from wanduet.media.read import frame_hashes, hash_frame, probe, read_frames, read_metadata
from wanduet.media.video import VideoSpec, VideoWriter, write_video


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("count", [1, 33, 35, 64, 81])  # segments have 32 frames
def test_frames_and_timestamps_are_exact(tmp_path, moving, count) -> None:
    result = write_video(moving(count), tmp_path / "a.mp4")
    assert result.num_frames == count
    assert result.num_bytes == result.path.stat().st_size
    with av.open(str(result.path)) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 16
        frames = list(container.decode(stream))
        assert [frame.pts * frame.time_base for frame in frames] == [Fraction(i, 16) for i in range(count)]
        assert {0, 32, 64} & set(range(count)) <= {i for i, frame in enumerate(frames) if frame.key_frame}
        assert stream.duration * stream.time_base == Fraction(count, 16)
    with av.open(str(result.path)) as container:
        decoded_at = [packet.dts for packet in container.demux(video=0) if packet.dts is not None]
        assert len(set(np.diff(decoded_at))) <= 1  # no pause between segments
    assert names(tmp_path) == ["a.mp4"]


def test_probe(tmp_path, moving) -> None:
    facts = probe(write_video(moving(5), tmp_path / "a.mp4").path)
    assert (facts["codec"], facts["pixel_format"], facts["width"], facts["height"]) == ("h264", "yuv420p", 96, 64)
    assert (facts["fps"], facts["num_frames"], facts["duration_s"]) == (16.0, 5, 0.3125)
    assert facts["colour"] == {"primaries": "bt709", "transfer": "bt709", "matrix": "bt709", "range": "tv"}


@pytest.mark.parametrize(
    ("codec", "name"), [("h264", "a.mp4"), ("h264", "a.mov"), ("h264", "a.MKV"), ("av1", "a.webm"), ("vp9", "a.mp4")]
)
def test_each_codec_in_its_containers(tmp_path, moving, codec, name) -> None:
    frames = moving(9)
    path = write_video(frames, tmp_path / name, VideoSpec(*frames.shape[1:3], codec=codec)).path
    facts = probe(path)
    assert (facts["codec"], facts["num_frames"], facts["fps"]) == (codec, 9, 16.0)
    got = np.stack(list(read_frames(path))).astype(int)
    assert np.abs(got - frames).mean() < 5


def test_ffv1_is_lossless(tmp_path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (7, 48, 80, 3), dtype=np.uint8)
    path = write_video(frames, tmp_path / "a.mkv", VideoSpec(*frames.shape[1:3], codec="ffv1")).path
    assert np.array_equal(np.stack(list(read_frames(path))), frames)
    hashes = frame_hashes(path)
    assert hashes.frames == tuple(hash_frame(frame) for frame in frames)
    assert probe(path)["colour"] == {"primaries": "bt709", "transfer": "bt709", "matrix": "gbr", "range": "pc"}


def test_one_changed_pixel_changes_the_digest(tmp_path, moving) -> None:
    frames = moving(5)
    before = frame_hashes(write_video(frames, tmp_path / "a.mkv", VideoSpec(*frames.shape[1:3], codec="ffv1")).path)
    frames[3, 10, 10, 1] ^= 1
    after = frame_hashes(write_video(frames, tmp_path / "b.mkv", VideoSpec(*frames.shape[1:3], codec="ffv1")).path)
    assert [a == b for a, b in zip(before.frames, after.frames, strict=True)] == [True, True, True, False, True]
    assert before.digest != after.digest


@pytest.mark.parametrize(
    ("codec", "name"), [("h264", "mp4"), ("h264", "mkv"), ("ffv1", "mkv"), ("av1", "mp4"), ("vp9", "webm")]
)
def test_same_frames_same_bytes(tmp_path, moving, codec, name) -> None:
    metadata = {"request": {"prompt": "waves"}, "seed": 1}
    frames = moving(70 if codec == "h264" else 20)  # several segments
    first = write_video(frames, tmp_path / f"a.{name}", VideoSpec(*frames.shape[1:3], codec=codec), metadata).path
    chunks = [frames[:1], frames[1:5], frames[5], frames[6:33], frames[33:]]  # other chunks, and a slower caller
    second = write_video(
        _slowly(chunks), tmp_path / f"b.{name}", VideoSpec(*frames.shape[1:3], codec=codec), metadata
    ).path
    assert first.read_bytes() == second.read_bytes()


def _slowly(chunks):
    for chunk in chunks:
        time.sleep(0.02)
        yield chunk


def test_encoder_settings_do_not_depend_on_the_machine(tmp_path, moving) -> None:
    """x264 writes its settings into the stream; with another number of threads the bytes would differ."""
    data = write_video(moving(3, 256, 256), tmp_path / "a.mp4", VideoSpec(256, 256, quality=60)).path.read_bytes()
    settings = data[data.index(b"x264 - core") :][:900]
    for setting in (f" threads={ENCODER_THREADS} ".encode(), b" sliced_threads=0 ", b" crf=24.0 ", b" keyint=32 "):
        assert setting in settings, setting


def test_index_comes_before_the_frames(tmp_path, moving) -> None:
    data = write_video(moving(), tmp_path / "a.mp4").path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_crop_keeps_the_top_left(tmp_path, moving) -> None:
    frames = moving(3, 80, 96)
    path = write_video(frames, tmp_path / "a.mkv", VideoSpec(72, 90, codec="ffv1")).path
    assert np.array_equal(np.stack(list(read_frames(path))), frames[:, :72, :90])


def test_1080_rows_of_1088(tmp_path) -> None:
    """1080 is no multiple of a macroblock: H.264 pads it, and players must not see the padding."""
    frames = np.zeros((2, 1088, 1920, 3), np.uint8)
    frames[:, :1080] = (200, 60, 20)
    path = write_video(frames, tmp_path / "a.mp4", VideoSpec(1080, 1920)).path
    got = next(read_frames(path))
    assert got.shape == (1080, 1920, 3)
    assert np.abs(got[-1].astype(int) - (200, 60, 20)).max() <= 3


def test_quality_trades_size_for_error(tmp_path, moving) -> None:
    frames = moving(9, 128, 128)
    sizes, errors = [], []
    for quality in (1, 25, 50, 75, 100):
        result = write_video(frames, tmp_path / "a.mp4", VideoSpec(128, 128, quality=quality))
        sizes.append(result.num_bytes)
        errors.append(np.abs(np.stack(list(read_frames(result.path))).astype(int) - frames).mean())
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert sizes[-1] > 5 * sizes[0]
    assert VideoSpec(64, 64).options["crf"] == VideoSpec(64, 64, quality=75).options["crf"] == "18"


def test_odd_number_of_frames_per_second_is_exact(tmp_path, moving) -> None:
    assert probe(write_video(moving(4), tmp_path / "a.mp4", VideoSpec(64, 96, 1)).path)["duration_s"] == 4
    assert probe(write_video(moving(4), tmp_path / "b.mp4", VideoSpec(64, 96, 120)).path)["fps"] == 120


@pytest.mark.parametrize(
    ("values", "field", "nearest"),
    [
        ({"codec": "h265"}, "codec", None),
        ({"fps": 0}, "fps", 1),
        ({"fps": 500}, "fps", 120),
        ({"quality": 0}, "quality", 1),
        ({"quality": 101}, "quality", 100),
        ({"quality": 50, "codec": "ffv1"}, "quality", None),
        ({"height": 65}, "height", 64),
        ({"width": 1}, "width", 2),
        ({"width": 0, "codec": "ffv1"}, "width", 2),
    ],
)
def test_bad_settings_are_refused(values, field, nearest) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        VideoSpec(**{"height": 64, "width": 64} | values)
    assert (caught.value.field, caught.value.nearest) == (field, nearest)


@pytest.mark.parametrize(
    ("name", "codec", "nearest"),
    [("a.avi", "h264", "a.mp4"), ("a", "h264", "a.mp4"), ("a.mp4", "ffv1", "a.mkv"), ("x.webm", "h264", "x.mp4")],
)
def test_wrong_extension_is_refused_before_a_frame_is_taken(tmp_path, name, codec, nearest) -> None:
    def never():
        pytest.fail("a frame was taken")
        yield

    with pytest.raises(InvalidRequestError) as caught:
        write_video(never(), tmp_path / name, VideoSpec(64, 96, codec=codec))
    assert caught.value.nearest == nearest


def test_missing_encoder_is_named(monkeypatch) -> None:
    monkeypatch.setattr("av.codecs_available", {"ffv1", "libsvtav1"})
    with pytest.raises(InvalidRequestError, match="it has av1, ffv1"):
        VideoSpec(64, 64)
    assert set(CODECS) == {"h264", "av1", "vp9", "ffv1"}


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 64, 64, 3), np.float32),
        np.zeros((2, 3, 64, 64), np.uint8),
        np.zeros((64, 64), np.uint8),
        np.zeros((2, 32, 64, 3), np.uint8),
    ],
)
def test_wrong_frames_are_refused(tmp_path, frames) -> None:
    with pytest.raises(ValueError, match="Frames"), VideoWriter(tmp_path / "a.mp4", VideoSpec(64, 64)) as writer:
        writer.write(frames)
    assert names(tmp_path) == []


def test_no_frames_is_an_error(tmp_path) -> None:
    with pytest.raises(ValueError, match="no frames"):
        write_video([], tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="no frames"), VideoWriter(tmp_path / "a.mp4", VideoSpec(64, 64)):
        pass
    assert names(tmp_path) == []


def test_error_in_the_source_leaves_the_old_file(tmp_path, moving) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")

    def frames():
        yield moving(5)
        raise RuntimeError("decode failed")

    with pytest.raises(RuntimeError, match="decode failed"):
        write_video(frames(), path)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.mp4"]


def test_old_file_stays_until_the_new_one_is_complete(tmp_path, moving) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with VideoWriter(path, VideoSpec(64, 96)) as writer:
        writer.write(moving(9))
        assert path.read_bytes() == b"old"
    assert probe(path)["num_frames"] == 9


@pytest.mark.parametrize("word", ["add", "finish"])
def test_error_in_the_encoder_reaches_the_caller(tmp_path, moving, monkeypatch, word) -> None:
    def fail(*_args) -> None:
        time.sleep(0.2)  # meanwhile the queue fills up and the caller waits in it
        raise MemoryError("encoder")

    monkeypatch.setattr(video._Encoder, word, fail)
    monkeypatch.setattr(video, "QUEUE_BYTES", 0)
    writer = VideoWriter(tmp_path / "a.mp4", VideoSpec(64, 96))

    def work() -> None:
        for _ in range(40):  # far more than the queue holds: must fail, not hang
            writer.write(moving(1))
        writer.close()

    with pytest.raises(MemoryError, match="encoder"):
        work()
    writer.abort()
    assert not writer._thread.is_alive()
    assert names(tmp_path) == []


def test_error_in_a_segment_that_is_being_finished_reaches_the_caller(tmp_path, moving, monkeypatch) -> None:
    def fail(*_args) -> None:
        raise MemoryError("segment")

    monkeypatch.setattr(segments, "_finished", fail)
    with pytest.raises(MemoryError, match="segment"):
        write_video(moving(40), tmp_path / "a.mp4")
    assert names(tmp_path) == []
    assert not [thread for thread in threading.enumerate() if "wanduet-video" in thread.name]


def test_segments_are_encoded_at_the_same_time(tmp_path, moving, monkeypatch) -> None:
    """While a segment's last frames are encoded, the next segment's frames are."""
    second_began = threading.Event()
    add = video._Encoder.add

    def watch(self, frame) -> None:
        add(self, frame)
        if self._next > 40:
            second_began.set()

    finished = segments._finished

    def wait(*args):
        assert second_began.wait(60)
        return finished(*args)

    monkeypatch.setattr(video._Encoder, "add", watch)
    monkeypatch.setattr(segments, "_finished", wait)
    assert write_video(moving(45), tmp_path / "a.mp4").num_frames == 45


def test_abort_ends_the_thread_and_close_then_says_so(tmp_path, moving) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", VideoSpec(64, 96))
    writer.write(moving(9))
    writer.abort()
    writer.abort()
    with pytest.raises(ValueError, match="aborted"):
        writer.close()
    assert names(tmp_path) == []


def test_abort_after_close_keeps_the_file(tmp_path, moving) -> None:
    writer = VideoWriter(tmp_path / "a.mp4", VideoSpec(64, 96))
    writer.write(moving(9))
    first = writer.close()
    writer.abort()
    assert writer.close() is first
    assert probe(first.path)["num_frames"] == 9


def test_buffers_may_be_reused(tmp_path, moving) -> None:
    frames = moving(8)
    buffer = np.empty_like(frames[:2])
    with VideoWriter(tmp_path / "a.mkv", VideoSpec(64, 96, codec="ffv1")) as writer:
        for start in range(0, 8, 2):
            buffer[:] = frames[start : start + 2]
            writer.write(buffer)
        buffer[:] = 0
    assert np.array_equal(np.stack(list(read_frames(tmp_path / "a.mkv"))), frames)


def test_caller_does_not_wait_for_the_encoder(tmp_path, moving, monkeypatch) -> None:
    """A chunk that fits into the queue is taken at once however slow the encoder is."""
    release = threading.Event()
    add = video._Encoder.add

    def slow(self, frame) -> None:
        assert release.wait(60)  # never, if the caller waits for it
        add(self, frame)

    monkeypatch.setattr(video._Encoder, "add", slow)
    with VideoWriter(tmp_path / "a.mp4", VideoSpec(64, 96)) as writer:
        writer.write(moving(20))
        release.set()
    assert probe(tmp_path / "a.mp4")["num_frames"] == 20


def test_queue_is_bounded(tmp_path, monkeypatch) -> None:
    """At most the queue's frames and the one being encoded are held, however far the caller could run ahead."""
    monkeypatch.setattr(video, "QUEUE_BYTES", 6 * 64 * 96 * 3)
    held: list[int] = []
    taken = 0
    add = video._Encoder.add

    def count(self, frame) -> None:
        nonlocal taken
        time.sleep(0.002)
        held.append(writer._queue.qsize())
        taken += 1
        add(self, frame)

    monkeypatch.setattr(video._Encoder, "add", count)
    with VideoWriter(tmp_path / "a.mp4", VideoSpec(64, 96)) as writer:
        for i in range(60):
            writer.write(np.full((64, 96, 3), i, np.uint8))
            assert i + 1 - taken <= 8  # six queued, one in the encoder, one counted late
    assert max(held) <= 6
    assert taken == 60


MEMORY = """
import resource, sys
import numpy as np
from wanduet.media.video import write_video
count, path = int(sys.argv[1]), sys.argv[2]
write_video((np.full((480, 832, 3), i % 256, np.uint8) for i in range(count)), path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path) -> None:
    """150 more frames are 180 MB of pixels; the peak may grow by a fifth of that."""
    peaks = []
    for count in (100, 250):
        command = [sys.executable, "-c", MEMORY, str(count), str(tmp_path / "a.mp4")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024)
    assert peaks[1] - peaks[0] < 36e6


def test_no_threads_or_files_stay_open(tmp_path, moving) -> None:
    frames = moving(3)
    before = set(threading.enumerate())
    for i in range(10):
        writer = VideoWriter(tmp_path / f"{i}.mp4", VideoSpec(64, 96))
        writer.write(frames)
        writer.abort() if i % 2 else writer.close()
    gc.collect()
    assert not set(threading.enumerate()) - before
    assert len(names(tmp_path)) == 5


def test_folder_that_is_a_file_is_an_output_error(tmp_path, moving) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        write_video(moving(3), tmp_path / "x" / "a.mp4")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's way to fill memory")
def test_what_lay_in_memory_before_does_not_matter(tmp_path) -> None:
    """x264's AVX-512 code reads memory that it never wrote: see codecs._x264_repair."""
    script = (
        "import sys, numpy as np; from wanduet.media.video import write_video;"
        "t, y, x = np.meshgrid(np.arange(20), np.arange(64), np.arange(96), indexing='ij');"
        "f = (127 + 90 * np.stack([np.sin(x / 17 + t / 3), np.sin(y / 13 - t / 4), np.sin(t / 5)], -1)).astype(np.uint8);"
        "write_video(f, sys.argv[1])"
    )
    paths = [tmp_path / f"{fill}.mp4" for fill in ("0", "85", "1")]
    for path in paths:
        environment = os.environ | {"MALLOC_PERTURB_": path.stem}
        subprocess.run([sys.executable, "-c", script, str(path)], env=environment, check=True)
    assert len({path.read_bytes() for path in paths}) == 1


def test_a_file_without_a_frame_is_an_error_that_names_it(tmp_path) -> None:
    path = tmp_path / "empty.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    for read in (probe, read_metadata, frame_hashes):
        with pytest.raises(UnreadableFileError, match=r"empty\.mkv"):
            read(path)
