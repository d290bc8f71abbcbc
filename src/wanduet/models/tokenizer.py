"""Prompts to token ids, cleaned as the official code cleans them.

Source: Wan2.1 wan/modules/tokenizers.py (`basic_clean`, `whitespace_clean`): ftfy, twice html.unescape,
collapsed whitespace.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftfy

from wanduet.errors import ModelNotFoundError

MAX_TOKENS = 512


def clean_text(text: str) -> str:
    """A prompt as the text encoder was trained to see it."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """The true tokens of a cleaned prompt; `cut` is the text that did not fit."""

    text: str
    ids: tuple[int, ...]
    cut: str = ""


class Tokenizer:
    """A checkpoint's tokenizer, read by transformers."""

    def __init__(self, folder: Path) -> None:
        """Raises ModelNotFoundError if the folder holds no tokenizer."""
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), use_fast=True, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelNotFoundError(f"{folder} holds no tokenizer that can be read: {error}.") from error

    def __call__(self, prompt: str, max_tokens: int = MAX_TOKENS) -> TokenizedPrompt:
        """Clean and tokenize; what is beyond `max_tokens` (the end mark included) is cut and told."""
        text = clean_text(prompt)
        whole = self._tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        if len(whole) <= max_tokens:
            return TokenizedPrompt(text, tuple(whole))
        kept = self._tokenizer(text, add_special_tokens=True, truncation=True, max_length=max_tokens)["input_ids"]
        ends = sum(self._tokenizer.get_special_tokens_mask(kept, already_has_special_tokens=True))
        cut = self._tokenizer.decode(whole[len(kept) - ends :], skip_special_tokens=True).strip()
        return TokenizedPrompt(text, tuple(kept), cut)
