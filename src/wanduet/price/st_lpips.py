"""ST-LPIPS, a perceptual distance of pictures that tolerates small shifts (Ghildyal & Liu, arXiv 2207.13686).

The network is AlexNet with blurred strides and a linear head for each of its five layers. The weights come from the file
of the package `stlpips_pytorch`, which is not imported: importing it needs packages that only its demos use.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

PACKAGE = "stlpips_pytorch"
FILE = "weights/vST0.0/alex_shift_tolerant.pth"
SMALLEST = 32  # rows and columns, below which the network's last layers have no input
# The layers' names in the file: convolution, the blur before it or after it, linear head; and the convolution's padding.
LAYERS = ((0, 1), (5, 4), (9, 8), (11, None), (13, None))
PADDINGS = (2, 2, 1, 1, 1)


def weights_file() -> Path | None:
    """Return the path of the installed weights; None if the package is not installed. Imports nothing."""
    found = find_spec(PACKAGE)
    folders = [] if found is None else list(found.submodule_search_locations or ())
    return next((path for folder in folders if (path := Path(folder) / FILE).is_file()), None)


class STLPIPS:
    """The network, on one device."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """Read the weights, and nothing else, from a file. Raises what `torch.load` raises for a damaged file."""
        state = torch.load(path, map_location=device, weights_only=True)
        self._state: dict[str, Tensor] = {name: value.float() for name, value in state.items()}

    @torch.no_grad()
    def __call__(self, video: Tensor, reference: Tensor) -> float:
        """Return the mean distance of the frames of two videos `[T, H, W, 3]` uint8 on the network's device: 0 if they are
        equal. Frames have at least SMALLEST rows and columns."""
        pairs = zip(video, reference, strict=True)
        return float(torch.stack([self._distance(torch.stack(pair)) for pair in pairs]).mean())

    def _distance(self, pair: Tensor) -> Tensor:
        """Distance of two pictures, `[2, H, W, 3]` uint8."""
        state, total = self._state, torch.zeros((), device=pair.device)
        x = pair.permute(0, 3, 1, 2).float() / 127.5 - 1
        x = (x - state["scaling_layer.shift"]) / state["scaling_layer.scale"]
        for index, features in enumerate(self._features(x)):
            unit = features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)
            total = total + F.conv2d((unit[:1] - unit[1:]).square(), state[f"lin{index}.model.1.weight"]).mean()
        return total

    def _features(self, x: Tensor) -> Iterator[Tensor]:
        for index, ((number, blur), padding) in enumerate(zip(LAYERS, PADDINGS, strict=True)):
            name = f"net.slice{index + 1}"
            if index and blur is not None:
                x = self._halved(F.max_pool2d(x, 3, 1), f"{name}.{blur}")
            x = F.conv2d(
                x, self._state[f"{name}.{number}.weight"], self._state[f"{name}.{number}.bias"], padding=padding
            )
            if not index:
                x = self._halved(x, f"{name}.{blur}")
            x = x.relu()
            yield x

    def _halved(self, x: Tensor, name: str) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), "reflect"), self._state[f"{name}.filt"], stride=2, groups=x.shape[1])
