"""What the miniature's world is called in words: canonical prompts, paraphrases, and what it does not know."""

import random
import re
from dataclasses import dataclass

from wanduet.miniature.world import BACKGROUNDS, COLORS, MOTIONS, SCENES, SHAPES, SIZES, SPEEDS, Clips

COLOR_NAMES, BACKGROUND_NAMES = tuple(COLORS), tuple(BACKGROUNDS)
SYNONYMS = {
    "circle": ("disc", "ball", "round shape", "dot"),
    "square": ("box", "block"),
    "triangle": ("pyramid",),
    "purple": ("violet",),
    "red": ("crimson", "scarlet"),
    "gray": ("grey",),
    "navy": ("dark blue", "navy blue"),
    "beige": ("cream", "sand-coloured"),
    "black": ("dark",),
    "moving left": ("going left", "moving to the left", "sliding left", "that moves left", "drifting to the left"),
    "moving right": ("going right", "moving to the right", "sliding right", "that moves right", "drifting to the right"),
    "moving up": ("going up", "moving upwards", "rising", "that moves up", "floating up"),
    "moving down": ("going down", "moving downwards", "falling", "that moves down", "sinking"),
    "staying still": ("standing still", "not moving", "static", "that stays still", "resting"),
    "growing": ("getting bigger", "getting larger", "that grows", "expanding"),
    "shrinking": ("getting smaller", "that shrinks", "becoming smaller"),
    "spinning": ("rotating", "turning around"),
    "bouncing": ("jumping", "hopping"),
    "small": ("little", "tiny"),
    "big": ("large", "huge"),
    "quickly": ("fast",),
    "slowly": ("gently",),
}
SCENE_PARAPHRASES = (
    (),
    ("sunrise over the sea", "the sun rises over the ocean", "a sunrise at the sea"),
    ("a house in the snow at night", "snow falls on a house at night", "snowfall over a small house in the night"),
)
FILLERS = {"a", "an", "the", "one", "on", "in", "and", "over", "of", "with", "background", "at", "that", "is", "to", "video"}


@dataclass(frozen=True, slots=True)
class Described:
    """What a canonical prompt says of one object on its background."""

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
    return Described(COLOR_NAMES[color], SHAPES[shape], MOTIONS[motion], BACKGROUND_NAMES[background])


def prompt_of(clips: Clips, index: int, rng: random.Random, canonical: bool = False) -> str:
    """A prompt for one clip of a batch: the canonical one, or a random paraphrase that says the same or less."""
    scene = int(clips.scene[index])
    if scene:
        return SCENES[scene] if canonical or rng.random() < 0.5 else rng.choice(SCENE_PARAPHRASES[scene])
    loose = 0.0 if canonical else 0.3
    objects = [_object(clips, index, k, rng, loose) for k in range(2) if clips.present[index, k]]
    if len(objects) == 2 and rng.random() < loose:
        objects.reverse()
    text = " and ".join(objects)
    if rng.random() >= loose * 0.3:  # a prompt may leave the background open
        background = _word(BACKGROUND_NAMES[int(clips.background[index])], rng, loose)
        article = "a" if rng.random() >= loose else rng.choice(("the", ""))
        pattern = rng.choice(("on {} {} background", "over {} {} background", "in front of {} {} background"))
        pattern = pattern if rng.random() < loose else "on {} {} background"
        text += " " + pattern.format(article, background)
    text = " ".join(text.split())
    if rng.random() < loose:
        text = rng.choice((text.capitalize(), text + ".", text.upper(), text.capitalize() + ".", "A video of " + text))
    return text


def is_in_world(prompt: str) -> bool:
    """Whether every word of a prompt is one that the miniature was taught, and at least two carry meaning."""
    words = re.findall(r"[\w'-]+", prompt.lower())
    known = _vocabulary()
    meaningful = [w for w in words if w not in FILLERS]
    return len(meaningful) >= 2 and all(w in known for w in meaningful)


def corpus(count: int, seed: int) -> list[str]:
    """Random prompts, to train the tokenizer on."""
    import torch

    from wanduet.miniature.world import sample_clips

    clips = sample_clips(count, torch.Generator().manual_seed(seed))
    rng = random.Random(seed)
    return [prompt_of(clips, i, rng) for i in range(count)]


def _object(clips: Clips, index: int, k: int, rng: random.Random, loose: float) -> str:
    size = _word(SIZES[int(clips.size[index, k])], rng, loose)
    color = _word(COLOR_NAMES[int(clips.color[index, k])], rng, loose)
    shape = _word(SHAPES[int(clips.shape[index, k])], rng, loose)
    motion = _word(MOTIONS[int(clips.motion[index, k])], rng, loose)
    still = MOTIONS[int(clips.motion[index, k])] in ("staying still", "growing", "shrinking")
    speed = "" if still else _word(SPEEDS[int(clips.speed[index, k])], rng, loose)
    article = "a" if rng.random() >= loose else rng.choice(("the", "one", ""))
    text = " ".join(f"{article} {size} {color} {shape} {motion} {speed}".split())
    return text.replace("a orange", "an orange", 1) if text.startswith("a orange") and rng.random() < 0.5 else text


def _word(name: str, rng: random.Random, loose: float) -> str:
    options = SYNONYMS.get(name)
    return rng.choice(options) if options and rng.random() < loose else name


def _vocabulary() -> set[str]:
    phrases = [*COLOR_NAMES, *BACKGROUND_NAMES, *SHAPES, *MOTIONS, *SIZES, *SPEEDS, *SCENES]
    phrases += [p for options in (*SYNONYMS.values(), *SCENE_PARAPHRASES) for p in options] + ["in front of"]
    return {word for phrase in phrases for word in re.findall(r"[\w'-]+", phrase)} | FILLERS
