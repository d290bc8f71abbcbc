import pytest

from wanduet.doors.cli.show import show


def shown(capsys: pytest.CaptureFixture[str], value: dict) -> str:
    show(value)
    return capsys.readouterr().out


@pytest.mark.parametrize("text", ["[/b] [red]x[/red]", ":smile: [link=http://x]y", "{0} %s", "红色"])
def test_text_is_shown_as_it_is(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert text in shown(capsys, {"text": text})
    video = {"output": f"{text}.mp4", "seed": 1, "timings": {"total_s": 1.0}, "peak_memory_bytes": {"cpu": 2**30}}
    assert f"{text}.mp4 (seed 1)" in shown(capsys, video | {"warnings": [text]})


def test_nothing_of_a_file_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    made_by = {"request": {"prompt": "a\x1b[31mb\x07c\x9bd\r"}, "model": {"name": "\x1b]0;title\x07"}}
    out = shown(capsys, {"kind": "video", "made_by": made_by, "nested": {"a": ["\x1b[2J"]}})
    assert not {"\x1b", "\x07", "\x9b", "\r"} & set(out)
    assert "a�[31mb�c�d�" in out


def test_metadata_of_strange_kinds_does_not_matter(capsys: pytest.CaptureFixture[str]) -> None:
    for request in (None, 5, [], "x", {}):
        assert "video" in shown(capsys, {"kind": "video", "made_by": {"model": {}, "request": request}})


def test_the_table_of_prices_is_not_cut(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    measure = {"median": 0.123, "worst": 100.0}
    row = {"forwards": 100, "seconds": 12.3} | dict.fromkeys(("latents_error", "psnr", "st_lpips", "jod"), measure)
    rows = [{"name": f"guidance gate {share}"} | row for share in (0.7, 0.5)]
    prices = {"name": "mine", "card": "CPU", "rungs": [], "accelerators": rows, "fewer_steps": [], "controls": {}}
    out = shown(capsys, prices | {"notes": []})
    assert "…" not in out
    assert "guidance gate 0.7" in out
    assert out.count("0.12 100.00") == 2


def test_bytes_and_empty_fields(capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(
        capsys,
        {"num_bytes": 3 * 2**30, "peak_memory_bytes": {"cpu": 2**30}, "nothing": None, "empty": [], "std": 0.123456},
    )
    assert "3.00 GiB" in out
    assert "cpu: 1.00 GiB" in out
    assert "0.1235" in out
    assert "nothing" not in out
    assert "empty" not in out


def test_a_long_path_is_shown_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/models/" + "Wan2.1-T2V-1.3B-Diffusers" * 5 + "/diffusion_pytorch_model-00001-of-00002.safetensors"
    for value in ({"path": path}, {"model": {"problem": f"{path} is damaged."}}):
        out = shown(capsys, value)
        assert path in "".join("".join(cell.strip() for cell in line.split("│")[2:]) for line in out.splitlines())


def test_a_batch_is_a_line_a_video(capsys: pytest.CaptureFixture[str]) -> None:
    videos = [{"output": "a-1.mp4", "seed": 1}, {"output": "a-2.mp4", "seed": 2}]
    made = {"output": "a-1.mp4", "seed": 1, "videos": videos, "warnings": ["cut"], "settings": {"prompt": "a"}}
    before = {"output": "b.mp4", "seed": 3, "videos": [{"output": "b.mp4", "seed": 3}], "made_before": True}
    failed = {"prompt": "c\x1b[2J", "error": "The disk is full."}
    out = shown(capsys, {"videos": [made, before, failed], "failed": 1}).splitlines()
    assert out == [
        "Note: cut",
        "a-1.mp4 (seed 1)",
        "a-2.mp4 (seed 2)",
        "b.mp4 (seed 3, made before)",
        "Failed: c\N{REPLACEMENT CHARACTER}[2J: The disk is full.",
        "2 of 3 done.",
    ]


@pytest.mark.parametrize(("seconds", "told"), [(32.4, True), (2.0, False)])
def test_what_a_machine_prepares_once_is_told(capsys, seconds: float, told: bool) -> None:
    show({
        "timings": {"load_s": 1.0, "prepare_s": seconds}, "output": "a.mp4", "seed": 1, "peak_memory_bytes": {},
    })  # fmt: skip
    assert ("Prepared in 32 s, once on this machine" in capsys.readouterr().out) == told


def test_a_verification_says_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    found = {"video": "a.mp4", "equal": True, "num_frames": 9, "different_frames": [], "model_equal": True}
    found |= {"versions_then": {"torch": "2.9", "av": "18"}, "versions_now": {"torch": "2.13", "av": "18"}}
    assert shown(capsys, found) == "a.mp4 was made again, and all 9 frames are equal.\n"
    assert shown(capsys, found | {"equal": False, "different_frames": [3, 4], "model_equal": False}).splitlines() == [
        "a.mp4 was made again, and 2 of 9 frames differ, the first of them is frame 3.",
        "It was made with other weights than these.",
        "torch was 2.9, and is 2.13.",
    ]
