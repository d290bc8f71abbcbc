"""Every Triton kernel compiles for the cards that are promised, fits their shared memory, and keeps its values in registers.

No card is needed: `benchmarks/compile_ahead.py` stands in for the driver. One process a card, as Triton knows only one.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.forked import start_program

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "compile_ahead.py"
CAPABILITIES = (80, 86, 89, 90, 120)
CODE = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
RESERVED = 1024  # bytes of shared memory that the system keeps for each program
MOST_STACK = 48  # bytes a thread: a few registers' worth beside the 255 that there are
# Larger, known and left: repairing attention is for rows that are rare; a text of more than 128 keys on cards with wgmma,
# whose other tiles were not measured yet.
KNOWN = {("_redo_kernel", capability): 256 for capability in CAPABILITIES}
KNOWN |= {("_text_attention_kernel", 90): 704}
# In 8 bits, where two programs on a multiprocessor are faster, though their registers then do not hold everything.
KNOWN |= {("_attend_kernel", 90): 192}
KNOWN |= {
    ("_product_kernel", capability): 192 for capability in (80, 90)
}  # of sizes that no video model is trained for

pytest.importorskip("triton")


@pytest.mark.parametrize(
    "capability", [86, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 89, 90, 120))]
)
def test_every_kernel_of_the_defaults_fits(capability: int, tmp_path: Path) -> None:
    fits(capability, tmp_path, "--brief")


# 12.0 has the shared memory of 8.6, whose defaults are compiled above.
@pytest.mark.parametrize("capability", [*(pytest.param(one, marks=pytest.mark.slow) for one in (80, 89, 120)), 90])
def test_every_kernel_of_the_transformer_fits(capability: int, tmp_path: Path) -> None:
    """The tiles of the VAE follow from shared memory, by a rule that has a test of its own."""
    fits(capability, tmp_path, "--brief", "--dtype", "bfloat16")


def test_products_in_fp8_fit_on_cards_that_have_all_else_of_those_above(tmp_path: Path) -> None:
    """8.9 has the shared memory of 8.6, and its instructions beside those of fp8."""
    found = {row["kernel"] for row in compiled(89, tmp_path, "--brief", "--dtype", "bfloat16", "--part", "fp8")}
    assert found == {"_quantize_kernel", "_residual_norm_kernel", "_linear_kernel"}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_fits(capability: int, tmp_path: Path) -> None:
    """In both dtypes, at all sizes, in strips, and of the 14B model."""
    fits(capability, tmp_path)


def compiled(capability: int, tmp_path: Path, *flags: str) -> list[dict[str, Any]]:
    """The rows of what was compiled, all of which fits and does not spill."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT / "src"),
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DISABLE_LINE_INFO": "1",  # which takes a twentieth of the time
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("TRITON_INTERPRET", None)  # of tests that ran before in this process
    arguments = [str(SCRIPT), "--capability", str(capability), "--json", *flags]
    program = start_program(CODE, arguments, tmp_path, environment)
    out, err = program.communicate()
    assert out, err[-2000:]
    rows = json.loads(out)["rows"]
    assert [row for row in rows if not row["fits"]] == []
    assert program.returncode == 0
    spilling = {
        (row["kernel"], row["form"], row["stack"])
        for row in rows
        if row["stack"] > KNOWN.get((row["kernel"], capability), MOST_STACK)
    }
    assert spilling == set()
    return rows


def fits(capability: int, tmp_path: Path, *flags: str) -> None:
    rows = compiled(capability, tmp_path, *flags)
    small = [row for row in rows if row["kernel"] == "_convolution_kernel" and "PIXELS=64 " in row["form"]]
    assert all(2 * (row["shared"] + RESERVED) <= row["limit"] + RESERVED for row in small)  # two on a multiprocessor
    if "--dtype" not in flags:
        sides = {tuple(re.findall(r"(?:FIRST|SECOND)=\d+", row["form"])) for row in small}
        assert len(sides) == (0 if capability == 90 else 2)
    found = {(row["kernel"], row["dtype"]) for row in rows}
    assert ("_text_attention_kernel", "bfloat16") in found
    assert "--dtype" in flags or {("_convolution_kernel", "float32"), ("_product_kernel", "float32")} <= found
    texts = [row["form"] for row in rows if row["kernel"] == "_text_attention_kernel"]
    assert {"ONE_BLOCK=True", "ONE_BLOCK=False"} == {word for form in texts for word in form.split() if "ONE" in word}
    assert len(rows) >= (12 if "--dtype" in flags else 39)
