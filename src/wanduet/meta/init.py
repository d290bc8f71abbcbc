"""Modules on the meta device, to be given memory and weights later, or only to be looked at."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def meta_init() -> Iterator[None]:
    """Modules made in the block are on the meta device, and nobody draws their initial values.

    Without values there is nothing to draw; that PyTorch does not know makes it import the whole of its compiler first,
    which takes seconds.
    """
    with torch.device("meta"), _NothingToDraw():
        yield


class _NothingToDraw(TorchFunctionMode):
    """What `torch.nn.init` would do to a tensor is left out."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
