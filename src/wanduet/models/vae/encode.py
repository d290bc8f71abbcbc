"""Encodes a video to latents as a stream: memory does not grow with the number of frames."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from wanduet.errors import NonFiniteFramesError
from wanduet.kernels.host_copy import HostCopy
from wanduet.models.vae.layers import FeatureCache
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.stream import HINT, Frames


@torch.no_grad()
def encode_stream(
    vae: WanVAE, frames: Iterable[Frames], num_tiles: int = 1, on_frames: Callable[[int], None] | None = None
) -> Tensor:
    """Encode RGB frames to normalised latents `[16, T, h, w]`, float32 on the host: the mode of the posterior.

    `frames` yields `[t, H, W, 3]` uint8, first one frame, then four at a time; H and W are multiples of 8. A chunk's
    memory may be reused once the next one is requested. `num_tiles`: the encoder's layers run in that many row tiles,
    which gives the same latents with less memory. `on_frames(done)` is called with the number of frames encoded so far.
    May run in any thread, one video at a time for each `vae`. Raises ValueError for chunks of another number of frames
    or for none, NonFiniteFramesError for NaN or infinity.
    """
    feature_cache: FeatureCache = None
    latents: list[Tensor] = []
    before: HostCopy | None = None
    done = 0
    vae.reuse_caches()
    try:
        for chunk in frames:
            expected = vae.spec.temporal_stride if done else 1
            if len(chunk) != expected:
                raise ValueError(f"A chunk of {len(chunk)} frames after {done} frames must have {expected}.")
            moments, feature_cache = vae.encode_step(_pixels(vae, chunk), feature_cache, num_tiles)
            # While this chunk is encoded, the latents of the one before are copied and the next frames are read.
            copying = HostCopy(vae.normalize(moments.chunk(2, dim=1)[0].float())[0])
            if before is not None:
                latents.append(_arrived(before))
            before = copying
            done += len(chunk)
            if on_frames is not None:
                on_frames(done)
        if before is None:
            raise ValueError("There are no frames to encode.")
        return torch.cat([*latents, _arrived(before)], dim=1)
    finally:
        vae.reuse_caches(False)


def _pixels(vae: WanVAE, chunk: Frames) -> Tensor:
    """Frames `[t, H, W, 3]` uint8 to pixels `[1, 3, t, H, W]` in [-1, 1], on the VAE's device in its dtype."""
    weight = vae.quant_conv.weight
    frames = torch.from_numpy(np.ascontiguousarray(chunk))
    if weight.is_cuda:  # otherwise the copy would wait for all work queued on the device
        frames = frames.pin_memory()
    pixels = frames.to(weight.device, non_blocking=True).permute(3, 0, 1, 2)[None]
    return pixels.float().div_(127.5).sub_(1.0).to(weight.dtype)


def _arrived(copying: HostCopy) -> Tensor:
    """One step's latents `[16, 1, h, w]`, once they are on the host. Raises NonFiniteFramesError."""
    latents = copying.wait()
    if latents.is_meta:
        return torch.empty_like(latents, device="cpu")
    if not torch.isfinite(latents).all():
        raise NonFiniteFramesError("The VAE gave NaN or infinity instead of the input video's latents.", hint=HINT)
    return latents
