from collections.abc import Callable

import numpy as np
import pytest


@pytest.fixture
def moving() -> Callable[..., np.ndarray]:
    """Smooth coloured waves with a little noise, `[n, H, W, 3]`; the same for the same arguments."""

    def make(n: int = 9, height: int = 64, width: int = 96, seed: int = 0) -> np.ndarray:
        t, y, x = np.meshgrid(np.arange(n), np.arange(height), np.arange(width), indexing="ij")
        waves = [np.sin(x / 17 + t / 3), np.sin(y / 13 - t / 4), np.sin((x + y) / 23 + t / 5)]
        noise = np.random.default_rng(seed).normal(0, 2, (n, height, width, 3))
        return (127 + 90 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8)

    return make
