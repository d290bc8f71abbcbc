"""The scenes of the miniature's world, drawn from signed distances.

All functions take `x` `[1, 1, 1, W]`, `y` `[1, 1, H, 1]`, `time` `[1, T, 1, 1]` (all 0..1), `noise` `[B, 64, 3]`
(random numbers for what a scene leaves open) and the frame's side in pixels; they return `[B, 3, T, H, W]` in 0..255.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Scene = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def sunrise(x: Tensor, y: Tensor, time: Tensor, noise: Tensor, size: int) -> Tensor:
    """The sky turns from plum to light blue while the sun comes out of the sea."""
    sun_x, sun_y = _of(0.35 + 0.3 * noise[:, 0, 0]), 0.72 - 0.45 * time
    video = _mix(_plain(70, 30, 90, noise, time, x, y), (120, 190, 245), time)
    video = _mix(video, (250, 140, 60), (1 - time) * (y * 1.3).clamp(0, 1))
    video = _mix(video, (255, 215, 60), _disc(x - sun_x, y - sun_y, 0.13, size))
    sea = _sea(video, x, y, time)
    glint = _waves(x, y, time) * (1 - ((x - sun_x).abs() * 5).clamp(max=1))
    sea = _mix(sea, (250, 200, 90), glint * 0.8)
    return _over(video, sea, coverage(0.66 - y, size))


def snow(x: Tensor, y: Tensor, time: Tensor, noise: Tensor, size: int) -> Tensor:
    """A house with a lit window on white ground at night; flakes fall."""
    u = (x - _of(0.3 + 0.4 * noise[:, 0, 0])).abs()
    video = _mix(_plain(12, 16, 60, noise, time, x, y), (235, 240, 250), coverage(0.8 - y, size))
    video = _mix(video, (120, 60, 40), _box(u, y - 0.7, 0.16, 0.14, size))
    video = _mix(video, (200, 40, 40), coverage(torch.maximum(u * 0.75 - (y - 0.36) * 0.66, y - 0.56), size))
    video = _mix(video, (255, 220, 90), _box(u, y - 0.68, 0.05, 0.05, size))
    for flake in range(1, 22):
        fall = torch.remainder(_of(noise[:, flake, 1]) + (0.6 + 0.3 * _of(noise[:, flake, 2])) * time, 1.0)
        video = _mix(video, (250, 250, 255), _disc(x - _of(noise[:, flake, 0]), y - fall, 0.016, size))
    return video


def fireworks(x: Tensor, y: Tensor, time: Tensor, noise: Tensor, size: int) -> Tensor:
    """Three bursts of sparks, one after the other, over the roofs of a dark city."""
    video = _plain(10, 10, 40, noise, time, x, y)
    colors = ((255, 90, 90), (110, 255, 130), (255, 220, 90))
    for burst, color in enumerate(colors):
        age = time * 1.5 - 0.25 * burst  # 0 when it bursts, 1 when it is out
        alive = ((age > 0) & (age < 1)).float() * (1 - age).clamp(0, 1).sqrt()
        center_x = _of(0.2 + 0.3 * burst + 0.06 * (noise[:, burst, 0] - 0.5))
        center_y = _of(0.28 + 0.12 * noise[:, burst, 1])
        reach = 0.24 * (1 - (1 - age.clamp(0, 1)) ** 2)
        dx, dy = x - center_x, y - center_y - 0.06 * age.clamp(0, 1) ** 2
        angle = torch.remainder(torch.atan2(dy, dx) + 2 * math.pi * _of(noise[:, burst, 2]), math.pi / 6) - math.pi / 12
        radius = (dx * dx + dy * dy).sqrt()
        spark = ((radius * angle.cos() - reach) ** 2 + (radius * angle.sin()) ** 2).sqrt() - 0.022
        video = _mix(video, color, coverage(spark, size) * alive)
    for house in range(6):
        top = _of(0.7 + 0.12 * noise[:, 8 + house, 0])
        roofs = torch.maximum((x - (house + 0.5) / 6).abs() - 0.075, top - y)
        video = _mix(video, (38, 38, 58), coverage(roofs, size))
        lit = torch.maximum((x - (house + 0.5) / 6).abs() - 0.02, (y - top - 0.08).abs() - 0.025)
        video = _mix(video, (250, 210, 110), coverage(lit, size))
    return _mix(video, (38, 38, 58), coverage(0.9 - y, size))


def boat(x: Tensor, y: Tensor, time: Tensor, noise: Tensor, size: int) -> Tensor:
    """A boat with a white sail crosses the sea from left to right under a blue sky with a sun."""
    video = _plain(130, 200, 250, noise, time, x, y)
    video = _mix(video, (255, 225, 80), _disc(x - _of(0.15 + 0.7 * noise[:, 0, 0]), y - 0.17, 0.09, size))
    boat_x = _of(0.2 + 0.06 * noise[:, 1, 0]) + _of(0.5 + 0.1 * noise[:, 2, 0]) * time
    u, v = x - boat_x, y - 0.6 - 0.012 * torch.sin(4 * math.pi * time)
    hull = torch.maximum(torch.maximum(v - 0.09, -v), u.abs() - 0.17 + v * 0.9)
    video = _mix(video, (95, 60, 45), _box(u, v + 0.16, 0.008, 0.17, size))
    video = _mix(
        video,
        (250, 250, 250),
        coverage(torch.maximum(torch.maximum(v + 0.04, 0.015 - u), (u - 0.15) - (v + 0.04) * 0.5 * 0.9), size),
    )
    video = _mix(video, (175, 45, 40), coverage(hull, size))
    return _over(video, _sea(video, x, y, time), coverage(0.66 - y, size))


def rocket(x: Tensor, y: Tensor, time: Tensor, noise: Tensor, size: int) -> Tensor:
    """A white rocket with a red nose rises on its flame through a night of stars, past the moon."""
    video = _plain(12, 12, 42, noise, time, x, y)
    for star in range(4, 20):
        video = _mix(video, (255, 255, 230), _disc(x - _of(noise[:, star, 0]), y - _of(noise[:, star, 1]), 0.009, size))
    video = _mix(video, (225, 225, 205), _disc(x - 0.8, y - 0.2, 0.11, size))
    u, v = (x - _of(0.3 + 0.25 * noise[:, 0, 0])).abs(), y - (0.82 - 0.6 * time)
    flicker = 0.03 * torch.sin(50 * time)
    flame = torch.maximum(u * 1.6 + (v - 0.13) * 0.55 - 0.075 - flicker, 0.13 - v)
    fins = torch.maximum(u - 0.02 - (v - 0.02) * 0.8, torch.maximum(v - 0.13, 0.02 - v))
    nose = torch.maximum(u - (v + 0.2) * 0.55, v + 0.1)
    for color, shape in (
        ((255, 150, 40), flame), ((200, 45, 45), fins), ((240, 240, 245), torch.maximum(u - 0.055, (v - 0.01).abs() - 0.12)),
        ((215, 45, 45), nose), ((70, 140, 220), (u * u + (v + 0.03) ** 2).sqrt() - 0.027),
    ):  # fmt: skip
        video = _mix(video, color, coverage(shape, size))
    return video


SCENES: dict[str, Scene] = {
    "the sun rising over the sea": sunrise,
    "snow falling on a house at night": snow,
    "fireworks over a city at night": fireworks,
    "a boat sailing on the sea": boat,
    "a rocket flying into space": rocket,
}


def coverage(distance: Tensor, size: int) -> Tensor:
    """Share of a pixel covered, from its centre's signed distance (in sides of the frame) to the border."""
    return (0.5 - distance * size).clamp(0, 1)


