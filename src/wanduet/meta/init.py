"""Makes modules on the meta device, which get memory and weights later, or are only traced."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextmanager
def meta_init() -> Iterator[None]:
    """Make modules in the block on the meta device, and skip their weights' initialisation.

    PyTorch would initialise even meta tensors, for which it first imports its whole compiler, which takes seconds.
    """
    with torch.device("meta"), _SkipInit():
        yield


class _SkipInit(TorchFunctionMode):
    """Replaces the functions of `torch.nn.init` by ones that return the tensor unchanged."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)
