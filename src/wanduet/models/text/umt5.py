"""The UMT5 encoder on the CPU, layer by layer: transformers' own layers, our way of holding their weights.

`resident` keeps every layer in memory. `streamed` reads a layer from its memory-mapped file when its turn
comes and frees it at once, so that a 22 GB encoder needs the memory of one layer. Only a prompt's true tokens
are encoded, and only their rows of the embedding are read: padding to 512 positions happens afterwards, with
zeros, as Wan2.1 does (wan/modules/t5.py cuts to the true length before the transformer pads).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from wanduet.errors import CancelledError
from wanduet.meta.init import meta_init

EMBEDDING = "shared.weight"
# In some checkpoints the embedding stands under this name too; it must be the same matrix.
EMBEDDING_COPY = "encoder.embed_tokens.weight"
FINAL_NORM = "encoder.final_layer_norm.weight"

Hold = Literal["resident", "streamed"]


class TensorReader(Protocol):
    """Where weights come from (see weights/safetensors.py)."""

    def read(self, names: Collection[str], dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Copies of named tensors."""

    def read_rows(self, name: str, rows: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Some rows of a matrix."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by name."""


class TextEncoder:
    """Token ids to embeddings. `config` is the checkpoint's text_encoder/config.json."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: TensorReader,
        dtype: torch.dtype,
        hold: Hold,
        embedding: str = EMBEDDING,
    ) -> None:
        """`dtype` is what it computes in, whatever the files hold."""
        from transformers import UMT5Config

        self._config = UMT5Config(**{k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")})
        self._config._attn_implementation = "eager"  # the only one without a mask for every score
        self._weights, self._dtype, self.hold = weights, dtype, hold
        self._embedding = embedding if embedding in weights.shapes else EMBEDDING_COPY
        self._layers: dict[int, nn.Module] = {}

    @torch.no_grad()
    def encode(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        should_cancel: Callable[[], bool] | None = None,
        on_layer: Callable[[int, int], None] | None = None,
    ) -> list[Tensor]:
        """Embeddings `[n, text_dim]` of each prompt's `n` tokens. All prompts pass a layer before the next is read.

        `on_layer(done, total)` is called after each. Raises CancelledError between layers, WeightsError.
        """
        hidden = [self._weights.read_rows(self._embedding, ids, self._dtype)[None] for ids in prompts]
        total = int(self._config.num_layers)
        for index in range(total):
            if should_cancel is not None and should_cancel():
                raise CancelledError("Cancelled while the text was encoded.")
            layer = self._layer(index)
            hidden = [layer(h) for h in hidden]
            if on_layer is not None:
                on_layer(index + 1, total)
        norm = self._final_norm()
        return [norm(h)[0] for h in hidden]

    def _layer(self, index: int) -> nn.Module:
        from transformers.models.umt5.modeling_umt5 import UMT5Block

        if index in self._layers:
            return self._layers[index]
        with meta_init():
            layer: nn.Module = UMT5Block(self._config, layer_idx=index)
        prefix = f"encoder.block.{index}."
        tensors = self._weights.read([prefix + name for name in layer.state_dict()], self._dtype)
        layer.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, assign=True)
        layer.eval()
        if self.hold == "resident":
            self._layers[index] = layer
        return layer

    def _final_norm(self) -> nn.Module:
        from transformers.models.umt5.modeling_umt5 import UMT5LayerNorm

        with meta_init():
            norm: nn.Module = UMT5LayerNorm(self._config.d_model, eps=self._config.layer_norm_epsilon)
        norm.load_state_dict({"weight": self._weights.read([FINAL_NORM], self._dtype)[FINAL_NORM]}, assign=True)
        return norm


def pad_embeddings(embeds: Tensor, text_len: int) -> Tensor:
    """`[n, text_dim]` to `[1, text_len, text_dim]`, zeros after the true tokens."""
    return torch.nn.functional.pad(embeds, (0, 0, 0, text_len - embeds.shape[0]))[None]
