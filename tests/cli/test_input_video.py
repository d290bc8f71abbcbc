"""`--input-video` on the command line: what is made, planned, verified and refused."""

from pathlib import Path

import pytest

from wanduet.doors.cli import batch

CIRCLE = "a red circle moving left on a black background"
SMALL = ("--model", "miniature", "--resolution", "48x32", "--steps", "4")


def test_a_video_is_made_from_a_video_and_verified(wanduet, work: Path) -> None:
    first = wanduet("generate", CIRCLE, *SMALL, "--num-frames", "9", "-o", "first.mp4", "--json").json
    again = ("--input-video", "first.mp4", "--strength", "0.5")
    ran = wanduet(
        "generate", "a blue square", "--model", "miniature", "--steps", "4", *again, "-o", "second.mp4", "--json"
    )
    made = ran.json
    assert "the last 2 of 4 steps of unipc (strength 0.5) from first.mp4" in ran.err
    assert made["num_frames"] == first["num_frames"] == 9  # as long as the input
    assert made["width"] > made["height"]  # in its proportions
    assert made["settings"]["input_video"].startswith("sha256:")
    assert made["settings"]["strength"] == 0.5
    assert made["timings"]["encode_video_s"] > 0
    verified = wanduet("verify", "second.mp4", "--input-video", "first.mp4", "--json")
    assert verified.json["equal"] is True
    assert "--input-video" in wanduet("verify", "second.mp4", "--json").err
    assert "hashes differ" in wanduet("verify", "second.mp4", "--input-video", "second.mp4", "--json").error
    assert "no use" in wanduet("verify", "first.mp4", "--input-video", "second.mp4", "--json").error


def test_plan_counts_the_encode(wanduet, work: Path) -> None:
    wanduet("generate", CIRCLE, *SMALL, "--num-frames", "5", "-o", "a.mp4", "--json")
    plain = wanduet("plan", "--model", "random:1.3b", "--hardware", "24GiB", "--json").json
    size = ("--resolution", "480p", "--num-frames", "5", "--input-video", "a.mp4")
    other = wanduet("plan", "--model", "random:1.3b", "--hardware", "24GiB", *size, "--json").json
    assert plain["devices"][0]["phases"]["encode"] == 0
    assert other["devices"][0]["phases"]["encode"] > 2**28
    assert "encode" in other["predicted_seconds"]
    assert "encode" not in plain["predicted_seconds"]


def test_what_is_no_video_is_refused_before_anything_is_loaded(wanduet, work: Path) -> None:
    (work / "notes.txt").write_text("hello")
    (work / "folder").mkdir()
    for name, words in (("nope.mp4", "no such file"), ("notes.txt", "video"), ("folder", "video file")):
        ran = wanduet("generate", "x", "--model", "miniature", "--input-video", name, "--json")
        assert ran.code == 2
        assert "input_video=" in ran.error
        assert words in ran.error
    ran = wanduet("generate", "x", "--model", "miniature", "--strength", "0.5", "--json")
    assert "only together with input_video" in ran.error


def test_more_frames_than_the_input_has_are_refused_with_the_nearest(wanduet, work: Path) -> None:
    wanduet("generate", CIRCLE, *SMALL, "--num-frames", "9", "-o", "a.mp4", "--json")
    ran = wanduet("plan", "--model", "miniature", "--input-video", "a.mp4", "--num-frames", "13", "--json")
    assert "9" in ran.error


def test_a_batch_may_name_an_input_for_each_line(wanduet, work: Path) -> None:
    wanduet("generate", CIRCLE, *SMALL, "--num-frames", "5", "-o", "a.mp4", "--json")
    (work / "lines.jsonl").write_text(
        '{"prompt": "a blue square", "input_video": "a.mp4", "strength": 0.25}\n{"prompt": "a red circle", "num_frames": 5}\n'
    )
    ran = wanduet("batch", "lines.jsonl", *SMALL, "--json")
    assert ran.code == 0, ran.err
    assert len(list(work.glob("*.mp4"))) == 3


def test_an_input_that_goes_while_a_batch_runs_fails_its_own_line_only(
    wanduet, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanduet("generate", CIRCLE, *SMALL, "--num-frames", "5", "-o", "a.mp4", "--json")
    chosen = batch.free_output

    def delete_and_choose(options, prompt, *rest, **how):
        (work / "a.mp4").unlink(missing_ok=True)
        return chosen(options, prompt, *rest, **how)

    monkeypatch.setattr(batch, "free_output", delete_and_choose)
    line = '{"prompt": "a red circle", "num_frames": 5}\n'
    (work / "lines.jsonl").write_text(line + '{"prompt": "a blue square", "input_video": "a.mp4"}\n' + line)
    ran = wanduet("batch", "lines.jsonl", *SMALL, "--json")
    assert ran.code == 1
    assert ["error" in one for one in ran.json["videos"]] == [False, True, False]
    assert "no such file" in ran.json["videos"][1]["error"]


def test_bench_counts_only_the_steps_that_are_made_and_shows_the_encode(wanduet, work: Path) -> None:
    wanduet("generate", CIRCLE, *SMALL, "--num-frames", "5", "-o", "a.mp4", "--json")
    ran = wanduet("bench", *SMALL, "--input-video", "a.mp4", "--strength", "0.25", "--runs", "1", "--json").json
    assert ran["timings"]["encode_video_s"] > 0
    assert ran["seconds_per_step"] == pytest.approx(ran["timings"]["denoise_s"], abs=1e-4)  # one of four
