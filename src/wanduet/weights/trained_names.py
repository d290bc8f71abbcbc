"""The names of SLA's projections, which every project that converts TurboDiffusion's weights calls otherwise.

Known: `blocks.N.self_attn.attn_op.local_attn.proj_l` (TurboDiffusion), and `attn1.attn_op.local_attn.proj_l`,
`attn1.local_attn.proj_l`, `attn1.attn_impl.proj_l` in the Diffusers layout. VSA's gates have one name only.
"""

import re
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from wanduet.weights.source import WeightSource

if TYPE_CHECKING:
    from torch import Tensor

_PROJECTION = re.compile(r"(blocks\.\d+)\.(?:attn1|self_attn)(?:\.\w+)*\.(proj_l\.(?:weight|bias))")


def model_name(name: str) -> str:
    """Return the name that a tensor of a file has in wanduet's transformer."""
    match = _PROJECTION.fullmatch(name)
    return name if match is None else f"{match[1]}.attn1.{match[2]}"


def by_model_names(source: WeightSource) -> WeightSource:
    """Return a transformer's tensors by the names of wanduet's; `source` itself if all have them."""
    names = {model_name(name): name for name in source.tensors}
    if len(names) < len(source.tensors) or all(new == old for new, old in names.items()):
        return source  # two names of one tensor are refused later: one of them is not known
    return _Renamed(source, names)


class _Renamed(WeightSource):
    """A source's tensors by other names; `names`: those of the source by the new ones."""

    def __init__(self, source: WeightSource, names: dict[str, str]) -> None:
        super().__init__(source.name)
        self._source, self._names = source, names
        self.tensors = {new: source.tensors[old] for new, old in names.items()}

    def iterate(self, names: Collection[str]) -> "Iterator[tuple[str, Tensor]]":
        """See WeightSource."""
        new_of = {self._names[name]: name for name in names if name in self._names}
        for old, tensor in self._source.iterate(new_of):
            yield new_of[old], tensor

    def fingerprint(self) -> str:
        """See WeightSource."""
        return self._source.fingerprint()
