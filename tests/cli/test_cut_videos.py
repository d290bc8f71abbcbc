"""Videos of which something is missing: said in one sentence, and never taken for whole."""

from pathlib import Path

import numpy as np
import pytest

from wanduet.errors import InvalidRequestError
from wanduet.media.read import read_metadata
from wanduet.media.video import write_video
from wanduet.request import GenerationRequest

SMALL = ("--steps", "1", "--num-frames", "5", "--resolution", "32x32", "--seed", "1")


def test_a_video_that_was_cut_off_is_not_compared(wanduet, work: Path) -> None:
    made = wanduet("generate", "x", "--model", "miniature", *SMALL, "-o", "x.mp4", "--json").json
    data = (work / made["output"]).read_bytes()
    (work / "x.mp4").write_bytes(data[:-100])
    for command in ("verify", "inspect"):
        ran = wanduet(command, "x.mp4", "--json")
        assert ran.code == 1
        assert f"x.mp4 is cut off: it has {len(data) - 100} bytes" in ran.error
    again = wanduet("generate", "x", "--model", "miniature", *SMALL, "-o", "x.mp4", "--resume", "--json")
    assert (again.code, (work / "x.mp4").read_bytes()[:4]) == (0, data[:4])  # not taken for finished
    assert wanduet("verify", "x.mp4", "--json").json["equal"] is True


def test_a_small_video_that_says_it_is_large_is_not_made_again(wanduet, work: Path) -> None:
    request = {"prompt": "x", "num_frames": 1, "height": 4096, "width": 16}
    about = {"request": request, "seed": 1, "model": {"name": "miniature"}}
    write_video(np.zeros((1, 16, 16, 3), np.uint8), work / "x.mp4", metadata=about)
    ran = wanduet("verify", "x.mp4", "--json")
    assert ran.code == 1
    assert "its height is 16, not 4096" in ran.error


def test_a_video_that_says_it_took_many_steps_is_made_again_only_on_request(
    wanduet, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanduet.engine.pipeline import Engine

    def submit(self: Engine, request: GenerationRequest, output: object) -> None:
        raise InvalidRequestError("seed", request.num_inference_steps, "it was submitted")

    monkeypatch.setattr(Engine, "submit", submit)
    for steps, flags in ((200, ()), (1000, ()), (1000, ("--max-steps", "1000"))):
        request = {"prompt": "x", "num_frames": 1, "height": 16, "width": 16, "num_inference_steps": steps}
        about = {"request": request, "seed": 1, "model": {"name": "miniature"}}
        write_video(np.zeros((1, 16, 16, 3), np.uint8), work / "x.mp4", metadata=about)
        error = wanduet("verify", "x.mp4", *flags, "--json").error
        refused = steps > 200 and not flags
        assert ("made in 1000 steps" in error) == refused
        assert ("--max-steps 1000" in error) == refused
        assert ("it was submitted" in error) != refused


def test_a_video_with_frames_cut_out_is_not_compared(wanduet, work: Path) -> None:
    made = wanduet("generate", "x", "--model", "miniature", *SMALL, "-o", "x.mp4", "--json").json
    about = read_metadata(work / made["output"])
    write_video(np.zeros((3, 32, 32, 3), np.uint8), work / "x.mp4", metadata=about)
    assert "has 3 of 5 frames" in wanduet("verify", "x.mp4", "--json").error
