"""A tensor under way to the host, which may go on meanwhile."""

import torch
from torch import Tensor


class HostCopy:
    """Begins to copy a tensor to the host, after what has been launched so far; one of the host is taken as it is."""

    def __init__(self, x: Tensor) -> None:
        self._host, self._copied = x, None
        if x.is_cuda:
            self._host = torch.empty_like(x, device="cpu", pin_memory=True)
            self._host.copy_(x, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(x.device))

    def wait(self) -> Tensor:
        """The copy, once it is there; from any thread."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host
