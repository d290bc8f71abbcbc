"""Models on their devices: what must follow a move, and who may use a device."""

import threading

import torch

from wanduet.engine import build
from wanduet.engine.build import Models


def test_a_moved_vae_gets_the_kernels_of_where_it_is(config, monkeypatch) -> None:
    asked: list[str] = []
    kernels = build.vae_kernels_for
    monkeypatch.setattr(build, "vae_kernels_for", lambda d, t: asked.append(d.type) or kernels(torch.device("cpu"), t))
    models = Models(config)
    for device in ("cpu", "cpu", "meta"):  # meta stands for a GPU
        models.load_vae(device, "float32")
    assert asked == ["cpu", "meta"]


def test_a_device_in_use_is_not_idle(config) -> None:
    models = Models(config)
    seen: list[bool] = []

    def look() -> None:
        with models.if_idle("cpu") as idle:
            seen.append(idle)

    for held in (True, False):
        with models._turn("cpu" if held else "another"):
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
    assert seen == [False, True]
