"""The names of a LoRA file's tensors: `[prefix] module [suffix]`, in the spelling of any trainer."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from wanduet.weights.adapters.modules import find_module

TEXT_ENCODER = "of a text encoder, which LoRA here does not change"
_LONGEST = 400  # characters of a name that is looked at
_NAME = r"(?:\.(?!bias$)[^.]+)?"  # PEFT's name of the adapter
# The suffixes by what they mean: `down` and `up` are A and B of a LoRA.
_SUFFIXES = {
    "down": rf"lora_A{_NAME}(?:\.weight)?|lora_down(?:\.weight)?|lora(?:_linear_layer)?\.down(?:\.weight)?",
    "up": rf"lora_B{_NAME}(?:\.weight)?|lora_up(?:\.weight)?|lora(?:_linear_layer)?\.up(?:\.weight)?",
    "up_bias": rf"lora_B{_NAME}\.bias|lora_up\.bias",
    "alpha": r"alpha",
    "diff": r"diff",
    "diff_b": r"diff_b",
    "diff_m": r"diff_m",
    "dora_scale": r"dora_scale",
    "magnitude": rf"lora_magnitude_vector{_NAME}(?:\.weight)?",
    **{name: name + _NAME for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
    **{name: name + _NAME for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    # Known, but not of Wan's trainers; what they would mean for a transformer of linear layers is not defined.
    "refused": r"w_norm|b_norm|set_weight|reshape_weight|oft_blocks|oft_diag|lora_mid(?:\.weight)?|hada_t[12]|lokr_t2",
}
_KEY = re.compile(rf"(?P<module>.+?)[._](?:{'|'.join(f'(?P<{name}>{form})' for name, form in _SUFFIXES.items())})")
_DROPPED = re.compile(r"\.default(?=\.|$)|_orig_mod\.")
_TEXT_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:lora_te\d*_|text_encoders?\w*\.|te\d?\.|cond_stage_model\.)")
_EXPERT = re.compile(r"(?:^|\.)transformer_([12])\.")


@dataclass
class Keys:
    """A LoRA file's tensor names, sorted.

    `groups`: by the module's Diffusers name, then by what they mean. `twice`: pairs of names that mean the same.
    `refused`: with a suffix that is not supported. `unknown`: of no known module. `plain`: without a suffix. `experts`:
    which of Wan2.2's two transformers are named. `ignored`: number of tensors by the reason.
    """

    groups: dict[str, dict[str, str]] = field(default_factory=dict)
    twice: list[tuple[str, str]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    experts: set[str] = field(default_factory=set)
    ignored: Counter[str] = field(default_factory=Counter)


def sort_keys(names: Iterable[str]) -> Keys:
    """Sort the tensor names of a LoRA file by what they mean."""
    keys = Keys()
    for name in names:
        if _TEXT_ENCODER.match(name):
            keys.ignored[TEXT_ENCODER] += 1
        else:
            _sort(name, keys)
    return keys


def _sort(name: str, keys: Keys) -> None:
    match = _KEY.fullmatch(_DROPPED.sub("", name)) if len(name) <= _LONGEST else None
    if match is None or match.lastgroup is None:
        keys.plain.append(name)
        return
    written, meaning = match["module"], match.lastgroup
    module = find_module(written)
    if meaning == "diff_m":  # LightX2V: of the modulation beside the modules of a block, or of the head
        module, meaning = find_module(f"{written}.modulation") or find_module(f"{written}.scale_shift_table"), "diff"
    if module is None:
        keys.unknown.append(name)
    elif meaning == "refused":
        keys.refused.append(name)
    else:
        keys.experts.update(_EXPERT.findall(name))
        if (first := keys.groups.setdefault(module, {}).setdefault(meaning, name)) != name:
            keys.twice.append((first, name))
