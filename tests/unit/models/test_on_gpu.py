"""A decode on a GPU, where copies to and from the host run beside it. `pytest -m gpu`."""

import numpy as np
import pytest
import torch

from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.select import vae_kernels_for
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import Tiling
from wanduet.models.vae.stream import decode_stream

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_any_cut_gives_the_same_frames(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    vae = WanVAE(WAN_1_3B.vae).to(DEVICE, dtype).eval().requires_grad_(False)
    vae.channels_last()
    vae.use_kernels(vae_kernels_for(DEVICE, dtype, vae.spec.base_dim))
    latents = torch.randn(16, 6, 45, 60)

    def decode(tiling: Tiling) -> np.ndarray:
        return np.concatenate([frames.copy() for frames in decode_stream(vae, latents, tiling)])

    whole = decode(Tiling())
    assert whole.std() > 5  # else a mistake would not be seen
    plans = [Tiling(order, strips) for order in ("frame", "strip") for strips in (2, 3, 7, 45)]
    for plan in [*plans, *plans]:  # the second time in memory that was in use before
        assert np.array_equal(decode(plan), whole), plan
