"""Names of tensors in the layouts that Wan's weights are published in, and their names in a Diffusers checkpoint.

Each table has pairs of module names: of another layout, and of Diffusers (of transformers, for the text encoder). `#` is
a number that both have. Names are matched whole, so that `modulation` is not found in `head.modulation`. No tensor has
another shape in another layout. Sources: diffusers' `convert_wan_to_diffusers.py`, transformers' UMT5.
"""

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from wanduet.weights.source import WeightSource

if TYPE_CHECKING:  # headers are read and checked before torch is imported
    import torch
    from torch import Tensor

VERSION = 1  # part of fingerprints: a change of a table changes it
Pairs = Sequence[tuple[str, str]]

_BLOCK = (
    ("modulation", "scale_shift_table"),
    ("norm3", "norm2"),  # the only norm with weights; the order of the official ones is norm1, norm3, norm2
    *(
        (f"{ours}.{part}", f"{theirs}.{other}")
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, other in (
            *((name, f"to_{name}") for name in "qkv"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k"),
        )
    ),
    ("cross_attn.k_img", "attn2.add_k_proj"),
    ("cross_attn.v_img", "attn2.add_v_proj"),
    ("cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("ffn.0", "ffn.net.0.proj"),
    ("ffn.2", "ffn.net.2"),
)  # fmt: skip
_IMAGE = "condition_embedder.image_embedder"
TRANSFORMER: Pairs = (
    ("patch_embedding", "patch_embedding"),
    ("vace_patch_embedding", "vace_patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("head.head", "proj_out"),
    ("head.modulation", "scale_shift_table"),
    ("img_emb.proj.0", f"{_IMAGE}.norm1"),
    ("img_emb.proj.1", f"{_IMAGE}.ff.net.0.proj"),
    ("img_emb.proj.3", f"{_IMAGE}.ff.net.2"),
    ("img_emb.proj.4", f"{_IMAGE}.norm2"),
    ("img_emb.emb_pos", f"{_IMAGE}.pos_embed"),
    *(
        (f"{blocks}.#.{ours}", f"{blocks}.#.{theirs}")
        for blocks in ("blocks", "vace_blocks")
        for ours, theirs in _BLOCK
    ),
    ("vace_blocks.#.before_proj", "vace_blocks.#.proj_in"),
    ("vace_blocks.#.after_proj", "vace_blocks.#.proj_out"),
)
_LAYER, _FEED_FORWARD = "encoder.block.#.layer", "1.DenseReluDense"
UMT5: Pairs = (
    ("token_embedding", "shared"),
    ("norm", "encoder.final_layer_norm"),
    ("blocks.#.norm1", f"{_LAYER}.0.layer_norm"),
    *((f"blocks.#.attn.{name}", f"{_LAYER}.0.SelfAttention.{name}") for name in "qkvo"),
    ("blocks.#.pos_embedding.embedding", f"{_LAYER}.0.SelfAttention.relative_attention_bias"),
    ("blocks.#.norm2", f"{_LAYER}.1.layer_norm"),
    ("blocks.#.ffn.gate.0", f"{_LAYER}.{_FEED_FORWARD}.wi_0"),
    ("blocks.#.ffn.fc1", f"{_LAYER}.{_FEED_FORWARD}.wi_1"),
    ("blocks.#.ffn.fc2", f"{_LAYER}.{_FEED_FORWARD}.wo"),
)
# Entries that are no weights of the model: markers and tables of other programs, the tokenizer in ComfyUI's file.
IGNORED = re.compile(r"freqs|scaled_fp8|spiece_model|model_type\..*|.*\.norm_added_q\.weight|logit_scale")


def vae_pairs(resnets: int, levels: int) -> Pairs:
    """Return the table of Wan2.1's VAE. `resnets`: residual blocks in each of the decoder's `levels`."""
    pairs = [("conv1", "quant_conv"), ("conv2", "post_quant_conv")]
    for side in ("encoder", "decoder"):
        pairs += [(f"{side}.conv1", f"{side}.conv_in"), (f"{side}.head.0", f"{side}.norm_out")]
        pairs += [(f"{side}.head.2", f"{side}.conv_out")]
        pairs += _residual(f"{side}.middle.0", f"{side}.mid_block.resnets.0")
        pairs += _residual(f"{side}.middle.2", f"{side}.mid_block.resnets.1")
        attention = f"{side}.mid_block.attentions.0"
        pairs += [(f"{side}.middle.1.{name}", f"{attention}.{name}") for name in ("norm", "to_qkv", "proj")]
    pairs += _residual("encoder.downsamples.#", "encoder.down_blocks.#")
    pairs += _resampling("encoder.downsamples.#", "encoder.down_blocks.#")
    for level in range(levels):
        first = level * (resnets + 1)
        for index in range(resnets):
            pairs += _residual(f"decoder.upsamples.{first + index}", f"decoder.up_blocks.{level}.resnets.{index}")
        pairs += _resampling(f"decoder.upsamples.{first + resnets}", f"decoder.up_blocks.{level}.upsamplers.0")
    return pairs


def _residual(ours: str, theirs: str) -> list[tuple[str, str]]:
    parts = (("residual.0", "norm1"), ("residual.2", "conv1"), ("residual.3", "norm2"), ("residual.6", "conv2"))
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in (*parts, ("shortcut", "conv_shortcut"))]


def _resampling(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [(f"{ours}.{name}", f"{theirs}.{name}") for name in ("resample.1", "time_conv")]


def vae_size(names: Collection[str]) -> tuple[int, int]:
    """Return `vae_pairs`' numbers of residual blocks and levels, from the names of either layout; (0, 0) for others."""
    found = [int(m[1]) for name in names if (m := re.match(r"decoder\.upsamples\.(\d{1,3})\.", name))]
    up = [int(m[1]) for name in names if (m := re.match(r"decoder\.upsamples\.(\d{1,3})\.resample\.", name))]
    if found and up:
        return min(up), (max(found) + 1) // (min(up) + 1) + 1
    blocks = [
        m.groups() for name in names if (m := re.match(r"decoder\.up_blocks\.(\d{1,3})\.resnets\.(\d{1,3})\.", name))
    ]
    return (
        max((int(b) for _, b in blocks), default=-1) + 1, max((int(a) for a, _ in blocks), default=-1) + 1
    )  # fmt: skip


def pairs_for(component: str, layout: str, names: Collection[str]) -> Pairs:
    """Return the table of a component's layout; an empty one if `names` are those of Diffusers already."""
    if layout != "official":
        return ()
    if component == "vae":
        return vae_pairs(*vae_size(names))
    return TRANSFORMER if component == "transformer" else UMT5


def renamed(names: Iterable[str], pairs: Pairs) -> dict[str, str]:
    """Return the new name of each name that a table has; both by a module's name and an optional last part (`weight`).

    With the pairs swapped, it gives a layout's names from those of Diffusers.
    """
    table = dict(pairs)
    found = {}
    for name in names:
        module, _, last = name.rpartition(".")
        for whole, end in ((name, ""), (module, f".{last}")):
            numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", whole)
            for pattern in (whole, *_patterns(whole)):
                if (new := table.get(pattern)) is not None:
                    found[name] = new.replace("#", numbers[0] if numbers else "#") + end
                    break
            if name in found:
                break
    return found


def _patterns(name: str) -> Iterator[str]:
    """Yield a name with its first number as `#`."""
    if "#" not in name and (match := re.search(r"(?<=\.)\d+(?=\.|$)", name)):
        yield f"{name[: match.start()]}#{name[match.end() :]}"


class Renamed(WeightSource):
    """Another source's tensors under other names; tensors that `names` does not have are left out."""

    def __init__(self, source: WeightSource, names: Mapping[str, str], label: str) -> None:
        """`names`: new name of each stored name. `label`: the component's name in messages."""
        super().__init__(label)
        self._source = source
        self.metadata, self.quantisation = source.metadata, source.quantisation
        self._stored = {new: stored for stored, new in names.items()}
        self.tensors = {new: source.tensors[stored] for new, stored in self._stored.items()}

    def iterate(self, names: Collection[str]) -> "Iterator[tuple[str, Tensor]]":
        """Yield the named tensors in the order of the source. Raises WeightsError."""
        wanted = {self._stored[name]: name for name in names if name in self._stored}
        for stored, tensor in self._source.iterate(wanted):
            yield wanted[stored], tensor

    def read_rows(self, name: str, rows: Sequence[int], dtype: "torch.dtype") -> "Tensor":
        """See WeightSource."""
        self.require([name])
        return self._source.read_rows(self._stored[name], rows, dtype)

    def fingerprint(self) -> str:
        """Return a digest of the source's and of the names."""
        names = f"{VERSION}{sorted(self._stored.items())}"
        return hashlib.sha256((self._source.fingerprint() + names).encode()).hexdigest()
