"""The prompts of a measurement, in fixed order: calm and fast motion, people, text, dark and bright pictures."""

MOST = 8
GENERAL = (
    "A cat walks over a frozen lake at sunset, its reflection in the ice, the camera follows it slowly.",
    "A crowded street market in the rain at night, neon signs, people with umbrellas, reflections on wet stones.",
    "A woman with red hair turns her head and laughs, close-up, soft window light.",
    "Waves break against black rocks, spray in the wind, slow motion, overcast sky.",
    "A red sports car drives fast through a curve of a mountain road, dust behind it, seen from a helicopter.",
    "An old man plays the violin on a stage, a single spotlight in a dark hall.",
    "A paper boat floats down a small stream between stones and moss, macro shot.",
    "A snowboarder jumps over a ridge in deep snow under a bright blue sky.",
)
# Of the bundled miniature's world, none of its training's.
MINIATURE = (
    "a red circle moving left on a black background",
    "a blue star spinning on a gray background",
    "a green square growing on a black background",
    "a purple heart bouncing on a white background",
    "a yellow triangle moving up on a navy background",
    "an orange square spinning on a white background",
    "a white star moving right on a blue background",
    "a red heart growing on a beige background",
)


def prompts_for(is_miniature: bool, count: int) -> tuple[str, ...]:
    """Return the first `count` prompts, at most MOST."""
    return (MINIATURE if is_miniature else GENERAL)[:count]
