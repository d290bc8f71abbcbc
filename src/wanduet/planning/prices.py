"""What the named speeds lose with given weights, as measured on this machine."""

from pathlib import Path

from wanduet.family.speeds import BY_NAME, Price
from wanduet.meta.prices import worst_of


def loss_of_speed(folder: Path, model_hash: str | None, speed: str) -> Price | None:
    """Return what a speed loses with the weights of a hash (None: random weights); None if that was not measured.

    It is the worst of all sizes and steps that `wanduet price` measured with these weights. `folder`: of measurements.
    """
    if model_hash is None:
        return None
    psnr = worst_of(folder, model_hash, BY_NAME[speed].fields, "psnr")
    return None if psnr is None else Price(psnr, "worst", "measured on this machine")
