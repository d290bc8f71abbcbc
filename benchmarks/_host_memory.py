"""Host memory that loading weights takes: resident anonymous memory and resident pages of mapped files, at their peak.

python benchmarks/_host_memory.py [GiB of float32] makes such a file and loads it into bfloat16, in a process of its own.
"""

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

GIB = 2**30
SIDE = 2048  # of the square tensors in the file: 16 MiB each


def make_shard(path: Path, num_bytes: int) -> None:
    """A safetensors file of so many bytes of float32, in tensors of 16 MiB."""
    import torch
    from safetensors.torch import save_file

    save_file({f"w{i:03}": torch.full((SIDE, SIDE), float(i)) for i in range(num_bytes // (4 * SIDE**2))}, path)


def resident() -> int:
    """Bytes of this process that are resident: its own and mapped files' (`RssAnon` and `RssFile`). Linux only."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))


def loaded_peak(path: Path) -> dict[str, float]:
    """Load a shard into bfloat16; GiB beside what the process had before."""
    import torch

    from wanduet.weights.safetensors import TensorFiles

    files = TensorFiles("transformer", [path])
    before, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    targets = {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in files.shapes.items()}
    files.load_into(targets)
    done.set()
    watcher.join()
    held = sum(target.nbytes for target in targets.values())
    return {"targets_gib": round(held / GIB, 3), "peak_gib": round((max(highest, resident()) - before) / GIB, 3)}


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(loaded_peak(Path(sys.argv[2])))
    else:
        with tempfile.TemporaryDirectory() as folder:
            shard = Path(folder) / "model.safetensors"
            make_shard(shard, int(float(sys.argv[1] if len(sys.argv) > 1 else 1) * GIB))
            subprocess.run([sys.executable, __file__, "load", str(shard)], check=True)
