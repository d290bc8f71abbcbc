"""Names of the transformer's modules in the official and the Diffusers vocabulary, dotted or with underscores."""

import re
from functools import cache

from wanduet.weights.keymaps import TRANSFORMER

MOST_BLOCKS = 80  # twice as many as the largest Wan has
# Official names by those of Diffusers; `#` is a block's number. VACE's own blocks are in no text to video model.
_OFFICIAL = {ours: official for official, ours in TRANSFORMER if not official.startswith("vace_")}
# What trainers put before a module's name, with underscores in place of dots.
_PREFIXES = (
    "base_model_model", "diffusion_model", "transformer_1", "transformer_2", "transformer", "lora_transformer",
    "pipe_dit", "lora_unet", "lycoris", "model", "module", "unet", "dit",
)  # fmt: skip
_PREFIX = re.compile(rf"(?:{'|'.join(sorted(_PREFIXES, key=len, reverse=True))})_+")
_IMAGE = re.compile(r"\.(?:add_[kv]_proj|norm_added_[kq]|image_embedder)\b")


def official_name(module: str) -> str:
    """Return the official name of a module, or of a parameter that is none's weight, from its Diffusers name:
    `blocks.0.self_attn.q` for `blocks.0.attn1.to_q`. Raises KeyError for an unknown one."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    return _OFFICIAL[module] if match is None else _OFFICIAL[f"blocks.#.{match[2]}"].replace("#", match[1])


def find_module(written: str) -> str | None:
    """Return the Diffusers name of a module as a LoRA file spells it, with any prefix; None if it is none of Wan's.

    The name is compared with the model's own names, all dots replaced by underscores: an underscore in a file may stand
    for a dot or be part of a name.
    """
    rest = written.replace(".", "_").strip("_")
    while (found := _modules().get(rest)) is None:
        if (prefix := _PREFIX.match(rest)) is None:
            return None
        rest = rest[prefix.end() :]
    return found


def is_image_module(module: str) -> bool:
    """Return True for a module that only image-conditioned members have."""
    return _IMAGE.search(module) is not None


@cache
def _modules() -> dict[str, str]:
    found = {}
    for name in _OFFICIAL:
        for module in [name.replace("#", str(index)) for index in range(MOST_BLOCKS if "#" in name else 1)]:
            for spelled in (module, official_name(module)):
                found[spelled.replace(".", "_")] = module
    return found
