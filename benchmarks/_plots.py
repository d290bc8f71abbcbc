"""The README's plots from the result files: `python benchmarks/_plots.py`.

Drawn with Pillow, which the package needs anyway.
"""

import json
from collections.abc import Sequence
from math import log2
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

RESULTS = Path(__file__).parent / "results"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
SCALE = 2  # pixels a unit: sharp on fine screens
INK, GREY, PALE, BLUE = "#1b1f24", "#8c959f", "#d8dee4", "#0969da"
ALLOWED = 1.08  # how far a prediction may be above


def rows(file: str, section: str) -> list[dict[str, Any]]:
    content = json.loads((RESULTS / file).read_text())
    found: list[dict[str, Any]] = content["sections"][section]
    return found


class Canvas:
    """A white picture in units that are scaled."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self._draw = ImageDraw.Draw(self.image)

    def text(self, x: float, y: float, text: str, colour: str = INK, size: int = 13, anchor: str = "lm") -> None:
        font = ImageFont.load_default(size * SCALE)
        self._draw.text((x * SCALE, y * SCALE), text, fill=colour, font=font, anchor=anchor)

    def box(self, x: float, y: float, right: float, bottom: float, colour: str) -> None:
        self._draw.rectangle([v * SCALE for v in (x, y, right, bottom)], fill=colour)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        self._draw.line(scaled, fill=colour, width=max(1, round(width * SCALE)))

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        self._draw.ellipse([v * SCALE for v in (x - radius, y - radius, x + radius, y + radius)], fill=colour)

    def save(self, name: str) -> None:
        IMAGES.mkdir(parents=True, exist_ok=True)
        self.image.save(IMAGES / name, optimize=True)


def forward() -> None:
    """Seconds of one forward, each size to its own scale."""
    canvas = Canvas(720, 250)
    canvas.text(16, 20, "One forward of the transformer, one H100, seconds", size=15)
    found = rows("transformer_forward.json", "forward")
    y = 52.0
    for size in ("480p", "720p", "1080p"):
        of_size = sorted((r for r in found if r["size"] == size), key=lambda r: -r["seconds"])
        slowest = of_size[0]["seconds"]
        canvas.text(16, y + 10 * len(of_size), size)
        for row in of_size:
            ours = row["impl"] == "wanduet"
            right = 210 + 400 * row["seconds"] / slowest
            canvas.box(210, y, right, y + 15, BLUE if ours else PALE)
            canvas.text(202, y + 8, row["impl"], BLUE if ours else INK, 12, "rm")
            canvas.text(right + 6, y + 8, f"{row['seconds']:.3f}   {slowest / row['seconds']:.2f}x", INK, 12)
            y += 20
        y += 12
    canvas.save("forward.png")


def memory() -> None:
    """Predicted over measured peaks: in the band is what is allowed."""
    canvas, left, top, width, height = Canvas(720, 300), 60.0, 78.0, 620.0, 170.0
    low, high, least, most = 0.98, 1.10, 0.5, 32.0

    def across(gib: float) -> float:
        return left + width * log2(gib / least) / log2(most / least)

    def up(ratio: float) -> float:
        return top + height * (high - ratio) / (high - low)

    count = sum(len(rows("memory_grid.json", section)) for section in ("denoise", "decode"))
    canvas.text(16, 20, f"Peak memory of {count} runs on one H100: predicted / measured", size=15)
    canvas.box(left, up(ALLOWED), left + width, up(1.0), "#ddf4ff")
    canvas.text(left + width - 6, up(ALLOWED) + 9, "never below, at most 8 % above", GREY, 11, "rm")
    for ratio in (0.98, 1.0, 1.02, 1.04, 1.06, 1.08, 1.10):
        canvas.line([(left, up(ratio)), (left + width, up(ratio))], GREY if ratio == 1 else PALE)
        canvas.text(left - 8, up(ratio), f"{ratio:.2f}", INK, 11, "rm")
    for gib in (0.5, 1, 2, 4, 8, 16, 32):
        canvas.text(across(gib), top + height + 14, f"{gib:g}", INK, 11, "mm")
    canvas.text(left + width / 2, top + height + 34, "measured, GiB", INK, 12, "mm")
    kinds = {
        "denoise": (BLUE, "denoise with guidance: 480p to 1080p, 0 to 30 blocks kept"),
        "decode": ("#bf3989", "decode: 480p to 1080p, whole, and 2 to 16 strips"),
    }
    for at, (section, (colour, name)) in zip((16, 410), kinds.items(), strict=True):
        canvas.dot(at + 4, 50, 4, colour)
        canvas.text(at + 14, 50, name, INK, 12)
        for row in rows("memory_grid.json", section):
            canvas.dot(across(row["measured_gib"]), up(row["ratio"]), 4, colour)
    canvas.save("memory.png")


def prices() -> None:
    """Forwards against visible loss: from the exact video to the named speeds, and to fewer steps."""
    canvas, left, top, width, height = Canvas(720, 340), 60.0, 84.0, 630.0, 200.0
    found = json.loads((RESULTS / "price_miniature.json").read_text())
    exact = found["rungs"][0]
    seed = found["controls"]["another_seed"]["jod"]["median"]
    low, high = -1.0, 10.5

    def across(row: dict[str, Any]) -> float:
        return left + width * row["forwards"] / exact["forwards"]

    def up(jod: float) -> float:
        return top + height * (high - jod) / (high - low)

    title = f"How visible the difference is, in JOD: the miniature, {len(found['prompts'])} prompts (10: not at all)"
    canvas.text(16, 20, title, size=15)
    for jod in range(0, 11, 2):
        canvas.line([(left, up(jod)), (left + width, up(jod))], PALE)
        canvas.text(left - 8, up(jod), f"{jod}", INK, 11, "rm")
    for percent in range(0, 101, 20):
        canvas.text(left + width * percent / 100, top + height + 14, f"{percent} %", INK, 11, "mm")
    canvas.text(left + width / 2, top + height + 34, "of the exact job's forwards", INK, 12, "mm")
    canvas.line([(left, up(seed)), (left + width, up(seed))], GREY)
    canvas.text(left + width - 6, up(seed) - 9, "another seed", GREY, 11, "rm")
    curves = {"the named speeds": (BLUE, found["rungs"]), "fewer steps": ("#bf3989", [exact, *found["fewer_steps"]])}
    for at, (name, (colour, some)) in zip((16, 180), curves.items(), strict=True):
        canvas.dot(at + 4, 50, 4, colour)
        canvas.text(at + 14, 50, name, INK, 12)
        for kind, thickness in (("median", 0.5), ("worst", 2.5)):
            canvas.line([(across(row), up(row["jod"][kind])) for row in some], colour, thickness)
        for row in some:
            canvas.dot(across(row), up(row["jod"]["worst"]), 4, colour)
            canvas.text(across(row), up(row["jod"]["worst"]) + 13, row.get("speed") or row["name"], colour, 11, "mm")
    canvas.text(310, 50, "thick: the worst of the prompts; thin: the median", GREY, 12)
    canvas.save("price.png")


if __name__ == "__main__":
    forward()
    memory()
    prices()
