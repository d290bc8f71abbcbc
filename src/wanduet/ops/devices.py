"""The current device, for what launches kernels outside PyTorch's own operations; and how its memory is handed out."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device_of(x: Tensor | torch.device) -> AbstractContextManager[object]:
    """A block in which a tensor's device is the current one. Triton launches on that, whatever it is given."""
    device = x.device if isinstance(x, Tensor) else x
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def prepare_allocator() -> None:
    """Let PyTorch's CUDA allocator grow its blocks instead of keeping one for each size it was ever asked for.

    A decode's tensors differ from layer to layer; with fixed blocks the allocator held up to 1.8 times what they
    took. To be called before the first allocation. Where somebody has set the allocator up, or on Windows, which has no
    such memory mapping, nothing is changed.
    """
    chosen = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF")
    if sys.platform == "linux" and torch.cuda.is_available() and not chosen:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
