"""The names of SLA's projections, which every project that converts TurboDiffusion's weights calls otherwise.

Known: `blocks.N.self_attn.attn_op.local_attn.proj_l` (TurboDiffusion), and `attn1.attn_op.local_attn.proj_l`,
`attn1.local_attn.proj_l`, `attn1.attn_impl.proj_l` in the Diffusers layout. VSA's gates have one name only.
"""

import re

from wanduet.weights.keymaps import Renamed
from wanduet.weights.source import WeightSource

_PROJECTION = re.compile(r"(blocks\.\d+)\.(?:attn1|self_attn)(?:\.\w+)*\.(proj_l\.(?:weight|bias))")


def model_name(name: str) -> str:
    """Return the name that a tensor of a file has in wanduet's transformer."""
    match = _PROJECTION.fullmatch(name)
    return name if match is None else f"{match[1]}.attn1.{match[2]}"


def by_model_names(source: WeightSource) -> WeightSource:
    """Return a transformer's tensors by the names of wanduet's; `source` itself if all have them."""
    names = {name: model_name(name) for name in source.tensors}
    if len(set(names.values())) < len(names) or all(new == old for old, new in names.items()):
        return source  # two names of one tensor are refused later: one of them is not known
    return Renamed(source, names, source.name)
