"""The noise a video starts from."""

import torch
from torch import Tensor


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal float32 of a latent shape, on the host.

    It comes from a CPU generator, so that a seed gives the same video on every GPU and on any number of
    them. (The official code draws it on the GPU, where it depends on the GPU's generation.)
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
