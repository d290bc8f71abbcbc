"""The initial noise of a video."""

import torch
from torch import Tensor


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return standard normal noise, float32, of a latent shape, on the host.

    It uses a CPU generator, so that a seed gives the same video on any model and number of GPUs. (The official code
    uses a GPU generator, whose values depend on the GPU's generation.)
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
