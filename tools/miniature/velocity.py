"""The transformer's forward for training: one compiled function for all blocks, and text of few tokens.

The model sees 512 text positions, nearly all of them padding, whose keys and values are all the same.
Here one position represents the padding beyond TEXT_TOKENS, with the logarithm of the number of padding positions added
to its scores: the same result, a thirteenth of the work. A test compares it with `WanTransformer.forward`.
"""

import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanduet.kernels.dit.rope import Rope
from wanduet.models.dit.embeddings import PatchGrid
from wanduet.models.dit.model import WanTransformer

TEXT_TOKENS = 39  # longest prompt in training, in tokens; longer ones are cut
TEXT_LEN = 512  # positions of the model's text input
Parameters = dict[str, Tensor]
BlockFn = Callable[[Parameters, Tensor, Tensor, Tensor, Rope, float, torch.dtype], Tensor]


def velocity(
    model: WanTransformer,
    latents: Tensor,
    timestep: Tensor,
    embeds: Tensor,
    rope: Rope,
    run_block: BlockFn,
    dtype: torch.dtype,
) -> Tensor:
    """Velocity `[B, 16, T, h, w]` for latents of that shape, timestep `[B]` in 0..1000, rope of `prepare_rope`.

    `embeds` `[B, TEXT_TOKENS, text_dim]`, zero where a prompt is shorter; large products run in `dtype`.
    """
    grid = PatchGrid.of(latents.shape, model.spec.patch_size)
    stem = model.patch_embedding
    x = F.linear(grid.patchify(latents.float()), stem.weight.flatten(1), stem.bias)
    time_BC, time_B6C = model.condition_embedder.embed_time(timestep)
    text_embedder = model.condition_embedder.text_embedder
    up, down = text_embedder.linear_1, text_embedder.linear_2
    padded = F.pad(embeds, (0, 0, 0, 1))
    text = _linear(
        F.gelu(_linear(padded, up.weight, up.bias, dtype), approximate="tanh"), down.weight, down.bias, dtype
    )
    for block in model.blocks:
        x = run_block(dict(block.named_parameters()), x, time_B6C, text, rope, model.spec.eps, dtype)
    shift, scale = (model.scale_shift_table + time_BC[:, None]).unbind(1)
    n = _norm(x, 1 + scale, shift, model.spec.eps)
    patches = F.linear(n.to(dtype), model.proj_out.weight.to(dtype), cast(Tensor, model.proj_out.bias).to(dtype))
    return grid.unpatchify(patches.float(), model.spec.out_channels)


def run_block(
    p: Parameters, x: Tensor, time_B6C: Tensor, text: Tensor, rope: Rope, eps: float, dtype: torch.dtype
) -> Tensor:
    """One block on the residual stream `[B, L, C]` float32; `p` are its parameters by name."""
    head_dim = 2 * rope.cos.shape[-1]
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (p["scale_shift_table"] + time_B6C).unbind(1)

    n = _norm(x, 1 + scale, shift, eps).to(dtype)
    weight = torch.cat([p[f"attn1.to_{part}.weight"] for part in "qkv"])
    bias = torch.cat([p[f"attn1.to_{part}.bias"] for part in "qkv"])
    q, k, v = _linear(n, weight, bias, dtype).chunk(3, dim=-1)
    q = _rotate(_heads(F.rms_norm(q.float(), q.shape[-1:], p["attn1.norm_q.weight"], eps), head_dim), rope).to(dtype)
    k = _rotate(_heads(F.rms_norm(k.float(), k.shape[-1:], p["attn1.norm_k.weight"], eps), head_dim), rope).to(dtype)
    attended = F.scaled_dot_product_attention(q, k, _heads(v, head_dim)).transpose(1, 2).flatten(2)
    y = _linear(attended, p["attn1.to_out.0.weight"], p["attn1.to_out.0.bias"], dtype)
    x = x + y.float() * gate[:, None]

    n = _norm(x, p["norm2.weight"][None], p["norm2.bias"][None], eps).to(dtype)
    y = _linear(
        _attend_text(p, n, text, head_dim, eps, dtype), p["attn2.to_out.0.weight"], p["attn2.to_out.0.bias"], dtype
    )
    x = x + y.float()

    n = _norm(x, 1 + ffn_scale, ffn_shift, eps).to(dtype)
    hidden = F.gelu(_linear(n, p["ffn.net.0.proj.weight"], p["ffn.net.0.proj.bias"], dtype), approximate="tanh")
    return x + _linear(hidden, p["ffn.net.2.weight"], p["ffn.net.2.bias"], dtype).float() * ffn_gate[:, None]


def _attend_text(p: Parameters, n: Tensor, text: Tensor, head_dim: int, eps: float, dtype: torch.dtype) -> Tensor:
    """Cross-attention before its output projection; the text's last position represents all padding."""
    q = _linear(n, p["attn2.to_q.weight"], p["attn2.to_q.bias"], dtype).float()
    k = _linear(text, p["attn2.to_k.weight"], p["attn2.to_k.bias"], dtype).float()
    v = _heads(_linear(text, p["attn2.to_v.weight"], p["attn2.to_v.bias"], dtype), head_dim)
    q = _heads(F.rms_norm(q, q.shape[-1:], p["attn2.norm_q.weight"], eps), head_dim)
    k = _heads(F.rms_norm(k, k.shape[-1:], p["attn2.norm_k.weight"], eps), head_dim)
    scores = (q.to(dtype) @ k.to(dtype).transpose(-1, -2)).float() * head_dim**-0.5
    last = torch.arange(text.shape[1], device=text.device) == text.shape[1] - 1
    scores = scores + last * math.log(TEXT_LEN - TEXT_TOKENS)
    return (scores.softmax(dim=-1).to(dtype) @ v).transpose(1, 2).flatten(2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps) * weight[:, None] + bias[:, None]


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """`[B, L, C]` to `[B, H, L, D]`."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _rotate(x_BHLD: Tensor, rope: Rope) -> Tensor:
    first, second = x_BHLD.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * rope.cos - second * rope.sin, first * rope.sin + second * rope.cos), dim=-1).flatten(-2)


def embed_text(encoder: nn.Module, ids: Tensor) -> Tensor:
    """Token ids `[B, n]` (0 pads) to embeddings `[B, n, text_dim]`, zero at the padding, as the engine does."""
    mask = ids != 0
    # A 4-D bias, because transformers' own mask preparation synchronises, which a CUDA graph cannot capture.
    bias = torch.zeros(ids.shape, device=ids.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    hidden: Tensor = encoder(input_ids=ids, attention_mask=bias[:, None, None]).last_hidden_state
    return hidden * mask[..., None]
