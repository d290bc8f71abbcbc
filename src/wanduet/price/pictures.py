"""PSNR and SSIM of two videos, `[T, H, W, 3]` uint8 each."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

HIGHEST_PSNR = 100.0  # of equal videos, whose PSNR is infinite
# Wang et al. 2004 ("Image quality assessment: from error visibility to structural similarity").
WINDOW, SIGMA, C1, C2 = 11, 1.5, (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(video: Tensor, reference: Tensor) -> float:
    """Return the peak signal-to-noise ratio over all frames, in dB, at most HIGHEST_PSNR."""
    squares = [float((a.float() - b.float()).square().mean()) for a, b in zip(video, reference, strict=True)]
    error = sum(squares) / len(squares)
    return min(HIGHEST_PSNR, 10 * math.log10(255**2 / error)) if error else HIGHEST_PSNR


def ssim(video: Tensor, reference: Tensor) -> float:
    """Return the structural similarity, -1 to 1: the mean over frames, colours and pixels whose window lies inside the
    frame. Frames have at least 11 rows and columns."""
    at = torch.arange(WINDOW, dtype=torch.float32, device=video.device) - WINDOW // 2
    weights = torch.exp(-at.square() / (2 * SIGMA**2))
    weights = weights / weights.sum()

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, weights.view(1, 1, -1, 1))
        return F.conv2d(x, weights.view(1, 1, 1, -1))

    found = []
    for frame, other in zip(video, reference, strict=True):
        a, b = (one.permute(2, 0, 1)[:, None].float() for one in (frame, other))
        mean_a, mean_b = blur(a), blur(b)
        var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
        covariance = blur(a * b) - mean_a * mean_b
        contrast = (2 * covariance + C2) / (var_a + var_b + C2)
        found.append((contrast * (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)).mean())
    return float(torch.stack(found).mean())
