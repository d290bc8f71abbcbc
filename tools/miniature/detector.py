"""Classifies a clip of one object by its pixels: colour, shape, motion and background."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tools.miniature.world import BACKGROUNDS, COLORS

Frames = npt.NDArray[np.uint8]  # [T, H, W, 3]
ATTRIBUTES = ("color", "shape", "motion", "background")


@dataclass(frozen=True, slots=True)
class Seen:
    """The detected attributes; "" if there is no object."""

    color: str
    shape: str
    motion: str
    background: str


def detect(frames: Frames) -> Seen:
    """Classify a clip `[T, H, W, 3]` uint8 of one object on a plain background."""
    border = np.concatenate((frames[:, :2].reshape(-1, 3), frames[:, -2:].reshape(-1, 3)))
    behind = np.median(border.astype(np.float32), axis=0)
    background = _nearest(behind, BACKGROUNDS)
    masks = np.linalg.norm(frames.astype(np.float32) - behind, axis=-1) > 45
    areas = masks.mean(axis=(1, 2))
    if np.median(areas) < 0.002:
        return Seen("", "", "", background)
    color = _nearest(_core_color(frames, masks), COLORS)
    votes = [_shape(mask) for mask in masks[:: max(1, len(masks) // 8)] if mask.mean() > 0.002]
    shape = max(set(votes), key=votes.count)
    return Seen(color, shape, _motion(masks, areas), background)


def _nearest(value: npt.NDArray[np.float32], names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.linalg.norm(value - np.array(names[name], np.float32))))


def _core_color(frames: Frames, masks: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Median colour of pixels whose neighbours are also object: border pixels are blends."""
    core = masks.copy()
    for axis in (1, 2):
        core &= np.roll(masks, 1, axis) & np.roll(masks, -1, axis)
    pixels = frames[core if core.any() else masks]
    median: npt.NDArray[np.float32] = np.median(pixels.astype(np.float32), axis=0)
    return median


def _shape(mask: npt.NDArray[np.bool_]) -> str:
    """The shape by the fraction of the bounding box that it fills: square 1, circle 0.785, triangle about 0.5. A ring has
    a hole in the middle."""
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    filled = float(box.mean())
    middle = box[2 * len(box) // 5 : -(-3 * len(box) // 5), 2 * box.shape[1] // 5 : -(-3 * box.shape[1] // 5)]
    if middle.mean() < 0.5:
        return "ring"
    if filled > 0.885:
        return "square"
    return "circle" if filled > 0.66 else "triangle"


def _motion(masks: npt.NDArray[np.bool_], areas: npt.NDArray[np.floating]) -> str:
    size = masks.shape[1]
    visible = np.where(areas > 0.002)[0]
    head, tail = visible[:3], visible[-3:]
    growth = float(np.mean(areas[tail]) / np.mean(areas[head]))
    if growth > 1.7:
        return "growing"
    if growth < 1 / 1.7:
        return "shrinking"
    begin, end = (np.mean([_center(masks[i]) for i in part], axis=0) for part in (head, tail))
    dy, dx = (end - begin) / size
    if max(abs(dx), abs(dy)) < 0.08:
        return "staying still"
    if abs(dx) > abs(dy):
        return "moving right" if dx > 0 else "moving left"
    return "moving down" if dy > 0 else "moving up"


def _center(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    center: npt.NDArray[np.float64] = np.argwhere(mask).mean(axis=0)
    return center
