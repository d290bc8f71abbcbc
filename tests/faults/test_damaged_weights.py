"""Files of a model damaged at random, by every way that disks and networks have: each found, and named."""

import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from wanduet.errors import WeightsError
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.hub import open_model, verify_manifest

SHORT, LONG = 60, 2000


def flip(data: bytearray, dice: random.Random) -> None:
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)


def zero(data: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(data))
    while not data[start]:  # where there is something to lose
        start = dice.randrange(len(data))
    end = min(len(data), start + dice.randrange(1, 4096))
    data[start:end] = bytes(end - start)


def cut(data: bytearray, dice: random.Random) -> None:
    del data[dice.randrange(len(data)) :]


def lengthen(data: bytearray, dice: random.Random) -> None:
    data += dice.randbytes(dice.randrange(1, 4096))


def huge_header(data: bytearray, dice: random.Random) -> None:
    data[:8] = dice.randrange(2**33, 2**63).to_bytes(8, "little")


WAYS = (flip, zero, cut, lengthen, huge_header)


@pytest.mark.parametrize("tries", [SHORT, pytest.param(LONG, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_every_damage_is_found_and_its_file_is_named(tmp_path: Path, record_property: Any, tries: int) -> None:
    model, remember = tmp_path / "model", tmp_path / "verified.json"
    shutil.copytree(open_model("miniature").path, model)
    assert verify_manifest(ModelFolder(model, "damaged"), remember) > 0
    dice, found = random.Random(0), Counter[str]()
    for _ in range(tries):
        path = dice.choice(sorted(model.rglob("*.safetensors")))
        way = dice.choice(WAYS)
        whole, times = path.read_bytes(), path.stat()
        data = bytearray(whole)
        way(data, dice)
        assert data != whole
        path.write_bytes(data)
        with pytest.raises(WeightsError, match=path.parent.name):
            verify_manifest(ModelFolder(model, "damaged"), remember)
        found[way.__name__] += 1
        path.write_bytes(whole)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for name, count in found.items():
        record_property(name, count)
    print(f"{found.total()} of {tries} found: {dict(found)}")
    assert found.total() == tries
    assert set(found) == {way.__name__ for way in WAYS}
    verify_manifest(ModelFolder(model, "damaged"), remember)
