import os
import stat
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tests.forked import start_program
from wanduet.media.files import atomic_output
from wanduet.sampling import checkpoint as module
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


@pytest.mark.parametrize("where", ["latents", "history"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_neither_written_nor_read(tmp_path, monkeypatch, where, value) -> None:
    store = Checkpoints(tmp_path, "a", atomic_output)
    assert store.save(checkpoint(1))
    bad = checkpoint(2)
    (bad.latents if where == "latents" else bad.sampler_state["model_outputs"][1]).view(-1)[0] = value
    assert not store.save(bad)
    assert store.load().step == 1
    with monkeypatch.context() as patch:  # as versions before this one did
        patch.setattr(module, "_finite", lambda tensors: True)
        assert store.save(bad)
    assert store.load().step == 1
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finite", lambda tensors: True)
        assert store.save(bad)
    assert store.load() is None  # both are bad: from the beginning
    store.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_checkpoint_before_and_no_scraps(tmp_path, monkeypatch) -> None:
    store = Checkpoints(tmp_path, "a", atomic_output)
    store.save(checkpoint(1))

    def full(tensors, path, metadata) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        store.save(checkpoint(2))
    assert store.load().step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("locked", ["a.safetensors", "a.previous.safetensors"])
def test_a_checkpoint_that_a_scanner_looks_at_is_waited_for(tmp_path, monkeypatch, locked) -> None:
    """Windows neither moves nor replaces it meanwhile."""
    store = Checkpoints(tmp_path, "a", atomic_output)
    store.save(checkpoint(1))
    store.save(checkpoint(2))
    replace, looks = os.replace, [True] * 3

    def refuse_at_first(source, target) -> None:
        if looks and locked in (Path(source).name, Path(target).name):
            looks.pop()
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "replace", refuse_at_first)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    store.save(checkpoint(3))
    assert not looks
    assert store.load().step == 3


def test_a_checkpoint_is_on_the_disk_with_its_name(tmp_path, monkeypatch) -> None:
    """File and folder, before anybody counts on it."""
    synced: list[bool] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(stat.S_ISDIR(os.fstat(handle).st_mode)) or fsync(handle)
    )
    Checkpoints(tmp_path / "new", "a", atomic_output).save(checkpoint(1))
    assert False in synced
    assert sys.platform == "win32" or synced[-1]  # the folder, once the file has its name


WRITERS = """
import sys
from pathlib import Path
import torch
from wanduet.media.files import atomic_output
from wanduet.sampling.checkpoint import Checkpoints, DenoiseCheckpoint
store = Checkpoints(Path(sys.argv[1]), "a", atomic_output, sys.argv[2])
for step in range(1, 30):
    value = torch.full((1, 64), float(step))
    store.save(DenoiseCheckpoint(step, value, {"last_sample": value}, {"by": sys.argv[2]}))
    found = store.load()
    assert found is not None and bool((found.latents == found.step).all()), found
print("done")
"""


def test_two_processes_with_one_name_never_break_each_others_files(tmp_path) -> None:
    running = [start_program(WRITERS, [str(tmp_path), name], tmp_path, os.environ) for name in ("one", "two")]
    assert [process.communicate(timeout=120) for process in running] == [("done\n", "")] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "a.previous.safetensors"}


def test_who_is_done_leaves_what_another_still_needs(tmp_path) -> None:
    one, two = (Checkpoints(tmp_path, "a", atomic_output, name) for name in ("one", "two"))
    one.save(checkpoint(3))
    two.save(checkpoint(1))
    one.remove()
    assert two.load().step == 1
    assert two.load(own_only=True).writer == "two"
    assert one.load(own_only=True) is None
    later = Checkpoints(tmp_path, "a", atomic_output, "later")
    assert later.load().step == 1
    later.remove()
    assert two.load().step == 1
    later.adopt()  # it goes on from there
    later.remove()
    assert two.load() is None


def test_what_nobody_came_back_for_goes(tmp_path) -> None:
    import time

    from wanduet.sampling.checkpoint import remove_abandoned

    for name, days in (("old.safetensors", 40), ("old.previous.safetensors", 40), ("new.safetensors", 2)):
        (tmp_path / name).write_text("x")
        then = time.time() - 86400 * days
        os.utime(tmp_path / name, (then, then))
    assert remove_abandoned(tmp_path, 30) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["new.safetensors"]
    assert remove_abandoned(tmp_path / "not there", 30) == 0


def test_a_file_that_another_process_moves_while_it_is_opened_is_not_there(tmp_path, monkeypatch) -> None:
    path = tmp_path / "k.safetensors"
    path.write_bytes(b"another process's")

    def vanish(*_: object, **__: object) -> None:
        raise RuntimeError("unable to open file in read-only mode: No such file or directory (2)")

    monkeypatch.setattr(module, "safe_open", vanish)
    checkpoints = Checkpoints(tmp_path, "k", atomic_output, "me")
    assert checkpoints.load() is None
    checkpoints.adopt()
    checkpoints.remove()
    assert path.exists()
