"""ColorVideoVDP: how visible the difference of two videos is, in JOD (Mantiuk et al., arXiv 2401.11485).

10 means that nobody sees a difference; 9, that 75 of 100 viewers would prefer the reference. Written from version 0.5.7 of
the package `cvvdp` (MIT), the metric's base form. The package is not imported, since importing it needs ten packages, of
which torchvision replaces the installed PyTorch: only the parameters in its data files are read. The videos are seen pixel
for pixel on its display `standard_fhd`: 24 inches, 200 cd/m², from twice its height, in office light.
"""

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

PACKAGE = "pycvvdp"
DISPLAY, COLOURS = "standard_fhd", "sRGB"
REFLECTIVITY = 0.005
TRANSIENT_HZ = 5.0
FILTER_SECONDS = 0.25
XYZ_TO_LMS = (
    (0.187596268556126, 0.585168649077728, -0.026384263306304),
    (-0.133397430663221, 0.405505777260049, 0.034502127690364),
    (0.000244379021663, -0.000542995890619, 0.019406849066323),
)
LMS_TO_DKL = ((1.0, 1.0, 0.0), (1.0, -2.311130179947035, 0.0), (-1.0, -1.0, 50.977571328718781))
CHANNEL_GAINS = (1.0, 1.45, 1.0, 1.0)
# Spatial frequencies in cycles a degree: of the baseband, and the lowest that is a band of its own.
BASEBAND, LOWEST = 0.1, 0.2
DARKEST = 0.01  # cd/m²
KERNEL = (0.05, 0.25, 0.4, 0.25, 0.05)  # of the pyramids
EPSILON = 1e-5


def data_folder() -> Path | None:
    """Return the folder of the installed parameters; None if the package is not installed. Imports nothing."""
    found = find_spec(PACKAGE)
    folders = [] if found is None else list(found.submodule_search_locations or ())
    return next((path for folder in folders if (path := Path(folder) / "vvdp_data").is_dir()), None)


