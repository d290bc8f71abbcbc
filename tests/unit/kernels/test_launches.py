"""How kernels are launched, for all of them."""

import ast
from collections.abc import Iterator
from pathlib import Path

KERNELS = Path(__file__).parents[3] / "src" / "wanduet" / "kernels"


def launches(source: str) -> Iterator[tuple[str, set[str | None]]]:
    """Kernels that are launched, with the names of what is given by name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            name = ast.unparse(node.func.value)
            if name.endswith("kernel"):
                yield name, {keyword.arg for keyword in node.keywords}


def test_whether_products_and_sums_are_fused_is_said() -> None:
    """Triton 3.9 warns where it is not, and later ones will not fuse: other bits, and slower."""
    found = [one for path in KERNELS.rglob("*.py") for one in launches(path.read_text("utf-8"))]
    assert len(found) > 10
    assert [name for name, given in found if "enable_fp_fusion" not in given] == []
