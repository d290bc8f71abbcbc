"""Peak memory of code that has not run: it runs on the meta device, and every allocation is counted.

Nothing is computed and nothing is allocated; what is counted is what the same code asks of the allocator on a
real device. What the code does not see (workspaces inside a library's kernels) is the planner's to add.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUNDING = 512  # bytes; the CUDA allocator's smallest unit


class Footprint(TorchDispatchMode):
    """Counts the bytes of tensors made inside the `with` block: `live` now, `peak` at most."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._seen.add(leaf.untyped_storage()._cdata)  # was there before: not this code's allocation
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without memory, to trace with."""
    return torch.empty(shape, dtype=dtype, device="meta")
