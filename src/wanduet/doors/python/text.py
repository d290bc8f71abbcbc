"""Encodes prompts for `WanPipeline`: diffusers' `encode_prompt`, also with an encoder or tokenizer of the program."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from wanduet.errors import CancelledError
from wanduet.media.embeddings import PromptEmbeds
from wanduet.models.text.tokenizer import MAX_TOKENS, Tokenizer, clean_text
from wanduet.models.text.umt5 import pad_embeddings
from wanduet.planning.plan import Plan
from wanduet.runtime.text_host import CachedPromptEncoder, OnLayer, PromptEncoder, ShouldCancel
from wanduet.weights.diffusers import ModelFolder


class GivenPromptEncoder:
    """Runs a text encoder of transformers' as it is, on its own device: quantised, offloaded or of a custom class."""

    def __init__(self, module: Any, tokenizer: Any) -> None:
        self._module, self._tokenizer = module, tokenizer

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        should_cancel: ShouldCancel | None = None,
        on_layer: OnLayer | None = None,
        max_tokens: int | None = None,
    ) -> list[PromptEmbeds]:
        """See PromptEncoder. Encodes one text at a time, without padding."""
        found = []
        for text in map(clean_text, texts):
            if should_cancel is not None and should_cancel():
                raise CancelledError("Cancelled while the text was encoded.")
            limit = max_tokens or MAX_TOKENS
            tokens = self._tokenizer(
                [text], truncation=True, max_length=limit, add_special_tokens=True, return_attention_mask=True,
                return_tensors="pt",
            )  # fmt: skip
            ids, mask = (tokens[name].to(self._device) for name in ("input_ids", "attention_mask"))
            hidden = self._module(ids, mask).last_hidden_state[0]
            found.append(
                PromptEmbeds(hidden.float().cpu(), text, "", "given", str(hidden.dtype).removeprefix("torch."))
            )
        return found

    @property
    def _device(self) -> torch.device:
        """Device of its weights now; if hooks move them, they move the inputs too."""
        parameters = (p.device for p in self._module.parameters() if not p.is_meta)
        return next(parameters, torch.device("cpu"))


class _GivenTokenizer(Tokenizer):
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer


class RetokenizedEncoder(CachedPromptEncoder):
    """The checkpoint's encoder with another tokenizer; without a cache, whose keys do not include the tokenizer."""

    def __init__(self, folder: ModelFolder, plan: Plan, tokenizer: Any) -> None:
        super().__init__(folder, plan.text.dtype, plan.text.on_host, None)
        self._tokenizer = _GivenTokenizer(tokenizer)


def encode(encoder: PromptEncoder, texts: list[str], max_tokens: int, copies: int) -> Tensor:
    """Encode texts to `[len(texts) * copies, max_tokens, text_dim]` float32 on the host.

    Embeddings are padded with zeros; copies of one text are adjacent.
    """
    encoded = encoder.encode(texts, max_tokens=max_tokens)
    padded = torch.cat([pad_embeddings(one.embeds, max_tokens) for one in encoded])
    return padded.repeat_interleave(copies, dim=0)


def prompts_of(prompt: Any, embeds: Tensor | None) -> list[str] | None:
    """Return a call's prompts; None if it passes embeddings. Raises ValueError."""
    if prompt is not None and embeds is not None:
        raise ValueError("Give either prompt or prompt_embeds, not both.")
    if prompt is None and embeds is None:
        raise ValueError("Give prompt or prompt_embeds.")
    if prompt is None:
        return None
    _check_texts("prompt", prompt)
    return [prompt] if isinstance(prompt, str) else prompt


def negatives_of(prompt: Any, embeds: Tensor | None, count: int) -> list[str] | None:
    """Return the negative prompt for each of `count` prompts; None if embeddings are passed. Raises ValueError."""
    if prompt is not None and embeds is not None:
        raise ValueError("Give either negative_prompt or negative_prompt_embeds, not both.")
    if embeds is not None:
        return None
    if prompt is not None:
        _check_texts("negative_prompt", prompt)
    texts = prompt or ""
    negatives = [texts] * count if isinstance(texts, str) else texts
    if len(negatives) != count:
        raise ValueError(f"negative_prompt has {len(negatives)} texts, prompt has {count}.")
    return negatives


def repeated(given: Tensor, count: int, dim: int, copies: int) -> Tensor:
    """Repeat embeddings `[count, tokens, dim]` `copies` times each; return them unchanged if `copies` is 1.

    Raises ValueError for another shape.
    """
    if given.ndim != 3 or given.shape[0] != count or given.shape[2] != dim:
        raise ValueError(f"Embeddings must be [{count}, tokens, {dim}], not {list(given.shape)}.")
    return given if copies == 1 else given.repeat_interleave(copies, dim=0)


def _check_texts(name: str, value: object) -> None:
    if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(text, str) for text in value)):
        raise ValueError(f"{name} must be a str or a list of them, not {type(value).__name__}.")
    if value == []:
        raise ValueError(f"{name} must not be an empty list.")
