"""How precise float32 arithmetic is: settings of PyTorch's that hold for the whole process, set around our work only.

PyTorch asks them when an operation is launched, and has no form of them for one thread or one operation. So whoever
computes holds them at the value that it needs, and work that needs another value waits for it: two engines of different
precision in one process each get their own. Afterwards they are as the program has set them. A thread of the program that
computes in float32 at the same moment has our setting.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

Value = TypeVar("Value")
Undo = Callable[[], None]


class SharedSetting(Generic[Value]):
    """A setting of the process that work needs at a value: shared by all who need the same, in the order of asking."""

    def __init__(self, change: Callable[[Value], Undo]) -> None:
        """`change` sets it and returns what sets it back."""
        self._change = change
        self._condition = threading.Condition()
        self._waiting: deque[object] = deque()
        self._users = 0
        self._value: Value | None = None
        self._undo: Undo = _nothing
        self._mine = threading.local()

    @contextmanager
    def at(self, value: Value) -> Iterator[None]:
        """The length of the block it has this value. A block within a block of the same thread must want the same.

        Raises RuntimeError where it does not: it would wait for itself.
        """
        outer = getattr(self._mine, "values", ())
        if outer:
            if outer[-1] != value:
                raise RuntimeError(f"This thread has the setting at {outer[-1]!r} and cannot have it at {value!r}.")
            yield
            return
        self._begin(value)
        self._mine.values = (value,)
        try:
            yield
        finally:
            self._mine.values = ()
            self._end()

    def _begin(self, value: Value) -> None:
        ticket = object()
        with self._condition:
            self._waiting.append(ticket)
            try:
                self._condition.wait_for(
                    lambda: self._waiting[0] is ticket and (self._users == 0 or self._value == value)
                )
                if self._users == 0:
                    self._undo, self._value = self._change(value), value
                self._users += 1
            finally:
                self._waiting.remove(ticket)
                self._condition.notify_all()  # who is next may want the same

    def _end(self) -> None:
        with self._condition:
            self._users -= 1
            if self._users == 0:
                self._undo()
            self._condition.notify_all()


def _nothing() -> None:
    pass


def convolutions_use_tf32() -> bool:
    """Whether PyTorch's float32 convolutions on a GPU round their factors to TF32 at this moment."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the program has used the newer setting, for convolutions alone
        conv = getattr(torch.backends.cudnn, "conv")  # noqa: B009 - PyTorch's annotations lack it
        return bool(conv.fp32_precision == "tf32")


def _change_convolutions(tf32: bool) -> Undo:
    if convolutions_use_tf32() == tf32:
        return _nothing
    try:
        before: bool = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return _set_newer(getattr(torch.backends.cudnn, "conv"), "tf32" if tf32 else "ieee")  # noqa: B009
    torch.backends.cudnn.allow_tf32 = tf32
    return lambda: setattr(torch.backends.cudnn, "allow_tf32", before)


def _change_products(precision: str) -> Undo:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        name = {"highest": "ieee", "high": "tf32"}[precision]
        undone = [_set_newer(part.matmul, name) for part in (torch.backends.cuda, torch.backends.mkldnn)]
        return lambda: [undo() for undo in undone].clear()
    if before == precision:
        return _nothing
    torch.set_float32_matmul_precision(precision)
    return lambda: torch.set_float32_matmul_precision(before)


def _set_newer(part: object, precision: str) -> Undo:
    before = part.fp32_precision  # type: ignore[attr-defined]
    part.fp32_precision = precision  # type: ignore[attr-defined]
    return lambda: setattr(part, "fp32_precision", before)


def _change_new_tensors(dtype: torch.dtype) -> Undo:
    before = torch.get_default_dtype()
    if before == dtype:
        return _nothing
    torch.set_default_dtype(dtype)
    return lambda: torch.set_default_dtype(before)


CONVOLUTIONS: SharedSetting[bool] = SharedSetting(_change_convolutions)
"""Whether float32 convolutions on GPUs round their factors to TF32."""
PRODUCTS: SharedSetting[str] = SharedSetting(_change_products)
"""Of float32 matrix products, as `torch.set_float32_matmul_precision` names it: "highest", or "high" for TF32."""

NEW_TENSORS: SharedSetting[torch.dtype] = SharedSetting(_change_new_tensors)
"""Of tensors that are made without a word on it, as `torch.set_default_dtype` sets it."""

EXACT = "highest"


@contextmanager
def vae_precision(tf32: bool | None) -> Iterator[None]:
    """The settings of a VAE's step: exact products, and convolutions with TF32 or without it; with None as they are."""
    if tf32 is None:
        yield
        return
    with PRODUCTS.at(EXACT), CONVOLUTIONS.at(tf32):
        yield
