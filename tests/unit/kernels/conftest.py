"""Triton's kernels in its interpreter, on the CPU."""

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

KERNELS = (
    "wanduet.kernels.choose_product",
    "wanduet.kernels.dit.gpu",
    "wanduet.kernels.dit.gpu_quantized",
    "wanduet.kernels.attention.cross",
    "wanduet.kernels.attention.flash4_redo",
    "wanduet.kernels.attention.sparse_gpu",
    "wanduet.kernels.attention.key_lists_gpu",
    "wanduet.kernels.attention.int8_codes",
    "wanduet.kernels.attention.int8",
    "wanduet.kernels.vae.norm",
    "wanduet.kernels.vae.attention",
    "wanduet.kernels.vae.conv",
)


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Callable[[str], ModuleType]]:
    """A module of kernels by name, as it is when Triton interprets.

    Triton decides that where a kernel is decorated, its own library included, so both are imported afresh.
    """
    pytest.importorskip("triton")
    before = take_triton_out()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield importlib.import_module
    take_triton_out()
    sys.modules.update(before)


def take_triton_out() -> dict[str, ModuleType]:
    compiled = "triton._C"  # cannot be loaded twice
    names = [n for n in sys.modules if n in KERNELS or (n.split(".")[0] == "triton" and not n.startswith(compiled))]
    return {name: sys.modules.pop(name) for name in names}
