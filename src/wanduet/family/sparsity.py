"""Sparse self-attention as a request names it, by the share of key blocks that is kept; and that of weights which are
trained for it (`TransformerSpec.attention`), in all steps and blocks. Does not import torch.

Source of the defaults: the first steps and the first block decide the layout of a video, and are left dense by SpargeAttn
(arXiv 2502.18137), Sparse VideoGen (arXiv 2502.01776) and Radial Attention (arXiv 2506.19852).
"""

import math

from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.family.spec import TransformerSpec

ALL = 1.0
DENSE_SHARE = 0.25  # of the steps that are run, the first ones
# Tokens of a block: flash-attn-4's tile on Hopper, and fewer where a video would have fewer blocks than FEWEST.
BLOCKS = (128, 64, 32, 16)
FEWEST = 64
# Of VSA (arXiv 2505.13389): frames, rows and columns of tokens of a tile. Of SLA (arXiv 2509.24006): tokens of a block.
TILE = (4, 4, 4)
TILE_TOKENS = math.prod(TILE)
SLA_QUERIES, SLA_KEYS = 128, 64


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


def tiles_of(grid: tuple[int, int, int]) -> int:
    """Return the number of VSA's tiles in frames, rows and columns of tokens; those at the ends may be smaller."""
    return math.prod(math.ceil(size / side) for size, side in zip(grid, TILE, strict=True))


def own_share(spec: TransformerSpec, requested: float) -> float:
    """Return the share of key blocks that a transformer which is trained for sparse attention reads: its own, unless
    the request names another one."""
    return spec.key_share if requested == ALL else requested


def sla_kept(share: float, blocks: int) -> int:
    """Return how many of `blocks` key blocks SLA keeps: rounded down, but at least one."""
    return max(1, math.floor(round(share * blocks, 6)))


def first_sparse_step(first_step: int, num_steps: int) -> int:
    """Return the first sparse step as an index in the schedule, of which a run makes `num_steps` from `first_step` on."""
    return first_step + math.ceil(DENSE_SHARE * num_steps)


def ring_refused(spec: TransformerSpec, share: float, ranks: int) -> ConfigError:
    """Return the error for sparse attention on ranks of which each would see a part of the keys only."""
    is_trained = spec.attention != "dense"
    what = f"The weights' sparse attention ({spec.attention.upper()})" if is_trained else f"sparse={share:g}"
    return ConfigError(
        f"{what} cannot be used on these {ranks} devices: they do not divide the {spec.num_attention_heads} heads, so each "
        "would choose among a part of the keys.",
        hint=f"Use a number of devices that divides the heads{'' if is_trained else ', or leave --sparse out'}.",
    )


def check_sparse(share: float, tokens: int, num_steps: int, attention: str = "dense") -> None:
    """Raise InvalidRequestError if sparse attention would leave out nothing. One that the weights are trained for takes
    any share; `attention`: see `TransformerSpec`."""
    if share == ALL or attention != "dense":
        return
    if num_steps < 2:
        allowed = f"1 for a run of {num_steps} step{'s' * (num_steps != 1)}, as the first quarter of the steps is dense"
        raise InvalidRequestError("sparse", share, allowed, ALL)
    if kept_share(share, tokens) == 1:
        allowed = f"less for this size, whose {tokens} tokens are too few blocks to leave one out, or 1"
        raise InvalidRequestError("sparse", share, allowed, ALL)
