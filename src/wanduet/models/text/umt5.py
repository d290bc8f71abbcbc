"""The UMT5 encoder, layer by layer: transformers' layers, with the residency of their weights managed here.

`resident` keeps all layers in memory. `streamed` reads each layer from its memory-mapped file before it runs and frees
it afterwards, so that a 22 GB encoder needs the memory of one layer. Only a prompt's true tokens are encoded, and only
their rows of the embedding are read. Padding to 512 positions is added afterwards, with zeros, as in Wan2.1
(wan/modules/t5.py truncates to the true length before the transformer pads).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from wanduet.errors import CancelledError
from wanduet.kernels.dit.weight import Weight, WeightFormat
from wanduet.meta.init import meta_init

EMBEDDING = "shared.weight"
# Some checkpoints have the embedding under this name too; both must be the same matrix.
EMBEDDING_COPY = "encoder.embed_tokens.weight"
FINAL_NORM = "encoder.final_layer_norm.weight"

# Ends of the names of a layer's large matrices.
MATRICES = (*(f".SelfAttention.{name}.weight" for name in "qkvo"), ".wi_0.weight", ".wi_1.weight", ".wo.weight")

Residency = Literal["resident", "streamed"]


class TensorReader(Protocol):
    """A source of weights (see weights/safetensors.py)."""

    def read(self, names: Collection[str], dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Copies of the named tensors in a dtype, by name."""

    def read_rows(self, name: str, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Copies of rows `[len(rows), columns]` of a matrix, in a dtype."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by name."""


class TextEncoder:
    """Encodes token ids to embeddings. `config`: the checkpoint's text_encoder/config.json."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: TensorReader,
        dtype: torch.dtype,
        residency: Residency,
        device: torch.device | str = "cpu",
        format: WeightFormat | None = None,
    ) -> None:
        """Compute in `dtype` on `device`, whatever the dtype of the files. `format`: how the layers' matrices are in memory, from which each pass makes one layer after another
        in `dtype`; None: in `dtype`."""
        from transformers import UMT5Config

        self._config = UMT5Config(**{k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")})
        self._config._attn_implementation = "eager"  # the others need a mask as large as the scores
        self._weights, self._dtype, self.residency = weights, dtype, residency
        self._device = torch.device(device)
        self._embedding = EMBEDDING if EMBEDDING in weights.shapes else EMBEDDING_COPY
        self._layers: dict[int, nn.Module] = {}
        self._format = format
        self._stored: dict[int, dict[str, Weight]] = {}

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        should_cancel: Callable[[], bool] | None = None,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """Encode prompts, each a sequence of `n` token ids, to embeddings `[n, text_dim]` on the host.

        All prompts run through a layer before the next one is read. `on_layer(done, total)` is called after each layer;
        `should_cancel` before each tensor is read and before each prompt runs through a layer. Raises CancelledError,
        WeightsError.
        """

        def check() -> None:
            if should_cancel is not None and should_cancel():
                raise CancelledError("Cancelled while the text was encoded.")

        hidden = [self._weights.read_rows(self._embedding, ids, self._dtype)[None].to(self._device) for ids in prompts]
        total = int(self._config.num_layers)
        for index in range(total):
            layer = self._layer(index, check)
            for position, one in enumerate(hidden):
                check()
                hidden[position] = layer(one)
            if on_layer is not None:
                on_layer(index + 1, total)
        norm = self._final_norm()
        return [norm(h)[0].cpu() for h in hidden]

    def _layer(self, index: int, check: Callable[[], None]) -> nn.Module:
        from transformers.models.umt5.modeling_umt5 import UMT5Block

        if index in self._layers:
            return self._layers[index]
        with meta_init():
            layer: nn.Module = UMT5Block(self._config, layer_idx=index)
        stored = self._stored.get(index) or {
            name: self._read(f"encoder.block.{index}.{name}", check) for name in layer.state_dict()
        }
        layer.load_state_dict({name: weight.dense(self._dtype) for name, weight in stored.items()}, assign=True)
        layer.eval()
        if self.residency == "resident" and self._format is not None:
            self._stored[index] = stored
        elif self.residency == "resident":
            self._layers[index] = layer
        return layer

    def _read(self, name: str, check: Callable[[], None]) -> Weight:
        """Return one of the layers' tensors as it is in memory."""
        check()
        if self._format is None or not name.endswith(MATRICES):
            return Weight(self._weights.read([name], self._dtype)[name].to(self._device))
        shape = self._weights.shapes[name]
        data = torch.empty(shape, dtype=self._format.dtype, device=self._device)
        weight = Weight(data, torch.empty(shape[0], 1, device=self._device) if self._format.scaled else None)
        weight.copy_(self._weights.read([name], torch.float32)[name])
        return weight

    def _final_norm(self) -> nn.Module:
        from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

        with meta_init():
            norm: nn.Module = UMT5LayerNorm(self._config.d_model, eps=self._config.layer_norm_epsilon)
        weight = self._weights.read([FINAL_NORM], self._dtype)[FINAL_NORM].to(self._device)
        norm.load_state_dict({"weight": weight}, assign=True)
        return norm


def pad_embeddings(embeds: Tensor, text_len: int) -> Tensor:
    """Pad embeddings `[n, text_dim]` with zeros to `[1, text_len, text_dim]`."""
    return torch.nn.functional.pad(embeds, (0, 0, 0, text_len - embeds.shape[0]))[None]
