"""`wanduet.export_to_video`: diffusers' call for whatever a pipeline gives, read back from the file."""

import inspect
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import wanduet
from wanduet.errors import InvalidRequestError, OutputError


def frames(height: int = 32, width: int = 48) -> NDArray[np.float32]:
    """`[5, H, W, 3]` in 0..1: a grey that grows lighter, with a red half."""
    values = np.empty((5, height, width, 3), np.float32)
    for index in range(5):
        values[index] = 0.1 + 0.15 * index
    values[:, :, : width // 2] = (0.8, 0.1, 0.1)
    return values


def read(path: str) -> NDArray[np.float32]:
    with av.open(path) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]) / np.float32(255)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x, lambda x: list(x), lambda x: x[None], lambda x: (x * 255).round().astype(np.uint8),
        lambda x: [Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in x],
        lambda x: torch.from_numpy(x), lambda x: torch.from_numpy(x).permute(0, 3, 1, 2),
        lambda x: torch.from_numpy(x).permute(0, 3, 1, 2).bfloat16()[None], lambda x: list(torch.from_numpy(x)),
    ],
)  # fmt: skip
def test_every_form_of_frames_is_the_same_video(tmp_path, form) -> None:
    path = str(tmp_path / "a.mp4")
    assert wanduet.export_to_video(form(frames()), path, fps=16, quality=9) == path
    assert abs(read(path) - frames()).mean() < 0.02
    with av.open(path) as file:
        assert file.streams.video[0].average_rate == 16


def test_without_a_path_a_new_file_is_made(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    paths = [wanduet.export_to_video(frames()) for _ in range(2)]
    assert paths[0] != paths[1]
    assert [len(read(path)) for path in paths] == [5, 5]


def test_an_odd_last_row_and_column_are_cut_off(tmp_path) -> None:
    assert read(wanduet.export_to_video(frames(33, 47), tmp_path / "a.mp4")).shape == (5, 32, 46, 3)


def test_a_better_quality_is_a_larger_file(tmp_path) -> None:
    noise = np.random.default_rng(0).random((5, 64, 64, 3), np.float32)
    sizes = []
    for quality in (0, 2.5, 5, 7.5, 10):
        path = tmp_path / f"{quality}.mp4"
        wanduet.export_to_video(noise, path, quality=quality)
        sizes.append(path.stat().st_size)
    assert sizes == sorted(set(sizes))
    wanduet.export_to_video(noise, tmp_path / "usual.mp4", quality=None)
    assert (tmp_path / "usual.mp4").stat().st_size == sizes[2]


def test_the_signature_is_that_of_diffusers() -> None:
    from diffusers.utils import export_to_video

    theirs, ours = (inspect.signature(function).parameters for function in (export_to_video, wanduet.export_to_video))
    assert [(name, p.default) for name, p in ours.items()] == [(name, p.default) for name, p in theirs.items()]


@pytest.mark.parametrize(
    ("given", "keywords", "says"),
    [
        (frames() * 255, {}, r"in 0\.\.1"), (frames() * 2 - 1, {}, r"in 0\.\.1"), (None, {}, "video_frames"),
        (frames(), {"fps": "x"}, "fps"), (frames(), {"fps": float("nan")}, "fps"), (frames(), {"quality": "x"}, "quality"),
        (np.stack([frames()] * 2), {}, r"frames\[0\]"), ([list(frames())] * 2, {}, r"frames\[0\]"),
        (frames()[0], {}, r"\[F, H, W, 3\]"), ([], {}, "no frames"), (frames() * np.nan, {}, "NaN"),
        ([frames()[0], frames(16, 16)[0]], {}, "same size"), (frames().astype(np.int64), {}, "uint8"),
        (frames(), {"bitrate": 1000}, "quality="), (frames(), {"quality": 11}, "0 to 10"),
        (frames(), {"fps": 16.5}, "whole number"), (np.zeros((5, 4, 4, 2)), {}, r"\[H, W, 3\]"),
    ],
)  # fmt: skip
def test_what_is_no_video_is_refused_and_leaves_no_file(tmp_path, given: Any, keywords, says) -> None:
    with pytest.raises(ValueError, match=says):
        wanduet.export_to_video(given, tmp_path / "a.mp4", **keywords)
    assert not list(tmp_path.iterdir())


def test_errors_of_the_writer(tmp_path) -> None:
    with pytest.raises(InvalidRequestError, match="fps"):
        wanduet.export_to_video(frames(), tmp_path / "a.mp4", fps=500)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        wanduet.export_to_video(frames(), tmp_path / "file" / "a.mp4")
