"""`wanduet price` as a user runs it."""

from collections.abc import Callable
from typing import Any

TINY = (
    "--model",
    "miniature",
    "--devices",
    "cpu",
    "--height",
    "32",
    "--width",
    "32",
    "--num-frames",
    "1",
    "--steps",
    "1",
)
ONE_LOAD = ("--weights", "bf16")  # else 8 bits would be measured too


def test_one_object_on_stdout_and_the_rest_on_stderr(wanduet: Callable[..., Any]) -> None:
    ran = wanduet("price", *TINY, *ONE_LOAD, "--prompts", "1", "--json")
    assert ran.code == 0
    found = ran.json
    assert found["rungs"][0]["speed"] == "exact"
    assert found["rungs"][0]["forwards"] == 2
    assert [row["name"] for row in found["accelerators"]] == [
        *("guidance gate 0.7", "guidance gate 0.5", "guidance interval 0.1-0.7"),
        *("products in fp8", "products in int8"),
    ]
    assert set(found["controls"]) == {"bf16_floor", "another_seed"}
    assert "easycache" in found["refused"], "one step is too few"
    assert any("order of its losses" in note for note in found["notes"])
    assert "videos to make, about" in ran.err
    again = wanduet("price", *TINY, *ONE_LOAD, "--prompts", "1", "--json")
    assert again.json == found
    assert "all is measured" in again.err


def test_what_is_refused(wanduet: Callable[..., Any]) -> None:
    ran = wanduet("price", "--model", "nothing-here", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, "model_not_found")
    ran = wanduet("price", *TINY, "--prompts", "9", "--json")
    assert (ran.code, ran.json["error"]["param"]) == (2, "prompts")
