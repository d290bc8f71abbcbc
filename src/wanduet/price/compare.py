"""The measures of one video against the exact one. Pictures are compared as they are decoded, never as they are encoded."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wanduet.price import jod, st_lpips
from wanduet.price.jod import ColorVideoVDP
from wanduet.price.pictures import psnr, ssim
from wanduet.price.st_lpips import STLPIPS

log = logging.getLogger(__name__)

INSTALL = {
    "st_lpips": "pip install -e '.[price]' in wanduet's folder",
    "jod": "pip install --no-deps cvvdp==0.5.7",  # only its data files are read; its dependencies replace PyTorch
}


@dataclass(frozen=True, slots=True)
class Made:
    """One video: latents `[16, T, h, w]` float32 and frames `[F, H, W, 3]` uint8 on the host, seconds, forwards."""

    latents: Tensor
    frames: Tensor
    seconds: float
    forwards: int


class Measures:
    """All measures that are installed, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._networks: dict[torch.device, tuple[STLPIPS | None, ColorVideoVDP | None]] = {}

    def __call__(self, made: Made, exact: Made, fps: int) -> dict[str, Any]:
        """Return the measures of a video, by their names in `meta.prices.MEASURES`; None for one that is not installed or
        that has no value for such small frames."""
        if made.frames.shape != exact.frames.shape or made.latents.shape != exact.latents.shape:
            raise ValueError("Only videos of the same size and length can be compared.")
        try:
            found = self._on(self._device, made, exact, fps)
        except torch.OutOfMemoryError:
            found = None
        if found is None:
            log.warning("The pictures are compared on the CPU: the device has too little free memory.")
            self._device = torch.device("cpu")
            found = self._on(self._device, made, exact, fps)
        return {"latents_error": relative_error(made.latents, exact.latents)} | found

    def _on(self, device: torch.device, made: Made, exact: Made, fps: int) -> dict[str, float | None]:
        a, b = made.frames.to(device), exact.frames.to(device)
        network, metric = self._networks_on(device)
        small = min(a.shape[1:3]) < st_lpips.SMALLEST
        return {
            "psnr": psnr(a, b),
            "ssim": ssim(a, b),
            "st_lpips": None if network is None or small else network(a, b),
            "jod": None if metric is None else metric(a, b, fps),
        }

    def _networks_on(self, device: torch.device) -> tuple[STLPIPS | None, ColorVideoVDP | None]:
        if device not in self._networks:
            weights, folder = st_lpips.weights_file(), jod.data_folder()
            network = None if weights is None else STLPIPS(weights, device)
            self._networks[device] = network, None if folder is None else ColorVideoVDP(folder, device)
        return self._networks[device]


def missing() -> list[str]:
    """Return a sentence for each measure that is not installed."""
    found: dict[str, Callable[[], object]] = {"st_lpips": st_lpips.weights_file, "jod": jod.data_folder}
    return [f"{name} is not measured: {INSTALL[name]} installs it." for name, where in found.items() if where() is None]


def relative_error(made: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm of the exact one."""
    return float((made - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny))
