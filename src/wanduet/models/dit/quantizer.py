"""Which of the transformer's products are computed in 8 bits, and with what.

A block's large products are: q, k, v and out of self-attention, both of the feed-forward, and VSA's gate, whose input q, k
and v have in 8 bits. Cross-attention's are not,
as they are small and their text keys and values are computed once a prompt; nor are embeddings, modulation and the head.

Weights remain in memory as they are, in any format. A block's matrices are quantized when it runs, which takes about a third
of a percent of its time at 480p on an H100, by the bytes that it moves. So they need memory for one block only, whether
blocks are resident or streamed, and an exact job that follows has nothing to free. Letters in names are as in `models.dit.model`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from wanduet.kernels.dit.plain import Norm
from wanduet.kernels.dit.quantized import DTYPES, EightBits, QuantizedKernels, QuantizedRows
from wanduet.kernels.dit.weight import Weight
from wanduet.models.dit.linear import Linear
from wanduet.models.dit.workspace import Workspace

Operand: TypeAlias = Tensor | QuantizedRows
LAYERS_OF_A_BLOCK = 6


@dataclass(frozen=True, slots=True)
class Quantizer:
    """Quantizes operands to `format`, and multiplies them. `layers`: those whose matrices have been quantized so far."""

    format: EightBits
    kernels: QuantizedKernels
    layers: set[Linear] = field(default_factory=set, compare=False)

    def quantized(self, x_BLC: Tensor) -> QuantizedRows:
        """`x_BLC` in 8 bits."""
        out = self._empty(x_BLC)
        self.kernels.quantize(x_BLC, out)
        return out

    def norm(self, x_BLC: Tensor, y_BLC: Tensor | None, gate: Tensor | None, norm: Norm) -> QuantizedRows:
        """The norm of `x + gate * y` in 8 bits; the sum overwrites x."""
        out = self._empty(x_BLC)
        self.kernels.quantize_norm(x_BLC, y_BLC, gate, norm, out)
        return out

    def weight(self, weight: Weight, dtype: torch.dtype, layers: Sequence[Linear]) -> QuantizedRows:
        """The matrix of `layers`, which is one if theirs are adjacent in memory, in 8 bits; of a model that computes in
        `dtype`. Matrices that are stored like that are not rounded again."""
        self.layers.update(layers)
        if weight.data.dtype == DTYPES[self.format] and weight.scale is not None:
            return QuantizedRows(weight.data, weight.scale)
        matrix = weight.data if weight.scale is None else weight.dense(dtype)
        out = self._empty(matrix)
        self.kernels.quantize(matrix[None], QuantizedRows(out.data[None], out.scale[None]))
        return out

    def linear(
        self, x_BLC: QuantizedRows, weight: Weight, bias: Tensor, out_BLO: Tensor | None, layers: Sequence[Linear]
    ) -> Tensor:
        """`[B, L, O]`, the product with the matrix of `layers`; written into `out_BLO` if given."""
        if out_BLO is None:
            out_BLO = bias.new_empty(*x_BLC.shape[:-1], weight.shape[0])
        self.kernels.quantized_linear(x_BLC, self.weight(weight, bias.dtype, layers), bias, out_BLO)
        return out_BLO

    def check(self, num_blocks: int, num_gates: int = 0) -> None:
        """Raise RuntimeError unless all products that are meant to be in 8 bits have been, in all of a model's blocks."""
        wanted = LAYERS_OF_A_BLOCK * num_blocks + num_gates
        if len(self.layers) != wanted:
            raise RuntimeError(f"{len(self.layers)} of {wanted} layers were quantized.")

    def _empty(self, like: Tensor) -> QuantizedRows:
        return QuantizedRows.empty(like.shape, DTYPES[self.format], like.device)


class QuantizedFeedForward:
    """A feed-forward whose matrices are in 8 bits, for one block; hidden tensors are in the block's workspace.

    `chunk`: how many tokens to compute at a time.
    """

    def __init__(self, quantizer: Quantizer, up: Linear, down: Linear, workspace: Workspace) -> None:
        dtype, width = up.bias.dtype, up.out_features
        self._kernels, self._dtype, self._workspace = quantizer.kernels, DTYPES[quantizer.format], workspace
        self._up, self._down = ((quantizer.weight(one.stored, dtype, (one,)), one.bias) for one in (up, down))
        self.chunk = workspace.chunk_tokens(width + -(-width // dtype.itemsize))  # both forms of the hidden tensor

    def __call__(self, n_BLC: QuantizedRows, out_BLC: Tensor) -> None:
        """Write the feed-forward of at most `chunk` tokens into `out_BLC`."""
        batch, tokens, _ = n_BLC.shape
        hidden, data = self._workspace.part_and_bytes(batch, tokens, self._up[0].shape[0])
        scale = torch.empty(batch, tokens, 1, dtype=torch.float32, device=hidden.device)
        quantized = QuantizedRows(data.view(self._dtype), scale)
        self._kernels.quantized_linear(n_BLC, *self._up, hidden)
        self._kernels.quantize_gelu(hidden, quantized)
        self._kernels.quantized_linear(quantized, *self._down, out_BLC)
