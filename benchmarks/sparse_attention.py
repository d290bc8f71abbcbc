"""Sparse attention in the true shapes of the 1.3B model: dense, sparse, its lists and its order, and errors.

    PYTHONPATH=src python benchmarks/sparse_attention.py [section ...]

Sections: errors speed tiles parts order; and, if named, variants. Time does not depend on the values: they are random, in bf16.
"With lists" includes what chooses the key blocks, for each attention anew. `of_dense`: how many times as fast as the fastest
dense kernel.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _common import DEVICE, LATENT_SIZES, ON_GPU, TINY, Report
from _common import timed_in_a_row as timed
from torch import Tensor

from wanduet.family.sparsity import TILE_TOKENS, block_for
from wanduet.kernels.attention import flash4, key_lists
from wanduet.kernels.attention.backends import sdpa
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.attention.sparse import KeyLists, ListedFn, plain_listed
from wanduet.kernels.attention.trained import TrainedSparse
from wanduet.kernels.precision import EXACT, PRODUCTS
from wanduet.models.dit.token_order import tile_order, token_order

SHARES = (0.5, 0.2)
HEADS, HEAD_DIM = (2, 16) if TINY else (12, 128)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
if ON_GPU:
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")


def grid(size: str) -> tuple[int, int, int]:
    frames, rows, columns = LATENT_SIZES[size]
    return frames, rows // 2, columns // 2


def inputs(size: str) -> tuple[Tensor, Tensor, Tensor, AttentionCall]:
    """q, k, v as slices of one buffer, as the model has them."""
    frames, rows, columns = grid(size)
    generator = torch.Generator(DEVICE).manual_seed(0)
    shape = (1, frames * rows * columns, 3 * HEADS * HEAD_DIM)
    x = torch.randn(shape, device=DEVICE, dtype=DTYPE, generator=generator)
    q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)) for part in x.chunk(3, dim=-1))
    return q, k, v, AttentionCall(grid(size))


def kernels() -> dict[str, ListedFn]:
    if not ON_GPU:
        return {"plain": plain_listed}
    from wanduet.kernels.attention import sparse_gpu

    found = {"flash-attn-4": flash4.attend_listed} if torch.cuda.get_device_capability(DEVICE) == (9, 0) else {}
    return found | {"triton": sparse_gpu.attend_listed}


def attempt(report: Report, section: str, measure: Callable[[], dict[str, Any]], **row: Any) -> dict[str, Any]:
    """Add a row; one that fails says so, and the others still run."""
    try:
        found = measure()
    except Exception as problem:
        traceback.print_exc()
        found = {"problem": f"{type(problem).__name__}: {problem}"[:300]}
    report.add(section, **row, **found)
    return found


def random_lists(q: Tensor, k: Tensor, share: float, block: int) -> KeyLists:
    blocks = [-(-x.shape[1] // block) for x in (q, k)]
    scores = torch.rand(1, q.shape[2], *blocks, device=DEVICE)
    kept = key_lists.kept_blocks(share, blocks[1])
    return KeyLists(*key_lists.highest_blocks(scores, kept), block, block)


def errors(report: Report) -> None:
    """Against the definition in float32, over whole sequences with their short last block; and lists against each other."""
    q, k, v, call = inputs("480p")
    block = block_for(q.shape[1])
    lists = key_lists.pooled_lists(q, k, 0.2, block)
    with PRODUCTS.at(EXACT):
        expected, expected_lse = plain_listed(q.float(), k.float(), v.float(), lists)
        on_cpu = key_lists.pooled_lists(q.float().cpu(), k.float().cpu(), 0.2, block)
    same = float((on_cpu.index == lists.index.cpu()).all(-1).float().mean())
    report.add("errors", kernel="lists", share=0.2, rows_as_on_the_cpu=same)
    for name, attend in kernels().items():

        def error(attend: ListedFn = attend) -> dict[str, Any]:
            out, lse = attend(q, k, v, lists)
            off = (out.float() - expected).norm() / expected.norm()
            last = (out[:, -block:].float() - expected[:, -block:]).norm() / expected[:, -block:].norm()
            return {"error": float(off), "last": float(last), "lse": float((lse - expected_lse).abs().max())}

        attempt(report, "errors", error, kernel=name, share=0.2)

    def all_keys() -> dict[str, Any]:
        dense = sdpa(q, k, v, call).float()
        full = key_lists.pooled_lists(q, k, 1.0, block)
        return {
            name: float((attend(q, k, v, full)[0].float() - dense).norm() / dense.norm())
            for name, attend in kernels().items()
        }

    attempt(report, "errors", all_keys, kernel="all keys, against sdpa", share=1.0)


def speed(report: Report) -> None:
    for size in ("480p", "720p"):
        q, k, v, call = inputs(size)
        block = block_for(q.shape[1])
        dense = {"sdpa": sdpa}
        if ON_GPU and torch.cuda.get_device_capability(DEVICE) == (9, 0):
            dense = {"flash-attn-4": flash4.attend, "flash-attn-4-steady": flash4.attend_steady}
        times = []
        for name, attend in dense.items():
            found = attempt(
                report,
                "dense",
                lambda run=attend: {"ms": timed(lambda: run(q, k, v, call)) * 1e3},
                size=size,
                kernel=name,
            )
            times.append(found.get("ms", float("inf")))
        for share in SHARES:
            pooled, random = key_lists.pooled_lists(q, k, share, block), random_lists(q, k, share, block)
            for name, attend in kernels().items():

                def measure(attend: ListedFn = attend, share: float = share) -> dict[str, Any]:
                    alone = timed(lambda: attend(q, k, v, random)) * 1e3
                    listed = timed(lambda: attend(q, k, v, pooled)) * 1e3
                    whole = timed(lambda: attend(q, k, v, key_lists.pooled_lists(q, k, share, block))) * 1e3
                    return {
                        "random_ms": alone,
                        "pooled_ms": listed,
                        "with_lists_ms": whole,
                        "of_dense_alone": min(times) / alone,
                        "of_dense": min(times) / whole,
                    }

                attempt(report, "sparse", measure, size=size, kernel=name, share=share)


def tiles(report: Report) -> None:
    """VSA: attention to a fifth of its tiles, many of them short, alone and with its coarse part and what chooses tiles."""
    for size in ("480p", "720p"):
        q, k, v, call = inputs(size)
        order = tile_order(call.grid, DEVICE)
        pooled = [key_lists.pool_blocks(x, TILE_TOKENS, order.blocks.starts) for x in (q, k)]
        scores = key_lists.block_scores(*pooled)
        lists = key_lists.highest_blocks(scores, key_lists.kept_blocks(0.2, scores.shape[-1]))
        tiled = KeyLists(*lists, TILE_TOKENS, TILE_TOKENS, order.blocks, order.blocks)
        with PRODUCTS.at(EXACT):
            expected = plain_listed(q[:, :, :1].float(), k[:, :, :1].float(), v[:, :, :1].float(), first_head(tiled))[0]
        for name, attend in kernels().items():

            def measure(attend: ListedFn = attend) -> dict[str, Any]:
                out = attend(q, k, v, tiled)[0][:, :, :1].float()
                vsa = TrainedSparse(attend).vsa
                return {
                    "ms": timed(lambda: attend(q, k, v, tiled)) * 1e3,
                    "whole_ms": timed(lambda: vsa((q, k, v), order.blocks, 0.2, sdpa, call)) * 1e3,
                    "error": float((out - expected).norm() / expected.norm()),
                }

            attempt(report, "tiles", measure, size=size, kernel=name, tiles=scores.shape[-1], share=0.2)


def first_head(lists: KeyLists) -> KeyLists:
    return replace(lists, count=lists.count[:, :1].contiguous(), index=lists.index[:, :1].contiguous())


def parts(report: Report) -> None:
    """Of what chooses the key blocks."""
    for size in ("480p", "720p"):
        q, k, *_ = inputs(size)
        block = block_for(q.shape[1])
        q_means, k_means = (key_lists.block_moments(x, block, key_lists.Moments()) for x in (q, k))
        scores = key_lists.block_scores(q_means, k_means)
        kept = key_lists.kept_blocks(0.5, scores.shape[-1])
        forms: dict[str, Callable[[], object]] = {
            "all": lambda: key_lists.pooled_lists(q, k, 0.5, block),
            "moments of q": lambda: key_lists.block_moments(q, block, key_lists.Moments()),
            "scores": lambda: key_lists.block_scores(q_means, k_means),
            "highest": lambda: key_lists.highest_blocks(scores, kept),
            "torch.matmul": lambda: q_means @ k_means.transpose(-1, -2),
            "torch.topk": lambda: scores.topk(kept, dim=-1, sorted=False),
        }
        for name, run in forms.items():
            attempt(report, "parts", lambda run=run: {"ms": timed(run) * 1e3}, size=size, part=name)


def order(report: Report) -> None:
    """Of a forward: patches before the first block and after the last one, and angles; and once a size, on the host."""
    for size in ("480p", "720p"):
        began = time.perf_counter()
        token_order(grid(size), block_for(torch.Size(grid(size)).numel()))
        host_s = time.perf_counter() - began
        found = token_order(grid(size), block_for(torch.Size(grid(size)).numel()), DEVICE)
        patches = torch.randn(1, len(found.tokens), 64, device=DEVICE)
        both = timed(lambda: (patches[:, found.tokens], patches[:, found.positions])) * 1e3
        report.add("order", size=size, ms_of_a_forward=both, host_s=host_s)


def variants(report: Report) -> None:
    """Other blocks and tiles, and the other form of flash-attn-4's lists."""
    q, k, v, _ = inputs("480p")
    if torch.cuda.get_device_capability(DEVICE) == (9, 0):
        for queries, keys in ((128, 64), (64, 64)):
            scores = torch.rand(1, HEADS, -(-q.shape[1] // queries), -(-k.shape[1] // keys), device=DEVICE)
            kept = key_lists.kept_blocks(0.5, scores.shape[-1])
            lists = KeyLists(*key_lists.highest_blocks(scores, kept), queries, keys)
            form = f"flash-attn-4, {queries} x {keys}"
            attempt(
                report,
                "variants",
                lambda x=lists: {"ms": timed(lambda: flash4.attend_listed(q, k, v, x)) * 1e3},
                form=form,
            )

        def whole_blocks() -> dict[str, Any]:
            from flash_attn.cute import flash_attn_func
            from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

            x = random_lists(q, k, 0.5, 128)
            none = torch.zeros_like(x.count), torch.zeros_like(x.index[..., :1])
            blocks = BlockSparseTensorsTorch(*none, x.count, x.index, block_size=(128, 128))
            return {"ms": timed(lambda: flash_attn_func(q, k, v, block_sparse_tensors=blocks)) * 1e3}

        attempt(report, "variants", whole_blocks, form="flash-attn-4, as whole blocks")
    from wanduet.kernels.attention import sparse_gpu

    lists, chosen = random_lists(q, k, 0.5, 128), sparse_gpu.tile_for
    for tile in ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3), (128, 32, 8, 3)):
        sparse_gpu.tile_for = lambda itemsize, tile=tile: sparse_gpu.ListTile(*tile)
        attempt(
            report,
            "variants",
            lambda: {"ms": timed(lambda: sparse_gpu.attend_listed(q, k, v, lists)) * 1e3},
            form=f"triton, {tile}",
        )
    sparse_gpu.tile_for = chosen


SECTIONS = {"errors": errors, "speed": speed, "tiles": tiles, "parts": parts, "order": order, "variants": variants}


def main() -> None:
    report = Report("sparse_attention")
    with torch.no_grad():
        report.run(SECTIONS, sys.argv[1:] or [name for name in SECTIONS if name != "variants"])
    report.print()


if __name__ == "__main__":
    main()
