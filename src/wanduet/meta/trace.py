"""Predicts the peak memory of code by running it on the meta device and simulating the CUDA allocator.

Nothing is computed and nothing is allocated: the allocations that the same code makes on a real device are counted, and
placed where the allocator would. The planner adds what is not seen here, as workspaces inside a library's kernels.
"""

import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wanduet.meta.results import meta_result

ROUNDING = 512  # bytes; the CUDA allocator's smallest unit
SMALL = 2**20  # bytes; the CUDA allocator serves sizes up to this from a pool of their own


class SimulatedAllocator:
    """One pool of PyTorch's CUDA allocator with `expandable_segments`: best fit, split, merge, else grow at the end.

    `top`: the bytes that it has reserved, which it keeps while code runs. Source: c10/cuda/CUDACachingAllocator.cpp.
    """

    def __init__(self) -> None:
        self.top = 0
        self._holes: dict[int, int] = {}  # offset to size; never adjacent

    def allocate(self, size: int) -> int:
        """The offset at which `size` bytes are placed."""
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

    def free(self, offset: int, size: int) -> None:
        """Make an allocation a hole, merged with adjacent holes."""
        size += self._holes.pop(offset + size, 0)
        for before, hole in self._holes.items():
            if before + hole == offset:
                self._holes[before] = hole + size
                return
        self._holes[offset] = size


class _Active(threading.local):
    """The footprints being measured in this thread, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Footprint] = []


_active = _Active()


class Footprint(TorchDispatchMode):
    """Counts the bytes of meta tensors made in the `with` block, as `torch.cuda.memory_allocated` and
    `memory_reserved` do.

    `allocated`: bytes of the tensors that exist now. If footprints are nested, only the innermost one counts.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated = 0
        self._small, self._large = SimulatedAllocator(), SimulatedAllocator()
        self._seen: set[int] = set()

    @property
    def reserved(self) -> int:
        """Bytes that the allocator has reserved since the block began, holes included."""
        return self._small.top + self._large.top

    def __enter__(self) -> Self:
        _active.stack.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        _active.stack.remove(self)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: otherwise PyTorch imports its compiler, only to disable it here, where it is never used."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _active.stack[-1] is not self:
            return func(*args, **kwargs)
        _visit(args, self._ignore)
        if kwargs:
            _visit(kwargs.values(), self._ignore)
        result = meta_result(func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        if not args or result is not args[0]:  # what an operation in place returns is known
            _visit((result,), self._count)
        return result

    def _ignore(self, tensor: Tensor) -> None:
        """Do not count a tensor that was made before the block."""
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
        pool = self._small if size <= SMALL else self._large
        self.allocated += size
        weakref.finalize(storage, self._free, key, size, pool, pool.allocate(size))

    def _free(self, key: int, size: int, pool: SimulatedAllocator, offset: int) -> None:
        self._seen.discard(key)
        self.allocated -= size
        pool.free(offset, size)


def _visit(values: Iterable[Any], note: Callable[[Tensor], None]) -> None:
    """Call `note` with the meta tensors among an operation's arguments or results, including those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            if value.is_meta:
                note(value)
        elif isinstance(value, (list, tuple)):
            _visit(value, note)


def meta_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor on the meta device."""
    return torch.empty(shape, dtype=dtype, device="meta")
