"""Which prompts the miniature is expected to follow. tests/tools compares its words with the training prompts."""

import pytest

from wanduet.miniature.vocabulary import is_in_world


@pytest.mark.parametrize(
    "prompt",
    [
        "A RED circle, moving left, on a black background!",
        "a white star on a dark blue background",
        "a red circle moving left on a white background",
        "the sun rises over the ocean",
    ],
)
def test_prompts_that_training_covers(prompt: str) -> None:
    assert is_in_world(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "a violet circle on a purple background",
        "a scarlet disc on a red background",
        "a cat walks on the grass",
        "a",
        "",
    ],
)
def test_prompts_that_training_does_not_cover(prompt: str) -> None:
    assert not is_in_world(prompt)
