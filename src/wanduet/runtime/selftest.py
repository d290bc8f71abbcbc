"""A check of loaded weights: one small forward must give finite values of a plausible magnitude."""

import torch

from wanduet.errors import WeightsError
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE

# A velocity (noise - video) has a standard deviation of about 1.4 for any trained model; weights that were
# mis-loaded give values that vanish, explode, or are NaN.
SANE_STD = (0.05, 20.0)
_HINT = (
    "The weights may be damaged, or not belong to their config: fetch them again (a model with `wanduet download`), or take "
    "another file of the same weights."
)


@torch.no_grad()
def check_transformer(transformer: WanTransformer, text_len: int) -> float:
    """Return the standard deviation of the velocity for pure noise and an empty prompt. Raises WeightsError if it is
    out of range."""
    spec = transformer.spec
    device = transformer.patch_embedding.weight.device
    rows, columns = (4 * p for p in spec.patch_size[1:])
    shape = (1, spec.in_channels, spec.patch_size[0], rows, columns)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device)
    text = torch.zeros(1, text_len, spec.text_dim, dtype=torch.float32, device=device)
    timestep = torch.full((1,), 999.0, dtype=torch.float32, device=device)
    velocity = transformer(noise, timestep, text)
    return _check("transformer", float(velocity.std()), SANE_STD)


@torch.no_grad()
def check_vae(vae: WanVAE) -> float:
    """Return the standard deviation of the pixels decoded from one latent frame of noise. Raises WeightsError if it is
    out of range."""
    weight = vae.post_quant_conv.weight
    z = torch.randn(1, vae.spec.z_dim, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    pixels, _ = vae.decode_step(z.to(weight.device, weight.dtype), None)
    return _check("VAE", float(pixels.float().std()), (1e-4, 1.0))


@torch.no_grad()
def check_vae_encoder(vae: WanVAE) -> float:
    """Return the standard deviation of the posterior's mode, not normalised, for one frame of noise. Raises
    WeightsError if it is out of range."""
    weight, side = vae.quant_conv.weight, 4 * vae.spec.spatial_stride
    noise = torch.rand(1, 3, 1, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    mode = vae.encode_moments((2 * noise - 1).to(weight.device, weight.dtype)).chunk(2, dim=1)[0]
    return _check("VAE's encoder", float(mode.float().std()), (1e-4, 100.0))


def _check(name: str, std: float, sane: tuple[float, float]) -> float:
    if not sane[0] <= std <= sane[1]:  # also true for NaN
        raise WeightsError(f"The {name}'s self-test failed: its output's deviation is {std:.3g}.", hint=_HINT)
    return std
