"""Softmax attention back ends behind one signature: q, k, v `[B, L, H, D]` in, `[B, L, H, D]` out."""

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

AttentionFn: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own choice of kernel. Any device, any dtype; the reference for every other back end."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)
