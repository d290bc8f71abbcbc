"""The noise of a video: what it begins with, and what later steps add."""

import hashlib

import torch
from torch import Tensor


def initial_noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return standard normal noise, float32, of a latent shape, on the host.

    It uses a CPU generator, so that a seed gives the same video on any model and number of GPUs. (The official code
    uses a GPU generator, whose values depend on the GPU's generation.)
    """
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def step_noise(shape: tuple[int, ...], seed: int, step: int) -> Tensor:
    """Return the noise that the sampler adds after step `step` (from 0) of a video of this seed, as `initial_noise`.

    Its generator's seed is a hash: consecutive seeds, as the videos of one prompt have, share no noise.
    """
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    return initial_noise(shape, int.from_bytes(digest[:7]))
