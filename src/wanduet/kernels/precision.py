"""Process-wide PyTorch settings of float32 precision, set only while wanduet computes.

PyTorch reads these settings when it launches an operation, and has none for a single thread or operation. So code that
computes keeps them at the value that it needs, and code that needs another value waits: two engines of different
precision can run in one process. Afterwards the program's own values are restored. A thread of the program that
computes in float32 at the same time uses wanduet's values.
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
    """A process-wide setting: threads that need the same value share it, others wait in order of arrival."""

    def __init__(self, change: Callable[[Value], Undo]) -> None:
        """`change(value)` sets the setting and returns a function that restores it."""
        self._change = change
        self._condition = threading.Condition()
        self._waiting: deque[object] = deque()
        self._users = 0
        self._value: Value | None = None
        self._undo: Undo = _nothing
        self._mine = threading.local()

    @contextmanager
    def at(self, value: Value) -> Iterator[None]:
        """Keep the setting at `value` inside the block. Nested blocks of a thread must use the same value.

        Raises RuntimeError for a nested block with another value, which would wait for its own thread.
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
                self._condition.notify_all()  # the next in the queue may need the same value

    def _end(self) -> None:
        with self._condition:
            self._users -= 1
            if self._users == 0:
                self._undo()
            self._condition.notify_all()


def _nothing() -> None:
    pass


def convolutions_use_tf32() -> bool:
    """Return True if PyTorch's float32 convolutions on a GPU currently round their operands to TF32."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the program uses the newer setting, which is for convolutions only
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
"""Whether float32 convolutions on GPUs round their operands to TF32."""
PRODUCTS: SharedSetting[str] = SharedSetting(_change_products)
"""Precision of float32 matrix products, for `torch.set_float32_matmul_precision`: "highest", or "high" for TF32."""

NEW_TENSORS: SharedSetting[torch.dtype] = SharedSetting(_change_new_tensors)
"""Dtype of tensors created without a `dtype` argument, for `torch.set_default_dtype`."""

EXACT = "highest"


@contextmanager
def vae_precision(tf32: bool | None) -> Iterator[None]:
    """Apply a VAE step's settings: exact products, and convolutions with or without TF32; None changes nothing."""
    if tf32 is None:
        yield
        return
    with PRODUCTS.at(EXACT), CONVOLUTIONS.at(tf32):
        yield
