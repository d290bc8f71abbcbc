"""Low resolution first as a request names it: for which models and sizes, and when. Does not import torch.

The first steps of a denoise only decide what is coarser than a certain detail; they are made on a smaller video, and the
latents are then enlarged. Source: SPEED, arXiv 2605.18736. Their Wan example is 720p from 480p.
"""

import math
from collections.abc import Mapping
from typing import Any

from wanduet.errors import InvalidRequestError
from wanduet.family.sparsity import ALL
from wanduet.family.spec import ModelSpec
from wanduet.family.step_caches import OFF

FIELD = "low_res_first"
# Of the sides of the whole video, the smaller ones first.
SCALES = (1 / 2, 2 / 3)
# The fewest pixels of a frame that a model still makes well, by the number of its blocks and their width; that of a model
# that is not listed is its default size. Wan2.1: a size of the published 480p weights (family/distilled.py), as both models
# make 480p and degrade at 240p. The miniature is trained at 96x96; 64x64 is for trying it out.
FEWEST_PIXELS: Mapping[tuple[int, int], int] = {(30, 1536): 448 * 832, (40, 5120): 448 * 832, (6, 256): 64 * 64}
# The spectrum of Wan's latents, power = POWER * frequency ** -DECAY, and how little a frequency must have been decided to be
# left out (the paper's delta). From the paper; SHARE is the most careful value that it reports.
POWER, DECAY = 219.484718, 2.422687
SHARE = 0.01


def low_size(height: int, width: int, spec: ModelSpec) -> tuple[int, int] | None:
    """Return height and width in pixels of the first steps of a video of a generated size; None if the model makes no video
    of such a size well."""
    multiple = spec.size_multiple
    fewest = _fewest_pixels(spec)
    for scale in SCALES:
        rows, columns = (max(multiple, round(side * scale / multiple) * multiple) for side in (height, width))
        if rows < height and columns < width and rows * columns >= fewest:
            return rows, columns
    return None


def last_low_level(ratio: float, side: int, share: float = SHARE) -> float:
    """Return the noise level 0..1 down to which a smaller video decides all that is not noise.

    `ratio`: of the sides of the larger to those of the smaller latents. `side`: rows or columns of the larger latents,
    whichever is less.
    """
    power = POWER * (side / (2 * ratio)) ** -DECAY
    return 1 / (1 + math.sqrt(share / (power * (1 + power - share))))


def check_low_res(fields: Mapping[str, Any], spec: ModelSpec) -> None:
    """Raise InvalidRequestError if a resolved request's `fields` do not go together with low resolution first."""
    if not fields[FIELD]:
        return
    size = fields["generated_height"], fields["generated_width"]
    steps = fields["num_inference_steps"]
    refusals = {
        "with few-step weights, whose first step already decides most of the video": bool(spec.defaults.timesteps),
        "with an input video, which replaces the first steps": fields["input_video"] is not None,
        "with timesteps: it follows the noise levels of a number of steps and a shift": fields["timesteps"] is not None,
        "with the sampler renoise": fields["sampler"] == "renoise",
        "with a step cache, which compares steps of one size": fields["step_cache"] != OFF,
        "with sparse attention, which is set up for one size": fields["sparse"] != ALL,
        "for a run of 1 step": steps < 2,
    }
    if reason := next((reason for reason, applies in refusals.items() if applies), None):
        raise InvalidRequestError(FIELD, True, f"false {reason}", False)
    if low_size(*size, spec) is None:
        fewest = math.ceil(_fewest_pixels(spec) / SCALES[-1] ** 2)
        allowed = (
            f"false for a video of {size[1]}x{size[0]}: {spec.name} does not make the smaller video of the first steps well. "
            f"About {fewest} pixels are needed; 1280x720 are {1280 * 720}"
        )
        raise InvalidRequestError(FIELD, True, allowed, False)


def _fewest_pixels(spec: ModelSpec) -> int:
    shape = (spec.transformer.num_layers, spec.transformer.dim)
    return FEWEST_PIXELS.get(shape, spec.defaults.height * spec.defaults.width)