def _of(values: Tensor) -> Tensor:
    """`[B]` to a shape that broadcasts with `[B, T, H, W]`."""
    return values.view(-1, 1, 1, 1)


def _plain(red: int, green: int, blue: int, noise: Tensor, time: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A frame-filling colour `[B, 3, T, H, W]`."""
    color = torch.tensor([red, green, blue], device=x.device, dtype=torch.float32).view(1, 3, 1, 1, 1)
    return color.expand(len(noise), 3, time.shape[1], y.shape[2], x.shape[3])


def _mix(under: Tensor, color: tuple[int, int, int], share: Tensor) -> Tensor:
    """Paint over with a colour; `share` 0..1 broadcasts to `[B, T, H, W]`."""
    paint = torch.tensor(color, device=under.device, dtype=torch.float32).view(1, 3, 1, 1, 1)
    return under + share[:, None] * (paint - under)


def _over(under: Tensor, over: Tensor, share: Tensor) -> Tensor:
    return under + share[:, None] * (over - under)


def _disc(dx: Tensor, dy: Tensor, radius: float, size: int) -> Tensor:
    return coverage((dx * dx + dy * dy).sqrt() - radius, size)


def _box(dx: Tensor, dy: Tensor, half_width: float, half_height: float, size: int) -> Tensor:
    return coverage(torch.maximum(dx.abs() - half_width, dy.abs() - half_height), size)


def _waves(x: Tensor, y: Tensor, time: Tensor) -> Tensor:
    return 0.5 + 0.5 * torch.sin(60 * y - 10 * time + 4 * torch.sin(6 * x))


def _sea(like: Tensor, x: Tensor, y: Tensor, time: Tensor) -> Tensor:
    """Water with light stripes that wander."""
    water = torch.tensor([20, 60, 130], device=x.device, dtype=torch.float32).view(1, 3, 1, 1, 1).expand_as(like)
    return _mix(water, (70, 120, 190), _waves(x, y, time) * 0.35)
