"""Asynchronous copy of a tensor to the host."""

import torch
from torch import Tensor


class HostCopy:
    """Starts to copy a tensor to the host, after the kernels launched so far; a tensor on the host is not copied."""

    def __init__(self, x: Tensor) -> None:
        self._host, self._copied = x, None
        if x.is_cuda:
            self._host = torch.empty_like(x, device="cpu", pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(x.device))

    def wait(self) -> Tensor:
        """Wait for the copy and return it; callable from any thread."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
