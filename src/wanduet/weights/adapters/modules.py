"""Names of the transformer's modules in the official and the Diffusers vocabulary, dotted or with underscores."""

import re
from functools import cache

MOST_BLOCKS = 80  # twice as many as the largest Wan has
_ATTENTION = {
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o", "norm_q": "norm_q", "norm_k": "norm_k",
    "add_k_proj": "k_img", "add_v_proj": "v_img", "norm_added_k": "norm_k_img",
}  # fmt: skip
_BLOCK = {
    **{f"attn1.{ours}": f"self_attn.{official}" for ours, official in _ATTENTION.items()},
    **{f"attn2.{ours}": f"cross_attn.{official}" for ours, official in _ATTENTION.items()},
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "scale_shift_table": "modulation",
}
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
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
    if (match := re.fullmatch(r"blocks\.(\d+)\.(.+)", module)) is None:
        return _OUTSIDE[module]
    return f"blocks.{match[1]}.{_BLOCK[match[2]]}"


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
    blocks = (f"blocks.{index}.{name}" for index in range(MOST_BLOCKS) for name in _BLOCK)
    found = {}
    for module in (*_OUTSIDE, *blocks):
        for name in (module, official_name(module)):
            found[name.replace(".", "_")] = module
    return found
