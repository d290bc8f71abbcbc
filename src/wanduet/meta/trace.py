"""Peak memory of code that has not run: it runs on the meta device, and every allocation is counted.

Nothing is computed and nothing is allocated; what is counted is what the same code asks of the allocator on a
real device, and where the allocator would put it. What the code does not see (workspaces inside a library's kernels)
is the planner's to add.
"""

import threading
import weakref
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wanduet.meta.results import meta_result

ROUNDING = 512  # bytes; the CUDA allocator's smallest unit
SMALL = 2**20  # bytes; up to here the CUDA allocator uses memory of its own


class SimulatedAllocator:
    """Where a caching allocator with growing blocks puts things: in the smallest hole that is large enough, else at the
    end. `top` is how far it has grown, which it never gives back while code runs.

    As PyTorch's CUDA allocator with `expandable_segments` (c10/cuda/CUDACachingAllocator.cpp: best fit, split, merge).
    """

    def __init__(self) -> None:
        self.top = 0
        self._holes: dict[int, int] = {}  # offset to size; never two side by side

    def take(self, size: int) -> int:
        """Where so many bytes go."""
        fitting = [(hole, offset) for offset, hole in self._holes.items() if hole >= size]
        if fitting:
            hole, offset = min(fitting)
            del self._holes[offset]
            if hole > size:
                self._holes[offset + size] = hole - size
            return offset
        offset = next((o for o, hole in self._holes.items() if o + hole == self.top), self.top)
        self._holes.pop(offset, None)
        self.top = offset + size
        return offset

    def give_back(self, offset: int, size: int) -> None:
        """What was taken is a hole, and one with the holes beside it."""
        size += self._holes.pop(offset + size, 0)
        for before, hole in self._holes.items():
            if before + hole == offset:
                self._holes[before] = hole + size
                return
        self._holes[offset] = size


class _Counting(threading.local):
    """The footprints that are being taken in this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Footprint] = []


_counting = _Counting()


class Footprint(TorchDispatchMode):
    """Counts the bytes of tensors made inside the `with` block: `live` now, `held` by the allocator at most.

    Within another, which sees nothing of what this one sees.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self._small, self._large = SimulatedAllocator(), SimulatedAllocator()
        self._seen: set[int] = set()

    @property
    def held(self) -> int:
        """What the allocator has taken from the device since the block began, holes included."""
        return self._small.top + self._large.top

    def __enter__(self) -> Self:
        _counting.stack.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _counting.stack.remove(self)
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch would import its compiler to keep it away from what is done here, which it never sees."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _counting.stack[-1] is not self:
            return func(*args, **kwargs)
        for tensor in _meta_tensors((*args, *kwargs.values())):
            self._know(tensor)
        result = meta_result(func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        for tensor in _meta_tensors((result,)):
            self._count(tensor)
        return result

    def _know(self, tensor: Tensor) -> None:
        """What was there before is not this code's allocation."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            weakref.finalize(storage, self._seen.discard, storage._cdata)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = -(-storage.nbytes() // ROUNDING) * ROUNDING
        arena = self._small if size <= SMALL else self._large
        self.live += size
        weakref.finalize(storage, self._free, key, size, arena, arena.take(size))

    def _free(self, key: int, size: int, arena: SimulatedAllocator, offset: int) -> None:
        self._seen.discard(key)
        self.live -= size
        arena.give_back(offset, size)


def _meta_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among an operation's arguments or results, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_meta:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from _meta_tensors(value)


def meta_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor without memory, to trace with."""
    return torch.empty(shape, dtype=dtype, device="meta")
