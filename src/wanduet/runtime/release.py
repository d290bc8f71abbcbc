"""Giving memory back: the allocators' caches, what only garbage still refers to, and what a failure's traceback keeps."""

import gc
import traceback
from collections.abc import Iterator, Mapping

import torch
from torch import nn


def release_memory() -> None:
    """Give cached blocks back to the devices, and cached page-locked ones to the system."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        # Where copies to the host have been; PyTorch has no public name for it, and some versions none at all.
        getattr(torch._C, "_host_emptyCache", lambda: None)()


def trim_cache(planned: Mapping[str, int]) -> None:
    """Give cached blocks back where a device's allocator holds more than is planned for the next job, in bytes by device:
    a larger job before has left them, and they would count as what the next one takes."""
    if torch.cuda.is_available():
        cuda = {name: most for name, most in planned.items() if torch.device(name).type == "cuda"}
        if any(torch.cuda.memory_reserved(name) > most for name, most in cuda.items()):
            release_memory()


def release_models() -> None:
    """After models were dropped: collect what refers to itself, whose memory would wait for Python's own collection, which
    counts objects and not gigabytes; then as `release_memory`."""
    gc.collect()
    release_memory()


def drop_memory(module: nn.Module) -> None:
    """Leave a module's parameters and buffers without memory, whoever may still refer to the module."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def forget_traceback(error: BaseException) -> None:
    """Drop the tracebacks of an error and of its causes: their frames keep local variables alive, tensors among them."""
    for one in _chain(error):
        traceback.clear_frames(one.__traceback__)  # somebody else may refer to them too
        one.__traceback__ = None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and all that it comes from."""
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
