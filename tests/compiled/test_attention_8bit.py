"""Attention with 8-bit scores compiles for every capability that it is offered on, fits, and spills next to nothing.

No card is needed: `benchmarks/compile_ahead.py` stands in for the driver. One process compiles for all capabilities.
"""

import json
import os
from pathlib import Path

import pytest

from tests.forked import start_program

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
sys.path.insert(0, sys.argv[2])
from dataclasses import asdict
from compile_ahead import compile_all
capabilities, brief = json.loads(sys.argv[1])
rows = {c: compile_all(c, "bfloat16", brief, "int8") for c in capabilities}
print(json.dumps({c: [asdict(r) | {"fits": r.fits} for r in found] for c, found in rows.items()}))
"""
KERNELS = {"_sum_kernel", "_mean_kernel", "_code_kernel", "_attend_kernel"}

pytest.importorskip("triton")


def compiled(folder: Path, capabilities: list[int], brief: bool) -> dict[str, list[dict]]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "TRITON_CACHE_DIR": str(folder),
        "TRITON_DISABLE_LINE_INFO": "1",  # which takes a twentieth of the time
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)  # of tests that ran before in this process
    arguments = [json.dumps([capabilities, brief]), str(ROOT / "benchmarks")]
    program = start_program(SCRIPT, arguments, folder, environment)
    out, err = program.communicate()
    assert program.returncode == 0, err[-2000:]
    return json.loads(out)


@pytest.mark.parametrize(
    ("capabilities", "brief"),
    [
        ([86, 90], True),
        pytest.param([80, 86, 89, 90, 120], False, marks=pytest.mark.slow),
    ],
    ids=["half of 128 channels", "all forms"],
)
def test_it_fits_and_hardly_spills(tmp_path: Path, capabilities: list[int], brief: bool) -> None:
    found = compiled(tmp_path, capabilities, brief)
    assert [int(capability) for capability in found] == capabilities
    for capability, rows in found.items():
        # Two programs on a multiprocessor of Hopper are faster, though their registers then do not hold everything.
        most = {"_attend_kernel": 192} if capability == "90" else {}
        assert {row["kernel"] for row in rows} == KERNELS
        assert [row for row in rows if not row["fits"] or row["stack"] > most.get(row["kernel"], 0)] == []
        assert sum(row["kernel"] == "_attend_kernel" for row in rows) == (1 if brief else 5)
