"""The Wan2.1 denoising transformer, written for one device.

Parameter names are those of a Diffusers checkpoint (`WanTransformer3DModel`). The operations between the matrix
products (`kernels`), the attention function (`attention`) and the way a sequence is spread over devices (`sharding`)
are passed in by a `Runtime`; the model does not depend on which ones they are.

Precision, as in the official code: the residual stream, norms, modulation, gates, time embedding, patch embedding and
head are float32; the large matrix products run in the dtype of their biases, whatever the format of their weights.

Letters in names: B batch, L tokens on this device, C width, S text positions, H heads, D channels a head.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wanduet.family.spec import TransformerSpec
from wanduet.kernels.attention.call import AttentionCall, Step
from wanduet.kernels.dit.plain import Norm
from wanduet.kernels.dit.rope import Rope, rope_for_grid
from wanduet.kernels.precision import EXACT, PRODUCTS
from wanduet.models.dit.block import Block, Residual, Runtime, modulation_table
from wanduet.models.dit.embeddings import ConditionEmbedder, PatchGrid
from wanduet.models.dit.token_order import TokenOrder, tile_order, token_order
from wanduet.models.dit.workspace import Workspace


@dataclass(frozen=True, slots=True)
class TextContext:
    """A prompt's cross-attention keys and values `[B, S, H, D]` for every block, S at most text_len.

    Computed once a prompt, because the text does not change during a denoise. All padding positions have the same key
    and value; these are stored once, as the last position, which counts `repeats` times.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    repeats: int = 1


@dataclass(frozen=True, slots=True)
class EmbeddedStep:
    """A forward's timestep, embedded as `time` `[B, C]` and projected to `modulation` `[B, 6, C]`, both float32, and its
    first block's attention call."""

    time: Tensor
    modulation: Tensor
    call: AttentionCall