class ColorVideoVDP:
    """The metric, on one device. Tensors of a frame are `[C, 2, H, W]` float32: channels (sustained luminance, red-green,
    yellow-violet, transient luminance), then the video and its reference."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """`folder`: of the parameters. Raises OSError, ValueError or KeyError if they are damaged."""
        self._device = device
        self._p = _read(folder / "cvvdp_parameters.json")
        sensitivity = _read(folder / f"csf_lut_{self._p['csf']}.json")
        display, colours = (_read(folder / f"{name}.json") for name in ("display_models", "color_spaces"))
        self._display = display[DISPLAY]
        self._log_luminances, self._log_frequencies = (self._tensor(sensitivity[k]).log10() for k in ("L_bkg", "rho"))
        slow, fast = sensitivity["omega"][:2]
        names = [f"o{slow}_c1", f"o{slow}_c2", f"o{slow}_c3", f"o{fast}_c1"]
        self._log_sensitivities = [self._tensor(sensitivity[name]) for name in names]
        to_xyz = self._tensor([colours[COLOURS][f"RGB2{axis}"] for axis in "XYZ"])
        self._to_dkl = self._tensor(LMS_TO_DKL) @ self._tensor(XYZ_TO_LMS) @ to_xyz
        self._mask_weights = 2 ** self._tensor(self._p["xcm_weights"]).view(4, 4)

    @torch.no_grad()
    def __call__(self, video: Tensor, reference: Tensor, fps: float) -> float:
        """Return the JOD, at most 10, of two videos `[T, H, W, 3]` uint8 on the metric's device."""
        p = self._p
        differences = torch.stack([self._differences(x) for x in self._temporal(video, reference, fps)], 1)
        channels, frames, bands = differences.shape  # [C, T, bands]
        weights = torch.ones(channels, 1, bands, device=self._device)
        weights[:, 0, -1] = self._tensor(p["baseband_weight"])[:channels]
        of_channel = self._tensor([1.0, p["ch_chrom_w"], p["ch_chrom_w"], p["ch_trans_w"]])[:channels]
        by_frame = _norm(differences * weights * of_channel.view(-1, 1, 1), p["beta_sch"], (2,))
        seen = _norm(by_frame, p["beta_tch"], (0,))
        whole = _norm(seen, p["beta_t"], (0,), mean=True) if frames > 1 else seen * p["image_int"]
        return self._as_jod(float(whole))

    def _as_jod(self, difference: float) -> float:
        slope, power, knee = self._p["jod_a"], self._p["jod_exp"], 0.1
        below = difference * knee ** (power - 1.0)
        return 10.0 - slope * (below if difference <= knee else difference**power)

    def _temporal(self, video: Tensor, reference: Tensor, fps: float) -> Iterator[Tensor]:
        """Yield the channels of each frame, filtered over time; the first frame stands for those before it."""
        if len(video) == 1:
            yield self._light(video[0], reference[0])
            return
        filters = self._filters(fps)
        window: list[Tensor] = []
        for pair in zip(video, reference, strict=True):
            light = self._light(*pair)
            window = [*(window or [light] * filters.shape[1]), light][-filters.shape[1] :]
            recent = torch.stack(window)[:, [0, 1, 2, 0]]
            yield (recent * filters.T.flip(0)[:, :, None, None, None]).sum(0)

    def _filters(self, fps: float) -> Tensor:
        """Return the weights of the last frames for each channel, `[4, taps]`, the present frame first."""
        p, taps = self._p, math.ceil(FILTER_SECONDS * fps / 2) * 2 + 1
        hertz = torch.linspace(0, fps / 2, taps // 2 + 1, device=self._device)
        powers, widths = self._tensor(p["beta_tf"]), self._tensor(p["sigma_tf"])
        sustained = [torch.exp(-(hertz ** powers[c]) / widths[c]) for c in range(3)]
        transient = torch.exp(-((hertz ** powers[3] - TRANSIENT_HZ ** powers[3]) ** 2) / widths[3])
        responses = [*sustained, transient]
        return torch.stack([torch.fft.fftshift(torch.fft.irfft(one, n=taps)) for one in responses])

    def _light(self, frame: Tensor, reference: Tensor) -> Tensor:
        """Return the light that the display emits for two pictures, in the colours of the eye's channels `[3, 2, H, W]`."""
        peak = float(self._display["max_luminance"])
        black = peak / self._display["contrast"]
        reflected = self._display["E_ambient"] / math.pi * REFLECTIVITY
        v = torch.stack((frame, reference)).float() / 255
        linear = torch.where(v > 0.04045, ((v + 0.055) / 1.055) ** 2.4, v / 12.92)
        return torch.einsum("cr,nhwr->cnhw", self._to_dkl, (peak - black) * linear + black + reflected)

    def _differences(self, x: Tensor) -> Tensor:
        """Return the visible difference in each channel and band, `[C, bands]`."""
        p, levels = self._p, self._gaussian(x)
        found = []
        for band, level in enumerate(levels):
            is_last = band == len(levels) - 1
            if is_last:
                background = level[:1].clamp(min=DARKEST).mean((-2, -1), keepdim=True)
                contrast = (level / background).clamp(max=1000.0)
            else:
                coarse = _expanded(levels[band + 1], level)
                background = coarse[:1].clamp(min=DARKEST)
                contrast = ((level - coarse) / background).clamp(max=1000.0) * (2.0 if band else 1.0)
            frequency = BASEBAND if is_last else self._frequencies()[band]
            sensitivity = self._sensitivity(frequency, background[0, 1].log10(), len(x))
            test, reference = contrast[:, 0], contrast[:, 1]
            visible = (test - reference).abs() * sensitivity if is_last else self._masked(test, reference, sensitivity)
            found.append(_norm(visible, p["beta"], (-2, -1), mean=True))
        return torch.stack(found, 1)

    def _frequencies(self) -> list[float]:
        """Return the spatial frequencies of all possible bands, the highest first, in cycles a degree."""
        width, height = self._display["resolution"]
        wide = self._display["diagonal_size_inches"] * 0.0254 * width / math.hypot(width, height)
        a_degree = 1 / (2 * math.degrees(math.atan(0.5 * wide / width / self._display["viewing_distance_meters"])))
        return [share * a_degree / 2 for share in (1.0, *(0.3228 * 2.0**-k for k in range(14)))]

    def _gaussian(self, x: Tensor) -> list[Tensor]:
        most = int(math.log2(min(x.shape[-2:]))) - 1
        above = next((k for k, hertz in enumerate(self._frequencies()) if hertz <= LOWEST), most)
        levels = [x]
        for _ in range(min(above + 1, most)):
            levels.append(_reduced(levels[-1]))
        return levels

    def _sensitivity(self, frequency: float, log_background: Tensor, channels: int) -> Tensor:
        """Return the eye's contrast sensitivity at a background `[H, W]`, `[C, H, W]`."""
        at, known = math.log10(frequency), self._log_frequencies
        low = min(max(int(torch.searchsorted(known, at)) - 1, 0), len(known) - 2)
        share = (at - known[low]) / (known[low + 1] - known[low])
        lums = self._log_luminances
        place = ((log_background - lums[0]) / (lums[-1] - lums[0]) * (len(lums) - 1)).clamp(0, len(lums) - 1)
        below, part = place.long(), place.frac()
        found = []
        for table in self._log_sensitivities[:channels]:
            row = table[:, low] + (table[:, low + 1] - table[:, low]) * share
            found.append(row[below] * (1 - part) + row[(below + 1).clamp(max=len(lums) - 1)] * part)
        return 10 ** (torch.stack(found) + self._p["sensitivity_correction"] / 20)

    def _masked(self, test: Tensor, reference: Tensor, sensitivity: Tensor) -> Tensor:
        """Return the differences that the common contrast of both does not hide, `[C, H, W]`."""
        p, channels = self._p, len(test)
        gain = sensitivity * self._tensor(CHANNEL_GAINS)[:channels].view(-1, 1, 1)
        test, reference = test * gain, reference * gain
        powers = self._tensor(p["mask_q"])[:channels].view(-1, 1, 1)
        common = _power(self._spread(torch.minimum(test.abs(), reference.abs())), powers)
        mask = torch.einsum("khw,kc->chw", common, self._mask_weights[:channels, :channels])
        difference, most = _power((test - reference).abs(), p["mask_p"]) / (1 + mask), 10 ** p["d_max"]
        return most * difference / (most + difference)

    def _spread(self, x: Tensor) -> Tensor:
        """Blur contrasts, as the eye does not know their phase; frames that are too small are not blurred."""
        sigma, scale = self._p["pu_dilate"], 10 ** self._p["mask_c"]
        half = int(sigma * 2)
        if min(x.shape[-2:]) <= half:
            return x * scale
        at = torch.arange(2 * half + 1, dtype=torch.float32, device=x.device) - half
        weights = torch.exp(-0.5 * (at / sigma) ** 2)
        weights = weights / weights.sum()
        padded = F.pad(x[:, None], (half, half, half, half), "reflect")
        return F.conv2d(F.conv2d(padded, weights.view(1, 1, -1, 1)), weights.view(1, 1, 1, -1))[:, 0] * scale

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _power(x: Tensor, power: Any) -> Tensor:
    return (x + EPSILON) ** power - EPSILON**power


def _norm(x: Tensor, power: float, dims: tuple[int, ...], mean: bool = False) -> Tensor:
    count = math.prod(x.shape[dim] for dim in dims) if mean else 1
    return _power(_power(x, power).sum(dims) / count, 1 / power)


def _reduced(x: Tensor) -> Tensor:
    """Halve rows and columns of `[C, 2, H, W]`."""
    is_odd = x.shape[-2] % 2 == 1  # the package looks at the rows for both
    return _halved(_halved(x, is_odd).transpose(-1, -2), is_odd).transpose(-1, -2)


def _halved(x: Tensor, is_odd: bool) -> Tensor:
    """Blur over rows and keep every second; the picture is mirrored at its edges."""
    rows, columns = x.shape[-2:]
    kernel = x.new_tensor(KERNEL)
    y = F.conv2d(x.reshape(-1, 1, rows, columns), kernel.view(1, 1, -1, 1), stride=(2, 1), padding=(2, 0))
    y = y.view(*x.shape[:-2], -1, columns)
    y[..., 0, :] += x[..., 0, :] * kernel[1] + x[..., 1, :] * kernel[0]
    if is_odd:
        y[..., -1, :] += x[..., -1, :] * kernel[3] + x[..., -2, :] * kernel[4]
    else:
        y[..., -1, :] += x[..., -1, :] * kernel[4]
    return y


def _expanded(x: Tensor, like: Tensor) -> Tensor:
    """Enlarge to the rows and columns of `like`."""
    rows, columns = like.shape[-2:]
    return _doubled(_doubled(x, rows).transpose(-1, -2), columns).transpose(-1, -2)


def _doubled(x: Tensor, rows: int) -> Tensor:
    z = x.new_zeros(*x.shape[:-2], rows + 4, x.shape[-1])
    z[..., 2:-2:2, :] = x
    z[..., 0, :] = x[..., 0, :]
    z[..., -2 + rows % 2, :] = x[..., -1, :]
    kernel = 2 * x.new_tensor(KERNEL)
    y = F.conv2d(z.reshape(-1, 1, *z.shape[-2:]), kernel.view(1, 1, -1, 1))
    return y.view(*x.shape[:-2], rows, x.shape[-1])
