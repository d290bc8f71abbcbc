"""What loading weights takes of the host: little more than where they go."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wanduet.weights import safetensors as module
from wanduet.weights.safetensors import TensorFiles, portions

MIB = 2**20


def mapped_and_resident(path: Path) -> int:
    """Bytes of a file that are in this process's memory through a mapping."""
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:  # the first line of a mapping
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_was_read_does_not_stay_mapped(tmp_path: Path, monkeypatch, dtype) -> None:
    monkeypatch.setattr(module, "MAPPED_BYTES", 4 * MIB)
    path = tmp_path / "model.safetensors"
    wanted = {f"w{i:02}": torch.full((512, 512), float(i)) for i in range(32)}  # 1 MiB each
    wanted["large"] = torch.ones(6, 512, 512)  # more than is mapped at a time
    save_file(wanted, path)
    files = TensorFiles("transformer", [path])
    most, real = 0, TensorFiles.iterate

    def watched(self, names):
        nonlocal most
        for name, tensor in real(self, names):
            tensor.sum()  # all of it is read
            most = max(most, mapped_and_resident(path))
            yield name, tensor
            del tensor

    monkeypatch.setattr(TensorFiles, "iterate", watched)
    targets = {name: torch.empty(value.shape, dtype=dtype) for name, value in wanted.items()}
    files.load_into(targets)
    assert 6 * MIB <= most <= 6 * MIB + 5 * MIB
    for name, value in wanted.items():
        torch.testing.assert_close(targets[name], value.to(dtype), rtol=0, atol=0)
    assert set(files.read(["w01", "w31"], dtype)) == {"w01", "w31"}
    assert mapped_and_resident(path) == 0


@pytest.mark.parametrize(("sizes", "runs"), [([1, 1, 1], [[0, 1], [2]]), ([9, 1, 1], [[0], [1, 2]]), ([2], [[0]])])
def test_runs_are_no_longer_than_they_may_be(tmp_path: Path, monkeypatch, sizes, runs) -> None:
    monkeypatch.setattr(module, "MAPPED_BYTES", 2 * 400)
    path = tmp_path / "model.safetensors"
    save_file({str(i): torch.zeros(100 * size) for i, size in enumerate(sizes)}, path)
    files = TensorFiles("vae", [path])
    assert list(portions([str(i) for i in range(len(sizes))], files.tensors)) == [[str(i) for i in run] for run in runs]