class WanTransformer(nn.Module):
    """Predicts the velocity (noise - video) of latents at a timestep, given a prompt's embeddings.

    Passes in `accelerate/` replace `runtime` and `fetch_blocks` after construction.
    """

    def __init__(self, spec: TransformerSpec) -> None:
        super().__init__()
        self.spec = spec
        dim = spec.dim
        self.patch_embedding = nn.Conv3d(spec.in_channels, dim, spec.patch_size, spec.patch_size)
        self.condition_embedder = ConditionEmbedder(spec)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        patch_volume = spec.patch_size[0] * spec.patch_size[1] * spec.patch_size[2]
        self.proj_out = nn.Linear(dim, spec.out_channels * patch_volume)
        self.scale_shift_table = modulation_table(2, dim)
        self.runtime = Runtime()

    @staticmethod
    def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
        """A parameter's dtype in a model that computes in `dtype`: float32 outside the large products.

        Source: the official code's amp.autocast(float32) around time MLP, modulation and head.
        """
        large = ".to_" in name or ".ffn." in name or "text_embedder" in name
        return dtype if large and not name.endswith(".weight_scale") else torch.float32

    @staticmethod
    def is_block_matrix(name: str) -> bool:
        """Whether a parameter is the matrix of a `Linear`, which may be in another format (kernels/dit/weight.py)."""
        return name.startswith("blocks.") and name.endswith(".weight") and (".to_" in name or ".ffn." in name)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the large matrix products."""
        return next(iter(self._blocks())).attn1.to_q.bias.dtype

    def _blocks(self) -> Iterable[Block]:
        return (cast(Block, block) for block in self.blocks)

    def fetch_blocks(self) -> Iterable[Block]:
        """Yield the blocks in order, each ready to run on the device (accelerate/offload.py replaces this)."""
        return self._blocks()

    @PRODUCTS.at(EXACT)
    def prepare_text(self, prompt_embeds: Tensor) -> TextContext:
        """Compute all blocks' keys and values for zero-padded embeddings `[B, text_len, text_dim]`."""
        true_tokens = prompt_embeds.ne(0).any(dim=-1).any(dim=0).nonzero()
        length = min(int(true_tokens[-1]) + 1 if len(true_tokens) else 0, prompt_embeds.shape[1] - 1) + 1
        text = self.condition_embedder.embed_text(prompt_embeds[:, :length].to(self.compute_dtype))
        pairs = [block.attn2.project_text(text, self.runtime) for block in self.fetch_blocks()]
        repeats = prompt_embeds.shape[1] - length + 1
        return TextContext(tuple(k for k, _ in pairs), tuple(v for _, v in pairs), repeats)

    def prepare_rope(self, latent_shape: tuple[int, ...], device: torch.device) -> Rope:
        """Rotation angles of this device's tokens, for latents of shape `[..., frames, rows, columns]`."""
        grid = PatchGrid.of(latent_shape, self.spec.patch_size)
        rope = rope_for_grid(grid.tokens, self.spec.attention_head_dim, device)
        if (order := self._order(grid, device)) is not None:
            rope = Rope(rope.cos[order.tokens], rope.sin[order.tokens])
        shard = self.runtime.sharding.shard_sequence
        return Rope(shard(rope.cos, 0), shard(rope.sin, 0))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor | TextContext,
        rope: Rope | None = None,
        step: Step | None = None,
    ) -> Tensor:
        """Predict the velocity `[B, 16, T, h, w]` float32 of latents of that shape.

        `timestep` `[B]` in 0..1000; `text`: embeddings `[B, text_len, text_dim]`, or the result of `prepare_text`;
        `rope`: the result of `prepare_rope`, by default computed here. `step` is passed on to the attention function,
        for which `timestep` would have to be copied to the host.
        """
        if isinstance(text, Tensor):
            text = self.prepare_text(text)
        if rope is None:
            rope = self.prepare_rope(latents.shape, latents.device)
        return self.forward_cfg(latents, timestep, (text,), rope, step)[0]

    @PRODUCTS.at(EXACT)
    def forward_cfg(
        self, latents: Tensor, timestep: Tensor, texts: Sequence[TextContext], rope: Rope, step: Step | None = None
    ) -> list[Tensor]:
        """Predict a velocity, as `forward` does, for each of several prompts (classifier-free guidance has two).

        Equal bit for bit to one `forward` a prompt, but the first block's self-attention, which does not depend on the
        text, is computed once (`Runtime.share_first`).
        """
        velocities: list[Tensor] = []
        # Results are allocated before temporary tensors, which then fit into the same holes for each prompt.
        grid = PatchGrid.of(latents.shape, self.spec.patch_size)
        call = AttentionCall(grid.tokens, step=step)
        outs: list[Tensor | None] = [None] * len(texts)
        if not torch.is_grad_enabled():
            shape = (latents.shape[0], self.spec.out_channels, *latents.shape[2:])
            outs = [torch.empty(shape, dtype=torch.float32, device=latents.device) for _ in texts]
        workspace = first_attention = None
        for text, out in zip(texts, outs, strict=True):
            x_BLC, time_BC, time_B6C = self.embed(latents, timestep)
            workspace = workspace or Workspace.allocate_for(x_BLC, self.compute_dtype)
            residual, first_attention = Residual(x_BLC, first_attention), None
            del x_BLC
            keep = self.runtime.share_first and text is not texts[-1]
            n_BLC, first_attention = self.run_blocks(
                residual, EmbeddedStep(time_BC, time_B6C, call), text, rope, workspace, keep_first=keep
            )
            del residual  # frees its memory for the next prompt's
            velocities.append(self.head(n_BLC, grid, out))
            del n_BLC
        if self.runtime.quantizer is not None:
            gates = len(self.blocks) if self.spec.attention == "vsa" else 0
            self.runtime.quantizer.check(len(self.blocks), gates)
        return velocities

    def _order(self, grid: PatchGrid, device: torch.device) -> TokenOrder | None:
        """Return the order of the tokens between `embed` and `head`; None for the order by frame, row and column."""
        if self.spec.attention == "vsa":
            return tile_order(grid.tokens, device)
        block = self.runtime.token_block
        return None if block is None else token_order(grid.tokens, block, device)

    def embed(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed this device's patches as tokens `[B, L, C]`, and the timestep as `[B, C]` and `[B, 6, C]`; float32."""
        grid = PatchGrid.of(latents.shape, self.spec.patch_size)
        patches = grid.patchify(latents.float())
        if (order := self._order(grid, latents.device)) is not None:
            patches = patches[:, order.tokens]
        patches = self.runtime.sharding.shard_sequence(patches, 1)
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        x_BLC = F.linear(patches, weight.flatten(1).float(), None if bias is None else bias.float())
        time_BC, time_B6C = self.condition_embedder.embed_time(timestep)
        return x_BLC, time_BC, time_B6C

    def run_blocks(
        self,
        residual: Residual,
        step: EmbeddedStep,
        text: TextContext,
        rope: Rope,
        workspace: Workspace,
        *,
        keep_first: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Run all blocks; returns the head's modulated norm `[B, L, C]` of the result. Overwrites `residual`.

        If `residual.pending` is set, it is the first block's self-attention, which is not computed again. With
        `keep_first`, a copy of that is returned too, for the same latents with another text; else None.
        """
        modulations = [block.modulation(step.modulation) for block in self._blocks()]
        norms = [mod.attn for mod in modulations]
        shift, scale = (self.scale_shift_table.float() + step.time[:, None]).unbind(1)
        norms.append(Norm(1 + scale, shift, self.spec.eps, is_exact=True))
        run, dtype = self.runtime, self.compute_dtype
        first_attention = torch.empty_like(residual.x, dtype=dtype) if keep_first else None
        attended = residual.pending is not None
        if not attended:
            residual.pending = run.norm(residual.x, norms[0], dtype)
        for index, block in enumerate(self.fetch_blocks()):
            if run.before_block is not None:
                run.before_block()
            if index > 0 or not attended:
                block.attend(residual, rope, run, workspace, replace(step.call, block=index))
            if index == 0 and first_attention is not None and isinstance(residual.pending, Tensor):
                first_attention.copy_(residual.pending)
            keys_values = (text.keys[index], text.values[index], text.repeats)
            block(residual, modulations[index], norms[index + 1], keys_values, run, workspace)
        return residual.pop_tensor(), first_attention

    def head(self, n_BLC: Tensor, grid: PatchGrid, out: Tensor | None) -> Tensor:
        """Project this device's normed tokens to velocities `[B, 16, T, h, w]` float32, in `out` if given."""
        bias = self.proj_out.bias
        weight = self.proj_out.weight.to(n_BLC.dtype)
        patches = F.linear(n_BLC, weight, bias.to(n_BLC.dtype)).float()
        patches = self.runtime.sharding.gather_sequence(patches, 1)
        if (order := self._order(grid, patches.device)) is not None:
            patches = patches[:, order.positions]
        return grid.unpatchify(patches, self.spec.out_channels, out)
