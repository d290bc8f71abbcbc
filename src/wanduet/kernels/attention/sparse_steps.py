"""Self-attention that is sparse from a step on, and the kernel that it uses on a device."""

import importlib.util
import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from wanduet.errors import ConfigError, KernelFailedError
from wanduet.family.sparsity import kept_blocks
from wanduet.kernels.attention import flash4
from wanduet.kernels.attention.backends import AttentionFn, available_backends
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.attention.choose import EXACT_TOLERANCE, Shape
from wanduet.kernels.attention.key_lists import highest_blocks, pooled_lists
from wanduet.kernels.attention.sparse import PLAIN_BYTES, Blocks, KeyLists, ListedFn, plain_listed
from wanduet.kernels.precision import EXACT, PRODUCTS
from wanduet.kernels.verdicts import IN_A_JOB, guard, plain_operations, reason_of

log = logging.getLogger(__name__)

SPARSE = "sparse attention"  # how the name of a kernel's operation begins, in messages and verdicts
CHECKED_HEADS = 2
CUT_BLOCK = 64  # the largest of blocks of different sizes


@dataclass(frozen=True, slots=True)
class ListedBackend:
    """A kernel of sparse attention, by name."""

    name: str
    attend: ListedFn

    @property
    def operation(self) -> str:
        """The name by which a failure is recorded (`kernels.verdicts`)."""
        return f"{SPARSE} by {self.name}"


PLAIN = ListedBackend("plain", plain_listed)


@dataclass(frozen=True, slots=True)
class SparseSteps:
    """How a denoise is sparse: from step `first_step` of the schedule on, attention of each block but the first reads
    `share` of the blocks of `block` keys (`key_lists.pooled_lists`)."""

    backend: ListedBackend
    share: float
    block: int
    first_step: int

    def over(self, dense: AttentionFn) -> AttentionFn:
        """Return the attention of a denoise, which is `dense` where it is not sparse. It needs the keys of all tokens at
        once. Raises KernelFailedError, with the step, if a kernel fails where it is sparse."""

        def listed(q: Tensor, k: Tensor, v: Tensor, first_query: int) -> Tensor:
            return self.backend.attend(q, k, v, pooled_lists(q, k, self.share, self.block, first_query))[0]

        guarded = guard(self.backend.operation, listed)

        def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
            if call.step is None or call.step.index < self.first_step or call.block == 0:
                return dense(q, k, v, call)
            try:
                return guarded(q, k, v, call.first_query)
            except KernelFailedError as error:
                operation, reason = error.operation, f"{error.reason}, at step {call.step.index + 1}"
            raise KernelFailedError(operation, reason)  # outside the handler, see `guard`

        return attend


def sparse_bytes(shape: Shape, share: float, block: int, is_cpu: bool) -> int:
    """Return a bound on the bytes that sparse attention needs beside its inputs and its result, the order of the tokens
    included."""
    tokens, heads, head_dim = shape.keys, shape.heads, shape.head_dim
    blocks = -(-tokens // block)
    lists = heads * blocks * (16 * head_dim + 4 * blocks + 4 * kept_blocks(share, blocks) + 4)
    order = 16 * tokens
    if not is_cpu:
        return lists + order
    # Sorted scores, with indices of 8 bytes; queries, keys, values and the result in float32; keys and values gathered.
    return 7 * lists + order + 5 * 4 * tokens * heads * head_dim + 4 * PLAIN_BYTES


@lru_cache
def choose_listed(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block: int | tuple[int, int] | None,
    backends: tuple[ListedBackend, ...] | None = None,
) -> ListedBackend | None:
    """Return the fastest kernel of sparse attention that works on `device`: flash-attn-4's on Hopper, Triton's on other
    GPUs, the plain form on the CPU; None if those that work have failed in a job. `block`: tokens of a block of queries and
    of keys, one number if they are equal, or None for blocks of different sizes. `backends`: try these instead, in order.

    Each but the plain form is first compared with the definition on a short sequence. Raises ConfigError if none works.
    """
    failed = set(plain_operations(IN_A_JOB, device) or ())
    problem = "Triton is not installed"
    sizes = block if isinstance(block, tuple) else (block or CUT_BLOCK, block or CUT_BLOCK)
    found = listed_backends(device, dtype, None if block is None else sizes[0]) if backends is None else backends
    for backend in found:
        if backend.operation in failed:
            continue
        try:
            kind = (device, dtype, head_dim)
            problem = "" if backend is PLAIN else _problem(backend.attend, kind, sizes, is_cut=block is None)
        except Exception as failure:  # a kernel's library can raise any exception
            log.info("Sparse attention by %s failed.", backend.name, exc_info=failure)
            problem = reason_of(failure)
        if not problem:
            return backend
        log.warning("Sparse attention by %s is not used: %s.", backend.name, problem)
    if any(backend.operation in failed for backend in found):
        return None
    raise ConfigError(f"Sparse attention does not work on {device}: {problem}.", hint="Leave --sparse out.")


def listed_backends(device: torch.device, dtype: torch.dtype, queries: int | None) -> tuple[ListedBackend, ...]:
    """Return what could run on a device, the fastest first. On cards of other generations, flash-attn-4 fails, or reads all
    keys.

    `queries`: of a block; None for blocks of different sizes.
    """
    if device.type != "cuda":
        return (PLAIN,)
    found: list[ListedBackend] = []
    is_hopper = torch.cuda.get_device_capability(device) == (9, 0)
    if (
        is_hopper
        and dtype in (torch.bfloat16, torch.float16)
        and queries is not None
        and queries % flash4.QUERIES == 0
        and "flash-attn-4" in available_backends(device)
    ):
        found.append(ListedBackend("flash-attn-4", flash4.attend_listed))
    if importlib.util.find_spec("triton") is not None:
        from wanduet.kernels.attention import sparse_gpu

        found.append(ListedBackend("triton", sparse_gpu.attend_listed))
    return tuple(found)


@torch.no_grad()
def _problem(
    attend: ListedFn, kind: tuple[torch.device, torch.dtype, int], sizes: tuple[int, int], is_cut: bool
) -> str:  # fmt: skip
    """Return what is wrong with a kernel for blocks of so many queries and keys; empty if it works. The last block is shorter;
    with `is_cut`, the first two are instead.

    `kind`: device, dtype and channels of a head.
    """
    device, dtype, head_dim = kind
    generator = torch.Generator(device).manual_seed(0)
    tokens = 3 * max(sizes) + (15 if is_cut else 7)
    shape = (3, 1, tokens, CHECKED_HEADS, head_dim)
    q, k, v = torch.randn(shape, device=device, dtype=dtype, generator=generator)
    rows, columns, blocks = -(-tokens // sizes[0]), -(-tokens // sizes[1]), None
    if is_cut:
        starts = torch.tensor([0, 7, *range(15, tokens + 1, sizes[0])], dtype=torch.int32, device=device)
        blocks = Blocks(starts, 2)
        rows = columns = len(starts) - 1
    scores = torch.randn((1, CHECKED_HEADS, rows, columns), device=device, generator=generator)
    lists = KeyLists(*highest_blocks(scores, 2), *sizes, blocks, blocks)
    with PRODUCTS.at(EXACT):
        expected, expected_lse = plain_listed(q.float(), k.float(), v.float(), lists)
    out, lse = attend(q, k, v, lists)
    error = float((out.float() - expected).norm() / expected.norm())
    off = float((lse - expected_lse).abs().max())
    return "" if max(error, off) <= EXACT_TOLERANCE[dtype] else f"wrong result (error {max(error, off):.1e})"
