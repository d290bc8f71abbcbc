"""The current device: what launches kernels outside PyTorch's own operations."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(x: Tensor | torch.device) -> AbstractContextManager[object]:
    """A block in which a tensor's device is the current one. Triton launches on that, whatever it is given."""
    device = x.device if isinstance(x, Tensor) else x
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
