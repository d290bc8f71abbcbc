import torch

from wanduet.media.files import atomic_output
from wanduet.sampling.checkpoint import Checkpoints, DenoiseCheckpoint, find_checkpoints


def checkpoint(step: int) -> DenoiseCheckpoint:
    state = {"model_outputs": [None, torch.full((2, 2), float(step))], "lower_order_nums": step}
    return DenoiseCheckpoint(step, torch.randn(1, 2, 3), state, {"seed": 4})


def test_the_newest_is_read_back_whole(tmp_path) -> None:
    store = Checkpoints(tmp_path, "a", atomic_output)
    assert store.load() is None
    first, second = checkpoint(1), checkpoint(2)
    store.save(first)
    store.save(second)
    got = store.load()
    assert got.step == 2
    assert torch.equal(got.latents, second.latents)
    assert got.sampler_state["model_outputs"][0] is None
    assert torch.equal(got.sampler_state["model_outputs"][1], second.sampler_state["model_outputs"][1])
    assert [c.about for c in find_checkpoints(tmp_path)] == [{"seed": 4}, {"seed": 4}]
    store.remove()
    assert store.load() is None


def test_damage_falls_back_to_the_previous(tmp_path) -> None:
    store = Checkpoints(tmp_path, "a", atomic_output)
    store.save(checkpoint(1))
    store.save(checkpoint(2))
    whole = store.path.read_bytes()
    for at in range(len(whole) - 40, len(whole), 7):
        damaged = bytearray(whole)
        damaged[at] ^= 0x10
        store.path.write_bytes(damaged)
        assert store.load().step == 1
    store.path.write_bytes(whole[: len(whole) // 2])
    assert store.load().step == 1
    store.path.write_bytes(whole)
    assert store.load().step == 2


def test_what_nobody_came_back_for_goes(tmp_path) -> None:
    import os
    import time

    from wanduet.sampling.checkpoint import remove_abandoned

    for name, days in (("old.safetensors", 40), ("old.previous.safetensors", 40), ("new.safetensors", 2)):
        (tmp_path / name).write_text("x")
        then = time.time() - 86400 * days
        os.utime(tmp_path / name, (then, then))
    assert remove_abandoned(tmp_path, 30) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["new.safetensors"]
    assert remove_abandoned(tmp_path / "not there", 30) == 0
