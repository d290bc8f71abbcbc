"""Table of GPUs by name, to plan for cards that are not at hand and to predict the seconds of a job.

`peak`: dense bfloat16 products with float32 accumulation (float16 before Ampere) in TFLOP/s, from the makers' data
sheets. GeForce cards accumulate in float32 at half the advertised rate; the table has the lower one. `reached`: the
share of `peak` that the whole denoise reaches. Measured with this engine on an H100
(benchmarks/results/whole_job_480p.json); for GeForce, from the "about 4 minutes" of an RTX 4090 in the official README
of Wan2.1; for other cards assumed similar.
"""

import re
from dataclasses import dataclass
from functools import cache

from wanduet.config import GIB

HOPPER, GEFORCE, OTHER = 0.69, 0.72, 0.66


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU model.

    `gib`: memory that the driver reports, in GiB, without what error correction reserves on some cards.
    """

    name: str
    gib: float
    capability: tuple[int, int]
    multiprocessors: int
    peak: float
    reached: float = GEFORCE

    @property
    def total_bytes(self) -> int:
        """The card's memory, in bytes."""
        return int(self.gib * GIB)

    @property
    def reaches_peers(self) -> bool:
        """Whether its driver lets one card write to another's memory; GeForce's does not (an RTX 3090 needs NVLink)."""
        return re.fullmatch(r"RTX \d{4}( .*)?", self.name) is None or self.name.endswith("Ada")

    @property
    def rate(self) -> float:
        """TFLOP/s that the whole denoise reaches."""
        return self.peak * self.reached


CARDS = (
    Card("RTX 3050", 8, (8, 6), 20, 18.2),
    Card("RTX 3060", 12, (8, 6), 28, 25.5),
    Card("RTX 3060 Ti", 8, (8, 6), 38, 32.4),
    Card("RTX 3070", 8, (8, 6), 46, 40.6),
    Card("RTX 3070 Ti", 8, (8, 6), 48, 43.5),
    Card("RTX 3080", 10, (8, 6), 68, 59.5),
    Card("RTX 3080 12GB", 12, (8, 6), 70, 61.3),
    Card("RTX 3080 Ti", 12, (8, 6), 80, 68.2),
    Card("RTX 3090", 24, (8, 6), 82, 71.0),
    Card("RTX 3090 Ti", 24, (8, 6), 84, 80.0),
    Card("RTX 4060", 8, (8, 9), 24, 30.2),
    Card("RTX 4060 Ti", 8, (8, 9), 34, 44.1),
    Card("RTX 4060 Ti 16GB", 16, (8, 9), 34, 44.1),
    Card("RTX 4070", 12, (8, 9), 46, 58.3),
    Card("RTX 4070 SUPER", 12, (8, 9), 56, 71.0),
    Card("RTX 4070 Ti", 12, (8, 9), 60, 80.2),
    Card("RTX 4070 Ti SUPER", 16, (8, 9), 66, 88.2),
    Card("RTX 4080", 16, (8, 9), 76, 97.5),
    Card("RTX 4080 SUPER", 16, (8, 9), 80, 104.4),
    Card("RTX 4090", 24, (8, 9), 128, 165.2),
    Card("RTX 5060", 8, (12, 0), 30, 38.4),
    Card("RTX 5060 Ti", 8, (12, 0), 36, 47.4),
    Card("RTX 5060 Ti 16GB", 16, (12, 0), 36, 47.4),
    Card("RTX 5070", 12, (12, 0), 48, 61.7),
    Card("RTX 5070 Ti", 16, (12, 0), 70, 87.9),
    Card("RTX 5080", 16, (12, 0), 84, 112.6),
    Card("RTX 5090", 32, (12, 0), 170, 209.5),
    Card("RTX A4000", 16, (8, 6), 48, 76.7, 0.5),
    Card("RTX A5000", 24, (8, 6), 64, 111.1, 0.5),
    Card("RTX A6000", 47.5, (8, 6), 84, 154.8, 0.5),
    Card("RTX 6000 Ada", 47.5, (8, 9), 142, 364.2, 0.5),
    Card("RTX PRO 6000", 95, (12, 0), 188, 503.8, 0.5),
    Card("A10", 22, (8, 6), 72, 125.0, 0.5),
    Card("A40", 44.4, (8, 6), 84, 149.7, 0.5),
    Card("A100", 79.2, (8, 0), 108, 312.0, OTHER),
    Card("A100 40GB", 39.4, (8, 0), 108, 312.0, OTHER),
    Card("L4", 22, (8, 9), 60, 121.0, 0.5),
    Card("L40S", 44.4, (8, 9), 142, 362.0, 0.5),
    Card("H100", 79.2, (9, 0), 132, 989.0, HOPPER),
    Card("H100 PCIe", 79.2, (9, 0), 114, 756.0, HOPPER),
    Card("H200", 139.8, (9, 0), 132, 989.0, HOPPER),
    Card("B200", 178, (10, 0), 148, 2250.0, 0.46),
    Card("T4", 14.6, (7, 5), 40, 65.0, 0.28),
    Card("V100", 15.8, (7, 0), 80, 125.0, OTHER),
    Card("V100 32GB", 31.7, (7, 0), 80, 125.0, OTHER),
)
# The cards assumed if only a memory size is known: the slowest common card of each size.
TYPICAL = ("RTX 3060 Ti", "RTX 3060", "RTX 4060 Ti 16GB", "RTX 3090", "RTX 5090", "RTX A6000", "A100", "H200")


def card_named(text: str) -> Card | None:
    """Return the card of a name that users or drivers give it: `3090`, `RTX 4060 Ti 16GB`, `NVIDIA A100-SXM4-80GB`.

    Upper and lower case are equal. None for names that are not in the table, and for laptop GPUs, which have other
    chips.
    """
    key = _key(text)
    return None if "laptop" in key or "maxq" in key else _by_key().get(key)


def typical_card(total_bytes: int) -> Card:
    """Return the card to assume, as a lower bound, for a card of which only the memory is known."""
    table = {card.name: card for card in CARDS}
    typical = [table[name] for name in TYPICAL]
    return next((card for card in typical if total_bytes <= card.total_bytes), typical[-1])


@cache
def _by_key() -> dict[str, Card]:
    found: dict[str, Card] = {}
    for card in CARDS:
        for key in (_key(card.name), _key(card.name) + f"{round(card.gib)}gb", _key(card.name).removeprefix("rtx")):
            found.setdefault(key, card)
    # Advertised sizes, where the driver reports less.
    for name, size in (("A100", 80), ("H100", 80), ("H200", 141), ("L40S", 48), ("RTX A6000", 48), ("V100", 16)):
        found.setdefault(_key(name) + f"{size}gb", found[_key(name)])
    return found


def _key(text: str) -> str:
    """Return a name without the words that do not identify the chip."""
    text = re.sub(r"\b(nvidia|geforce|tesla|quadro|sxm\d?|hbm\d?e?|generation|blackwell|workstation|server|edition|tensor|core|gpu)\b",
                  " ", text.lower().replace("-", " ").replace("_", " "))  # fmt: skip
    if "h100" not in text:  # the only card whose PCIe board has a different chip
        text = text.replace("pcie", " ")
    text = re.sub(r"(\d)\s*gi?b\b", r"\1gb", text)
    return re.sub(r"[^a-z0-9]", "", text)
