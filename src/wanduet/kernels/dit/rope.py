"""Rotary position embedding over time, height and width.

Source: RoFormer (arXiv 2104.09864); Wan2.1 splits the head's channels 44/42/42 over the three axes
(wan/modules/model.py, `rope_params`), rotates interleaved pairs and uses theta 10,000.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

THETA = 10_000.0


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotation angles of a token sequence: `cos` and `sin`, each `[L, head_dim / 2]` float32."""

    cos: Tensor
    sin: Tensor

    def select(self, tokens: slice) -> "Rope":
        """Return the angles of a part of the sequence."""
        return Rope(self.cos[tokens], self.sin[tokens])


def rope_for_grid(grid: tuple[int, int, int], head_dim: int, device: torch.device | str) -> Rope:
    """Return the angles of tokens ordered by frame, row and column on a `(frames, rows, columns)` grid.

    Angles are computed in float64 and rounded once, as the official code does.
    """
    cos, sin = _tables(grid, head_dim)
    return Rope(cos.to(device), sin.to(device))


@lru_cache(maxsize=1)
def _tables(grid: tuple[int, int, int], head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines on the host; cached, because successive jobs often have the same size."""
    spatial_dim = 2 * (head_dim // 6)
    dims = (head_dim - 2 * spatial_dim, spatial_dim, spatial_dim)
    angles = []
    for axis, (length, dim) in enumerate(zip(grid, dims, strict=True)):
        frequencies = THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        table = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        angles.append(table.view(shape).expand(*grid, -1))
    angles_LD = torch.cat(angles, dim=-1).flatten(0, 2)
    return angles_LD.cos().float(), angles_LD.sin().float()


def rotate(x_BLHD: Tensor, rope: Rope) -> Tensor:
    """Rotate interleaved channel pairs of `[B, L, H, D]` float32 by the tokens' angles."""
    cos, sin = rope.cos[:, None, :], rope.sin[:, None, :]
    first, second = x_BLHD.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
