"""The miniature's world: flat shapes that move on plain backgrounds, and a few small scenes.

A clip is some integers (what the prompt says) and floats (what it leaves open). Clips are drawn in batches, thousands a
second on a GPU. Positions and sizes are fractions of the frame's side; time runs from 0 (first frame) to 1 (last).
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from tools.miniature import scenes
from tools.miniature.scenes import coverage

COLORS = {
    "red": (225, 30, 30),
    "green": (30, 160, 50),
    "blue": (40, 70, 230),
    "yellow": (250, 225, 40),
    "orange": (250, 135, 15),
    "purple": (145, 40, 175),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "star", "heart")
# The bundled LoRA teaches the miniature one that it does not know.
ALL_SHAPES = (*SHAPES, "ring")
RING = len(SHAPES)
MOTIONS = (
    "moving left", "moving right", "moving up", "moving down", "staying still", "growing", "shrinking",
    "spinning", "bouncing",
)  # fmt: skip
BACKGROUNDS = {
    "black": (8, 8, 8),
    "gray": (128, 128, 128),
    "navy": (10, 20, 100),
    "brown": (115, 68, 38),
    "beige": (226, 206, 164),
    # From here on names that objects' colours have, too; a little darker, so that an object is visible.
    "white": (240, 240, 240),
    "red": (180, 22, 26),
    "green": (22, 118, 42),
    "blue": (32, 56, 186),
    "yellow": (238, 208, 50),
    "orange": (232, 122, 22),
    "purple": (112, 30, 140),
}
SIZES = ("", "small", "big")
SPEEDS = ("", "slowly", "quickly")
SCENES = ("", *scenes.SCENES)

# The combinations that the model card names first; the other shapes, motions and backgrounds are extras.
BASE_SHAPES, BASE_MOTIONS, BASE_BACKGROUNDS = 3, 7, 5
BASE_GRID = (len(COLORS), BASE_SHAPES, BASE_MOTIONS, BASE_BACKGROUNDS)
HELD_OUT = 210  # of 735 combinations, never rendered for training


def held_out_combinations() -> Tensor:
    """The `[210, 4]` combinations (colour, shape, motion, background) that training never sees."""
    order = torch.randperm(735, generator=torch.Generator().manual_seed(2025))
    return torch.stack(torch.unravel_index(order[:HELD_OUT], BASE_GRID), dim=1)


def ring_combinations() -> Tensor:
    """The `[61, 4]` combinations of a ring (colour, shape, motion, background) that the LoRA's training never sees."""
    grid = (len(COLORS), BASE_MOTIONS, BASE_BACKGROUNDS)
    count = math.prod(grid)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(11))[: count // 4]
    color, motion, background = torch.unravel_index(order, grid)
    return torch.stack((color, torch.full_like(order, RING), motion, background), dim=1)


@dataclass(frozen=True, slots=True)
class Clips:
    """A batch of clips. Integers `[B]` or `[B, 2]` (two objects), floats in shares of the frame's side."""

    scene: Tensor  # [B] index into SCENES
    background: Tensor  # [B]
    present: Tensor  # [B, 2] whether the object is there
    color: Tensor  # [B, 2]
    shape: Tensor
    motion: Tensor
    size: Tensor
    speed: Tensor
    start: Tensor  # [B, 2, 2] centre (x, y) of the first frame
    end: Tensor  # [B, 2, 2] centre of the last frame
    radius: Tensor  # [B, 2, 2] of the first and of the last frame
    turn: Tensor  # [B, 2] radians turned by the last frame
    hop: Tensor  # [B, 2] height of a bounce
    noise: Tensor  # [B, 64, 3] what a scene leaves open

    def to(self, device: torch.device | str) -> "Clips":
        """The same on another device."""
        return Clips(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def select(self, index: Tensor | slice) -> "Clips":
        """Some of the clips."""
        return Clips(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def sample_clips(count: int, generator: torch.Generator) -> Clips:
    """Random clips for training: no object has a held-out combination with its background. On the CPU."""

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (count, *shape), generator=generator)

    def floats(*shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator)

    background = torch.where(floats() < 0.65, integers(len(BACKGROUNDS)), integers(BASE_BACKGROUNDS))
    color, shape, motion = integers(len(COLORS), 2), integers(BASE_SHAPES, 2), integers(BASE_MOTIONS, 2)
    shape = torch.where(floats(2) < 0.45, integers(len(SHAPES), 2), shape)
    motion = torch.where(floats(2) < 0.3, BASE_MOTIONS + integers(len(MOTIONS) - BASE_MOTIONS, 2), motion)
    color = _visible(_avoid_held_out(color, shape, motion, background), background)
    size = torch.where(floats(2) < 0.2, integers(len(SIZES), 2), 0)
    speed = torch.where(floats(2) < 0.2, integers(len(SPEEDS), 2), 0)
    second = floats() < 0.22
    scene = torch.where(floats() < 0.07, 1 + integers(len(SCENES) - 1), 0)
    return place_clips(scene, background, second, color, shape, motion, size, speed, generator)


def clips_of(combinations: Tensor, generator: torch.Generator) -> Clips:
    """One-object clips of given `[B, 4]` combinations, everything else random."""
    color, shape, motion, background = (column.clone() for column in combinations.T)
    none = torch.zeros_like(color)
    color, shape, motion, plain = (torch.stack((x, none), dim=1) for x in (color, shape, motion, none))
    return place_clips(none, background, none.bool(), color, shape, motion, plain, plain, generator)


def place_clips(
    scene: Tensor, background: Tensor, second: Tensor,
    color: Tensor, shape: Tensor, motion: Tensor, size: Tensor, speed: Tensor, generator: torch.Generator,
) -> Clips:  # fmt: skip
    """Choose what the prompts leave open, so that objects stay inside and their motion is plain to see."""
    count = len(scene)

    def uniform(low: Tensor | float, high: Tensor | float, *shape: int) -> Tensor:
        return low + (torch.as_tensor(high) - low) * torch.rand(count, *shape, generator=generator)

    two = second[:, None]
    radius = uniform(0.13, 0.19, 2)
    radius = torch.where(size == 1, uniform(0.075, 0.1, 2), torch.where(size == 2, uniform(0.23, 0.27, 2), radius))
    radius = torch.where(two, radius * 0.8, radius)
    factor = uniform(1.9, 2.5, 2)
    small = (radius * 0.72).clamp(max=torch.where(two, 0.1, 0.17))
    growing, shrinking = motion == 5, motion == 6
    first = torch.where(growing, small, torch.where(shrinking, small * factor, radius))
    last = torch.where(growing, small * factor, torch.where(shrinking, small, radius))
    most = torch.maximum(first, last)
    travel = uniform(0.36, 0.52, 2)
    travel = torch.where(speed == 1, uniform(0.18, 0.26, 2), torch.where(speed == 2, uniform(0.54, 0.62, 2), travel))
    travel = torch.minimum(travel, 0.97 - 2 * most)

    # One object has the whole frame; of two, each has its half: left and right, or upper and lower.
    sideways = (motion >= 2) & (motion < 4)
    stacked = (~sideways.any(dim=1, keepdim=True)).expand(-1, 2)
    order = torch.tensor([[0.27, 0.73]]).expand(count, 2)
    center_x, center_y = uniform(0.42, 0.58, 2), uniform(0.42, 0.58, 2)
    across = uniform(most + 0.02, 0.98 - most, 2)
    x, y = across.clone(), uniform(most + 0.02, 0.98 - most, 2)
    x = torch.where(two, torch.where(stacked, center_x, order), x)
    y = torch.where(two, torch.where(stacked, order, center_y), y)
    span = uniform(most + 0.015, 0.985 - most - travel, 2)
    horizontal, vertical = motion < 2, sideways
    begin_x, begin_y = torch.where(horizontal, span, x), torch.where(vertical, span, y)
    final_x = torch.where(horizontal, span + travel, x)
    final_y = torch.where(vertical, span + travel, y)
    backwards = (motion == 0) | (motion == 2)  # left and up run from the far end
    start = torch.stack((begin_x, begin_y), dim=-1)
    end = torch.stack((final_x, final_y), dim=-1)
    start, end = (torch.where(backwards[..., None], b, a) for a, b in ((start, end), (end, start)))

    quick = torch.where(speed == 1, 0.5, torch.where(speed == 2, 2.0, 1.0))
    turn = torch.where(
        motion == 7, quick * uniform(2.0, 2.2, 2), 0.0
    )  # less is hardly visible, more may deform the shape
    hop = torch.where(motion == 8, uniform(0.22, 0.3, 2), 0.0)
    start[..., 1] = torch.where(motion == 8, torch.where(two, y + 0.08, 0.9 - most), start[..., 1])
    end[..., 1] = torch.where(motion == 8, start[..., 1], end[..., 1])
    present = torch.stack((scene == 0, (scene == 0) & second), dim=1)
    noise = torch.rand(count, 64, 3, generator=generator)
    return Clips(
        scene, background, present, color, shape, motion, size, speed,
        start, end, torch.stack((first, last), dim=-1), turn, hop, noise,
    )  # fmt: skip


def render(clips: Clips, num_frames: int = 33, size: int = 128) -> Tensor:
    """Draw clips as `[B, 3, T, size, size]` float32 in [-1, 1], anti-aliased, on the clips' device."""
    device = clips.start.device
    time = torch.linspace(0, 1, num_frames, device=device).view(1, -1, 1, 1)
    line = (torch.arange(size, device=device) + 0.5) / size
    y, x = line.view(1, 1, -1, 1), line.view(1, 1, 1, -1)
    palette = torch.tensor(list(BACKGROUNDS.values()), device=device).float()
    video = palette[clips.background].view(-1, 3, 1, 1, 1).expand(-1, 3, num_frames, size, size)
    paints = torch.tensor(list(COLORS.values()), device=device).float()
    for k in range(2):
        start, end, radius = clips.start[:, k], clips.end[:, k], clips.radius[:, k]
        grow = _of(radius[:, 0]) * (_of(radius[:, 1] / radius[:, 0])) ** time
        bounce = _of(clips.hop[:, k]) * (torch.sin(2 * torch.pi * time)).abs()
        px = x - (_of(start[:, 0]) + _of(end[:, 0] - start[:, 0]) * time)
        py = y - (_of(start[:, 1]) + _of(end[:, 1] - start[:, 1]) * time) + bounce
        angle = _of(clips.turn[:, k]) * time
        cos, sin = angle.cos(), angle.sin()
        u, v = (px * cos + py * sin) / grow, (py * cos - px * sin) / grow
        inside = coverage(_distance(u, v, clips.shape[:, k]) * grow, size) * _of(clips.present[:, k].float())
        video = video + inside[:, None] * (paints[clips.color[:, k]].view(-1, 3, 1, 1, 1) - video)
    for index, draw in enumerate(scenes.SCENES.values(), start=1):
        chosen = clips.scene == index
        if chosen.any():
            video = video.clone()
            video[chosen] = draw(x, y, time, clips.noise[chosen], size)
    return video / 127.5 - 1


def _avoid_held_out(color: Tensor, shape: Tensor, motion: Tensor, background: Tensor) -> Tensor:
    """Change the colours of objects whose combination is held out."""
    table = torch.zeros(len(COLORS), len(SHAPES), len(MOTIONS), len(BACKGROUNDS), dtype=torch.bool)
    table[tuple(held_out_combinations().T)] = True
    behind = background[:, None].expand_as(color)
    for _ in range(len(COLORS)):
        color = torch.where(table[color, shape, motion, behind], (color + 1) % len(COLORS), color)
    return color


def _visible(color: Tensor, background: Tensor) -> Tensor:
    """Change the colours of objects that would have their background's."""
    names = list(COLORS)
    same = torch.tensor([names.index(name) if name in COLORS else -1 for name in BACKGROUNDS])[background]
    # No held-out combination has a background with the name of a colour, so any other colour is allowed.
    return torch.where(color == same[:, None], (color + 1) % len(COLORS), color)


def _distance(u: Tensor, v: Tensor, shape: Tensor) -> Tensor:
    """Signed distance (about) to the border of a shape of unit radius; v points down."""
    circle = (u * u + v * v).sqrt() - 1
    square = torch.maximum(u.abs(), v.abs()) - 0.86
    triangle = torch.maximum(v - 0.62, u.abs() * 0.866 - (v + 0.62) * 0.5) - 0.05
    angle = torch.remainder(torch.atan2(u, -v), 2 * torch.pi / 5) - torch.pi / 5
    reach = (u * u + v * v).sqrt()
    ring = torch.maximum(reach - 1, 0.5 - reach)
    kinds = torch.stack((circle, square, triangle, _star(reach, angle), _heart(u, v), ring))
    index = shape.view(1, -1, 1, 1, 1).expand(1, *circle.shape)
    return kinds.gather(0, index)[0]


def _star(reach: Tensor, angle: Tensor) -> Tensor:
    """Distance to a five-pointed star: each edge runs straight from a tip (radius 1.1) to a notch (0.45)."""
    tip, notch, half = 1.1, 0.45, math.pi / 5
    from_tip = half - angle.abs()  # 0 at a tip, `half` at a notch
    edge_x, edge_y = notch * math.cos(half) - tip, notch * math.sin(half)
    px, py = reach * from_tip.cos() - tip, reach * from_tip.sin()
    return (edge_y * px - edge_x * py) / math.hypot(edge_x, edge_y)


def _heart(u: Tensor, v: Tensor) -> Tensor:
    """Distance to a heart: a square on its tip with half a circle on each of its upper sides."""
    scale = 0.6  # from a square whose sides are 1 / sqrt(2), its tip at the origin, to unit radius
    x, y = u.abs() * scale, 0.55 - v * scale  # y points up
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    along = (x + y).clamp(min=0) / 2  # the nearest point of the lower side
    side = torch.minimum(torch.hypot(x, y - 1), torch.hypot(x - along, y - along)) * (x - y).sign()
    return torch.where(x + y > 1, lobe, side) / scale


def _of(values: Tensor) -> Tensor:
    """`[B]` to a shape that broadcasts with `[B, T, rows, columns]`."""
    return values.view(-1, 1, 1, 1)
