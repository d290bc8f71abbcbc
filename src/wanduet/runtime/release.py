"""Freeing memory: the allocators' caches, unreachable reference cycles, and tensors that an error's traceback keeps."""

import gc
import traceback
from collections.abc import Iterator, Mapping

import torch
from torch import nn


def release_memory() -> None:
    """Free the CUDA allocator's cached blocks, and its cached page-locked host memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        # The page-locked memory of copies to the host. PyTorch has no public name for it, and some versions none at
        # all.
        getattr(torch._C, "_host_emptyCache", lambda: None)()


def trim_cache(planned: Mapping[str, int]) -> None:
    """Free cached blocks if a device's allocator has reserved more than the bytes `planned` for the next job, by
    device. A larger job before may have left them, and they would count in the next job's peak."""
    if torch.cuda.is_available():
        cuda = {name: most for name, most in planned.items() if torch.device(name).type == "cuda"}
        if any(torch.cuda.memory_reserved(name) > most for name, most in cuda.items()):
            release_memory()


def release_models() -> None:
    """Collect garbage, then call `release_memory`; for use after models were dropped. Python's own collection of
    reference cycles is triggered by the number of objects, not by gigabytes, and would come too late."""
    gc.collect()
    release_memory()


def drop_memory(module: nn.Module) -> None:
    """Free the memory of a module's parameters and buffers, even if references to the module remain."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def forget_traceback(error: BaseException) -> None:
    """Drop the tracebacks of an error and of its causes. Their frames keep local variables alive, including tensors."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)  # other code may refer to the frames too
        one.__traceback__ = None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all its causes, contexts and members of groups."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, BaseExceptionGroup):
            waiting += one.exceptions
