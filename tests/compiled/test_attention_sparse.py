"""Sparse attention's Triton kernels compile for the cards that are promised, fit their shared memory, and keep their values
in registers. As in test_compile_ahead.py, no card is needed.
"""

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.forked import start_program

ROOT = Path(__file__).parents[2]
CODE = "import runpy, sys; sys.path.insert(0, sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"
MOST_STACK = 48  # bytes a thread

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("capabilities", "every"),
    # 8.9 has the shared memory of 8.6, and its instructions.
    [([86, 120], False), *(pytest.param([one], True, marks=pytest.mark.slow) for one in (80, 86, 89, 90, 120))],
)
def test_kernels_of_sparse_attention_fit(capabilities: list[int], every: bool, tmp_path: Path) -> None:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DISABLE_LINE_INFO": "1",  # which takes a twentieth of the time
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)  # of tests that ran before in this process
    arguments = [str(ROOT / "benchmarks"), __file__, json.dumps(capabilities), *(["every"] if every else [])]
    program = start_program(CODE, arguments, tmp_path, environment)
    out, err = program.communicate()
    assert program.returncode == 0, err[-2000:]
    rows = json.loads(out)
    assert len(rows) == (5 * len(capabilities) if every else 5)
    assert [row for row in rows if not row["fits"] or row["stack"] > MOST_STACK] == []


def compile_for(capability: int, lists: bool, tiled: bool) -> list[Any]:
    """Return the rows of what compiles: attention, with `lists` what chooses key blocks, with `tiled` attention to blocks of
    different sizes."""
    devices.on_device_of = lambda x: nullcontext()
    from wanduet.kernels.attention import key_lists_gpu, sparse_gpu
    from wanduet.kernels.attention.sparse import Blocks, KeyLists

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    driver.set_active(Driver(capability))
    for module in (sparse_gpu, key_lists_gpu):
        for kernel in vars(module).values():
            if isinstance(kernel, JITFunction):
                kernel.device_caches.clear()  # of the card before
    with torch.no_grad(), Recorder(capability, "bfloat16") as recorder:
        q, k, v = torch.empty(3, 1, 32760, 12, 128, dtype=torch.bfloat16, device="meta")
        sparse_gpu.attend_listed(q, k, v, KeyLists(ints(1, 12, 256), ints(1, 12, 256, 128)))
        if tiled:
            tiles = Blocks(ints(625), 169)
            cut = KeyLists(ints(1, 12, 624), ints(1, 12, 624, 125), 64, 64, tiles, tiles)
            sparse_gpu.attend_listed(q, k, v, cut)
        if lists:
            moments = key_lists_gpu.block_moments(q, 128, (1.0, 1.0, True))
            key_lists_gpu.highest_blocks(key_lists_gpu.block_scores(moments, moments), 128)
    return [asdict(row) | {"fits": row.fits} for row in recorder.rows]


if __name__ == "__main__":
    import torch
    from compile_ahead import Driver, Recorder
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from wanduet.kernels import device as devices

    capabilities, every = json.loads(sys.argv[3]), "every" in sys.argv
    print(json.dumps([row for one in capabilities for row in compile_for(one, every or one == capabilities[0], every)]))
