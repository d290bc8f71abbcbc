"""The miniature's world: what is drawn is what the words say, and held-out combinations stay unseen."""

import random

import numpy as np
import torch

from tools.miniature.detector import ATTRIBUTES, detect
from tools.miniature.prompts import corpus, describe, prompts_of
from tools.miniature.world import (
    BACKGROUNDS,
    BASE_GRID,
    COLORS,
    SCENES,
    SHAPES,
    clips_of,
    held_out_combinations,
    render,
    sample_clips,
)
from wanduet.miniature.vocabulary import FILLERS, WORDS, is_in_world, words_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_detector_reads_what_was_drawn() -> None:
    every = torch.cartesian_prod(*(torch.arange(n) for n in BASE_GRID))
    chosen = every[torch.randperm(len(every), generator=generator(1))[:30]]
    video = render(clips_of(chosen, generator(2)), size=96)
    pixels = ((video + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
    for combination, frames in zip(chosen.tolist(), pixels, strict=True):
        want, seen = describe(combination), detect(frames)
        assert [getattr(seen, a) for a in ATTRIBUTES] == [getattr(want, a) for a in ATTRIBUTES]


def test_the_detector_sees_nothing_where_nothing_is() -> None:
    assert detect(np.full((8, 32, 32, 3), 8, np.uint8)).shape == ""


def test_training_never_draws_a_held_out_combination() -> None:
    held_out = {tuple(c) for c in held_out_combinations().tolist()}
    assert len(held_out) == 210
    clips = sample_clips(4000, generator(3))
    for k in range(2):
        present = clips.present[:, k]
        columns = (clips.color[:, k], clips.shape[:, k], clips.motion[:, k], clips.background)
        drawn = {tuple(c) for c in torch.stack([c[present] for c in columns], 1).tolist()}
        assert not drawn & held_out
        assert len(drawn) > 300


def test_scenes_are_drawn_and_differ() -> None:
    clips = sample_clips(3000, generator(4))
    pictures = []
    for scene in range(1, len(SCENES)):
        index = (clips.scene == scene).nonzero()[:1, 0]
        video = render(clips.select(index), num_frames=5, size=48)
        assert torch.isfinite(video).all()
        assert video.abs().max() <= 1.01
        pictures.append(video)
    distances = [(a - b).abs().mean() for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(distances) > 0.03


def test_canonical_prompts_say_everything() -> None:
    clips = clips_of(held_out_combinations()[:50], generator(5))
    said = prompts_of(clips, random.Random(0), canonical=True)
    assert said == [describe(c).prompt for c in held_out_combinations()[:50].tolist()]


def test_the_vocabulary_of_the_package_is_that_of_the_training_prompts() -> None:
    prompts = corpus(3000, seed=6)
    assert {word for prompt in prompts for word in words_of(prompt)} - FILLERS == WORDS
    assert all(is_in_world(prompt) for prompt in prompts)


def test_nothing_is_painted_far_from_an_object() -> None:
    clips = sample_clips(1200, generator(8))
    clips = clips.select((~clips.present[:, 1] & (clips.scene == 0)).nonzero()[:120, 0])
    video = render(clips, num_frames=3, size=32)
    rows = (torch.arange(32) + 0.5) / 32
    away = torch.hypot(rows[None, :] - clips.start[:, 0, :1, None], rows[:, None] - clips.start[:, 0, 1:, None])
    outside = away > 1.3 * clips.radius[:, 0, :1, None] + clips.hop[:, 0, None, None] + 1 / 32
    first = video[:, :, 0]
    background = torch.tensor(list(BACKGROUNDS.values()))[clips.background] / 127.5 - 1
    wrong = (first - background[:, :, None, None]).abs().amax(1)[outside]
    assert wrong.max() < 1e-3
    assert len(clips.shape[:, 0].unique()) == len(SHAPES)


def test_no_object_has_its_backgrounds_colour() -> None:
    clips = sample_clips(4000, generator(9))
    names = list(BACKGROUNDS)
    for color, background in zip(clips.color[:, 0].tolist(), clips.background.tolist(), strict=True):
        assert list(COLORS)[color] != names[background]
    assert len(clips.background.unique()) == len(BACKGROUNDS)
