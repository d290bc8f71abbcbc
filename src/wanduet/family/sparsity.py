"""Sparse self-attention as a request names it: by the share of key blocks that is kept. Does not import torch.

Source of the defaults: the first steps and the first block decide the layout of a video, and are left dense by SpargeAttn
(arXiv 2502.18137), Sparse VideoGen (arXiv 2502.01776) and Radial Attention (arXiv 2506.19852).
"""

import math

from wanduet.errors import InvalidRequestError

ALL = 1.0
DENSE_SHARE = 0.25  # of the steps that are run, the first ones
# Tokens of a block: flash-attn-4's tile on Hopper, and fewer where a video would have fewer blocks than FEWEST.
BLOCKS = (128, 64, 32, 16)
FEWEST = 64


def block_for(tokens: int) -> int:
    """Return the number of tokens of a block of queries or keys, for a sequence of `tokens`."""
    return next((block for block in BLOCKS if tokens >= FEWEST * block), BLOCKS[-1])


def kept_blocks(share: float, blocks: int) -> int:
    """Return how many of `blocks` key blocks are kept, at least one."""
    return min(blocks, max(1, math.ceil(round(share * blocks, 6))))


def kept_share(share: float, tokens: int) -> float:
    """Return the share of key blocks that a sparse attention of `tokens` tokens reads, which is rounded up to whole blocks;
    1 if it leaves none out."""
    blocks = math.ceil(tokens / block_for(tokens))
    return kept_blocks(share, blocks) / blocks


def first_sparse_step(first_step: int, num_steps: int) -> int:
    """Return the first sparse step as an index in the schedule, of which a run makes `num_steps` from `first_step` on."""
    return first_step + math.ceil(DENSE_SHARE * num_steps)


def check_sparse(share: float, tokens: int, num_steps: int) -> None:
    """Raise InvalidRequestError if sparse attention would leave out nothing."""
    if share == ALL:
        return
    if num_steps < 2:
        allowed = f"1 for a run of {num_steps} step{'s' * (num_steps != 1)}, as the first quarter of the steps is dense"
        raise InvalidRequestError("sparse", share, allowed, ALL)
    if kept_share(share, tokens) == 1:
        allowed = f"less for this size, whose {tokens} tokens are too few blocks to leave one out, or 1"
        raise InvalidRequestError("sparse", share, allowed, ALL)
