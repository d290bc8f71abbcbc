"""The words of the miniature's training prompts, so that `generate` can warn about a prompt with other words."""

import itertools
import re


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, as they are in `WORDS`."""
    return re.findall(r"[\w'-]+", text.lower())


OBJECT_COLORS = frozenset(words_of("red green blue yellow orange purple white"))
# Other names of a colour, of objects or backgrounds.
COLOR_SYNONYMS = {
    "crimson": "red",
    "scarlet": "red",
    "violet": "purple",
    "pitch black": "black",
    "grey": "gray",
    "dark blue": "navy",
    "navy blue": "navy",
    "cream": "beige",
    "sand-coloured": "beige",
}
FILLERS = frozenset(
    words_of("a an the one on in and over of with background at that is to video against front across into")
)
WORDS = frozenset(
    words_of("""above around ball becoming beige big bigger black block blue boat bounces bouncing box brown circle city
    coming contracting cream crimson crossing dark disc dot down downward downwards drifting expanding falling falls
    fast fireworks five-pointed floating flying gently getting goes going gray green grey growing grows heart hopping
    house huge jumping large larger launch left little love motionless moves moving navy night not ocean orange pitch
    purple pyramid quickly red resting right rises rising rocket rotating round sailboat sailing sails sand-coloured
    scarlet sea shape shrinking shrinks sinking sky sliding slowly small smaller snow snowfall space spinning spins
    square standing star stars static staying stays still sun sunrise tiny triangle turning up upward upwards violet
    white yellow""")
)


def is_in_world(prompt: str) -> bool:
    """Whether the miniature can be expected to make a video of what a prompt says.

    All its words occur in training prompts, at least two are no fillers, and no object has its background's colour.
    """
    text = prompt.lower()
    for synonym, color in COLOR_SYNONYMS.items():
        text = text.replace(synonym, color)
    words = words_of(text)
    behind = {word for word, after in itertools.pairwise(words) if after == "background"}
    if any(words.count(color) > 1 for color in behind & OBJECT_COLORS):
        return False
    meaningful = [word for word in words if word not in FILLERS]
    return len(meaningful) >= 2 and WORDS.issuperset(meaningful)
