"""Prompts for clips of the miniature's world: canonical ones and paraphrases."""

import random
from dataclasses import dataclass

from tools.miniature.world import ALL_SHAPES, BACKGROUNDS, COLORS, MOTIONS, SCENES, SIZES, SPEEDS, Clips

COLOR_NAMES, BACKGROUND_NAMES = tuple(COLORS), tuple(BACKGROUNDS)
# fmt: off
SYNONYMS = {
    "circle": ("disc", "ball", "round shape", "dot"),
    "triangle": ("pyramid",),
    "square": ("box", "block"),
    "purple": ("violet",),
    "red": ("crimson", "scarlet"),
    "star": ("five-pointed star",),
    "heart": ("love heart",),
    "gray": ("grey",),
    "navy": ("dark blue", "navy blue"),
    "beige": ("cream", "sand-coloured"),
    "black": ("pitch black",),
    "moving left": ("going left", "moving to the left", "sliding left", "that moves left", "moves left", "drifting to the left", "is moving left", "moves to the left", "flying left"),
    "moving right": ("going right", "moving to the right", "sliding right", "that moves right", "moves right", "drifting to the right", "is moving right", "moves to the right", "flying right"),
    "moving up": ("going up", "moving upwards", "rising", "that moves up", "moves up", "floating up", "is moving up", "goes up", "moving upward"),
    "moving down": ("going down", "moving downwards", "falling", "that moves down", "moves down", "sinking", "is moving down", "goes down", "moving downward"),
    "staying still": ("standing still", "not moving", "static", "that stays still", "resting", "still", "stays still", "motionless"),
    "growing": ("getting bigger", "getting larger", "that grows", "grows", "expanding", "is growing", "becoming bigger"),
    "shrinking": ("getting smaller", "that shrinks", "shrinks", "becoming smaller", "is shrinking", "contracting"),
    "spinning": ("rotating", "turning around", "spins"),
    "bouncing": ("jumping", "hopping", "bounces"),
    "small": ("little", "tiny"),
    "big": ("large", "huge"),
    "quickly": ("fast",),
    "slowly": ("gently",),
}
# fmt: on
SCENE_PARAPHRASES = (
    (),
    ("sunrise over the sea", "the sun rises over the ocean", "a sunrise at the sea", "the sun coming up over the sea"),
    ("a house in the snow at night", "snow falls on a house at night", "snowfall over a small house in the night"),
    ("fireworks over a city", "fireworks in the night sky over a city", "fireworks above the city at night"),
    (
        "a sailing boat on the sea",
        "a boat sails across the sea",
        "a sailboat crossing the ocean",
        "a boat on the ocean",
    ),
    ("a rocket flying to the stars", "a rocket rising into the night sky", "a rocket launch", "a rocket in space"),
)
BACKGROUND_PATTERNS = (
    "{0} on the {1} background", "{0} on {1} background", "{0} on {1}", "{0} over a {1} background",
    "{0} in front of a {1} background", "{0} against a {1} background", "{0}, {1} background",
    "on a {1} background, {0}",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Described:
    """The attributes in a canonical prompt: one object on its background."""

    color: str
    shape: str
    motion: str
    background: str

    @property
    def prompt(self) -> str:
        """The canonical sentence."""
        return f"a {self.color} {self.shape} {self.motion} on a {self.background} background"


def describe(combination: list[int]) -> Described:
    """A combination (colour, shape, motion, background) of world.BASE_GRID in words."""
    color, shape, motion, background = combination
    return Described(COLOR_NAMES[color], ALL_SHAPES[shape], MOTIONS[motion], BACKGROUND_NAMES[background])


def prompts_of(clips: Clips, rng: random.Random, canonical: bool = False) -> list[str]:
    """A prompt for each clip of a batch: the canonical one, or a random paraphrase that says the same or less."""
    loose = 0.0 if canonical else 0.3
    columns = zip(
        clips.scene.tolist(), clips.background.tolist(), clips.present.tolist(), clips.color.tolist(),
        clips.shape.tolist(), clips.motion.tolist(), clips.size.tolist(), clips.speed.tolist(), strict=True,
    )  # fmt: skip
    texts = []
    for scene, background, present, *attributes in columns:
        if scene:
            text = SCENES[scene] if rng.random() >= 2 * loose else rng.choice(SCENE_PARAPHRASES[scene])
        else:
            objects = [_object([a[k] for a in attributes], rng, loose) for k in range(2) if present[k]]
            if rng.random() < loose:
                objects.reverse()
            text = _before(" and ".join(objects), BACKGROUND_NAMES[background], rng, loose)
        texts.append(_dressed(" ".join(text.split()), rng, loose))
    return texts


def corpus(count: int, seed: int) -> list[str]:
    """Random prompts, to train the tokenizer on."""
    import torch

    from tools.miniature.world import sample_clips

    return prompts_of(sample_clips(count, torch.Generator().manual_seed(seed)), random.Random(seed))


def _object(attributes: list[int], rng: random.Random, loose: float) -> str:
    color, shape, motion, size, speed = attributes
    still = MOTIONS[motion] in ("staying still", "growing", "shrinking")
    words = (
        _word(SIZES[size], rng, loose),
        _word(COLOR_NAMES[color], rng, loose) if rng.random() >= 0.1 * loose else "",
        _word(ALL_SHAPES[shape], rng, loose),
        _word(MOTIONS[motion], rng, loose) if rng.random() >= 0.1 * loose else "",
        "" if still else _word(SPEEDS[speed], rng, loose),
    )
    article = "a" if rng.random() >= loose else rng.choice(("the", "one", "", "an"))
    return " ".join((article, *words))


def _before(objects: str, background: str, rng: random.Random, loose: float) -> str:
    """Objects and their background in one of several patterns; sometimes without the background."""
    if rng.random() < 0.3 * loose:
        return objects
    pattern = "{0} on a {1} background"
    if rng.random() < loose:
        pattern = rng.choice(BACKGROUND_PATTERNS)
    return pattern.format(objects, _word(background, rng, loose))


def _dressed(text: str, rng: random.Random, loose: float) -> str:
    """Case and punctuation as people type them."""
    if rng.random() >= loose:
        return text
    return rng.choice((text.capitalize(), text + ".", text.upper(), text.capitalize() + ".", "A video of " + text))


def _word(name: str, rng: random.Random, loose: float) -> str:
    options = SYNONYMS.get(name)
    return rng.choice(options) if options and rng.random() < loose else name
