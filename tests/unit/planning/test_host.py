"""What the machine says of its memory, on systems that are not here too."""

import platform
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from wanduet.planning import host

GIB = 2**30


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_a_container_sees_its_own_limit(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("0::/\n")
    write(root, memory__max=str(8 * GIB), memory__current=str(6 * GIB), memory__stat=f"anon 5\ninactive_file {GIB}")
    assert host._cgroup_limits(root, own) == [(8 * GIB, 5 * GIB)]
    own.write_text("0::/a/path/that/only/the/host/knows\n")
    assert host._cgroup_limits(root, own) == [(8 * GIB, 5 * GIB)]
    write(root, memory__max="max")
    assert host._cgroup_limits(root, own) == []


def test_a_job_is_bound_by_every_group_around_it(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("1:name=systemd:/x\n0::/slurm/job_7/step_0\n")
    write(root / "slurm" / "job_7", memory__max=str(16 * GIB), memory__current=str(GIB))
    write(root / "slurm" / "job_7" / "step_0", memory__max="max", memory__current=str(GIB))
    assert host._cgroup_limits(root, own) == [(16 * GIB, GIB)]


def test_the_older_control_groups(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"
    own.write_text("4:cpu,cpuacct:/docker/1\n7:memory:/docker/1\n")
    write(
        root / "memory", memory__limit_in_bytes=str(4 * GIB), memory__usage_in_bytes=str(3 * GIB),
        memory__stat=f"total_inactive_file {2 * GIB}",
    )  # fmt: skip
    assert host._cgroup_limits(root, own) == [(4 * GIB, GIB)]
    assert host._cgroup_limits(root, tmp_path / "none") == []


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=32 * GIB, available=20 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(host, "_cgroup_limits", lambda: [(2**63, 5 * GIB), (16 * GIB, 6 * GIB)])
    assert host.host_memory() == (16 * GIB, 10 * GIB)


def test_the_peak_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(rss=GIB, peak_wset=5 * GIB)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: about))
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert host.process_peak_bytes() == 5 * GIB


def test_the_peak_here() -> None:
    assert host.process_peak_bytes() > 10 * 2**20
