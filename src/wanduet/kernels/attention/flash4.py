"""flash-attn-4's forward kernel, unchanged or with wanduet's softmax for Hopper.

Inputs: `q` `[B, L, H, D]`, `k` and `v` `[B, S, H, D]` in bfloat16 or float16, with contiguous channels of a head.
Outputs: the result `[B, L, H, D]` and the natural logarithm of each query's sum of exponentials, `[B, H, L]` float32.
"""

import importlib.util
from functools import cache
from hashlib import sha256
from pathlib import Path
from threading import Lock
from types import ModuleType

import torch
from torch import Tensor

from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.attention.sparse import KeyLists

_building = Lock()
QUERIES, MOST_KEYS, KEYS = 64, 128, 16  # blocks of a list: multiples of QUERIES, and of KEYS up to MOST_KEYS


def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall | None = None) -> tuple[Tensor, Tensor]:
    """Call the library's own kernel."""
    from flash_attn.cute import flash_attn_func

    with torch.cuda.device(q.device):
        out, lse = flash_attn_func(q, k, v, return_lse=True)
    return out, lse


def attend_steady(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall | None = None) -> tuple[Tensor, Tensor]:
    """Call the kernel with a softmax that computes the largest score of the first tile of keys only.

    The rare queries for which this overflows are computed again. `wanduet.kernels.attention.flash4_softmax` explains
    why the result is exact.
    """
    from wanduet.kernels.attention.flash4_redo import redo

    with torch.cuda.device(q.device):
        out, lse, *_ = _steady_interface()._flash_attn_fwd(
            q, k, v, tile_mn=(128, 128), mma_pv_is_rs=True, intra_wg_overlap=True, return_lse=True
        )
        redo(q, k, v, out, lse)
    return out, lse


def attend_listed(q: Tensor, k: Tensor, v: Tensor, lists: KeyLists) -> tuple[Tensor, Tensor]:
    """Call the kernel of `attend_steady` with lists of key blocks, as `sparse.sparse_attention_with_lse` does; the library's own
    where Triton is not installed.

    For Hopper only, where a block of keys is the kernel's tile. It masks the end of the keys in the last entry of a list
    only. (On 8.x, the library ignores lists.)
    Raises ValueError for blocks that it cannot read.
    """
    from flash_attn.cute import interface
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    sizes_fit = lists.query_size % QUERIES == 0 and lists.key_size % KEYS == 0 and lists.key_size <= MOST_KEYS
    if lists.query_blocks is not None or lists.key_blocks is not None or not sizes_fit:
        raise ValueError(f"blocks of {lists.query_size} queries and {lists.key_size} keys are not supported")
    # The kernel also reads lists of blocks that no query masks: here they are empty.
    none = torch.zeros_like(lists.count)
    blocks = BlockSparseTensorsTorch(
        lists.count, lists.index, none, lists.index, block_size=(lists.query_size, lists.key_size)
    )
    is_steady = importlib.util.find_spec("triton") is not None
    with torch.cuda.device(q.device):
        called = _steady_interface() if is_steady else interface
        out, lse, *_ = called._flash_attn_fwd(q, k, v, block_sparse_tensors=blocks, return_lse=True)
        if is_steady:
            from wanduet.kernels.attention.sparse_gpu import redo_listed

            redo_listed(q, k, v, lists, out, lse)
    return out, lse


def _steady_interface() -> ModuleType:
    with _building:
        return _build_steady_interface()


@cache
def _build_steady_interface() -> ModuleType:
    """Return the library's interface with the softmax of its Hopper kernel replaced.

    The replacement is in copies of two modules, so that the library's own stay unchanged. Compiled kernels are cached
    next to the library's, in one folder for each version of the softmax.
    """
    from flash_attn.cute.cache_utils import get_jit_cache

    from wanduet.kernels.attention import flash4_softmax

    kernel = _copy_of("flash_attn.cute.flash_fwd_sm90")
    kernel.Softmax = flash4_softmax.SteadySoftmax  # type: ignore[attr-defined]
    interface = _copy_of("flash_attn.cute.interface")
    interface.FlashAttentionForwardSm90 = kernel.FlashAttentionForwardSm90  # type: ignore[attr-defined]
    source = sha256(Path(flash4_softmax.__file__).read_bytes()).hexdigest()
    interface._flash_attn_fwd.compile_cache = get_jit_cache(f"wanduet-{source[:16]}")
    return interface


def _copy_of(name: str) -> ModuleType:
    """Execute a module again and return this copy, separate from the imported module."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ImportError(f"{name} is not there.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
