"""`--help` shows how a command is used, and little else."""

import pytest

COMMANDS = [
    "generate",
    "batch",
    "plan",
    "bench",
    "encode",
    "decode",
    "inspect",
    "download",
    "convert",
    "verify",
    "doctor",
    "serve",
    "ui",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_no_more_than_is_needed(wanduet, command: str) -> None:
    ran = wanduet(command, "--help")
    assert ran.code == 0
    assert ran.out.count(f"wanduet {command}") >= 2  # how it is called, and an example
    assert "env var" not in ran.out
    assert "[default: False]" not in ran.out
    assert "--no-json" not in ran.out
    assert "--no-tf32" in ran.out  # off is what changes something
    assert "WANDUET_NUM_FRAMES=17" in ran.out


def test_switches_that_are_not_shown_work_all_the_same(wanduet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDUET_JSON", "1")
    assert not wanduet("generate", "x", "--model", "miniature", "--dry-run", "--no-json").out.startswith("{")


def test_commands_are_in_groups_most_used_first(wanduet) -> None:
    out = wanduet("--help").out
    words = ("Make videos", "generate", "batch", "Look before and after", "plan", "Serve", "ui", "Look after", "doctor")
    places = [out.index(word) for word in words]
    assert places == sorted(places)
    assert out.count("WANDUET_") == 1


def test_the_models_own_numbers_are_in_the_help(wanduet) -> None:
    from wanduet.family.wan21 import WAN_1_3B, WAN_14B

    text = " ".join(wanduet("generate", "--help").out.replace("│", " ").split())
    small, large = WAN_1_3B.defaults, WAN_14B.defaults
    for number in (
        f"{small.num_frames} for Wan2.1", f"{small.num_inference_steps} for Wan2.1", f"{small.fps} for Wan2.1",
        f"{small.width}x{small.height} for Wan2.1", f"{small.height} for Wan2.1", f"{small.width} for Wan2.1",
        f"{small.guidance_scale:g} for Wan2.1 1.3B, {large.guidance_scale:g} for 14B",
        f"{small.flow_shift:g} for Wan2.1 1.3B, {large.flow_shift:g} for 14B",
    ):  # fmt: skip
        assert number in text
