"""Prompts to token ids, cleaned as the official code cleans them.

Source: Wan2.1 wan/modules/tokenizers.py (`basic_clean`, `whitespace_clean`): ftfy, twice html.unescape,
collapsed whitespace.
"""

import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ftfy

from wanduet.errors import ModelNotFoundError
from wanduet.untrusted import check_regular, cut

MAX_TOKENS = 512
MAX_FILE_BYTES = 64 * 2**20  # the published one has 17 MiB


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
        """Raises ModelNotFoundError if the folder holds no tokenizer, or none that works."""
        from transformers import AutoTokenizer

        self._folder = folder
        _check_files(folder)
        with self._readable():
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), use_fast=True, local_files_only=True, trust_remote_code=False
            )

    def __call__(self, prompt: str, max_tokens: int = MAX_TOKENS) -> TokenizedPrompt:
        """Clean and tokenize; what is beyond `max_tokens` (the end mark included) is cut and told.

        Raises ModelNotFoundError where the tokenizer fails at the text.
        """
        with self._readable():
            return self._tokenize(clean_text(prompt), max_tokens)

    def _tokenize(self, text: str, max_tokens: int) -> TokenizedPrompt:
        whole = self._tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
        if len(whole) <= max_tokens:
            return TokenizedPrompt(text, tuple(whole))
        kept = self._tokenizer(text, add_special_tokens=True, truncation=True, max_length=max_tokens)["input_ids"]
        ends = sum(self._tokenizer.get_special_tokens_mask(kept, already_has_special_tokens=True))
        cut = self._tokenizer.decode(whole[len(kept) - ends :], skip_special_tokens=True).strip()
        return TokenizedPrompt(text, tuple(kept), cut)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Whatever goes wrong inside a tokenizer becomes one sentence: its files may hold anything."""
        try:
            yield
        except BaseException as error:
            # The library's Rust code may panic, at an expression that never ends for example: a BaseException.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = cut(str(error).strip() or type(error).__name__)
            raise ModelNotFoundError(f"{self._folder} holds no tokenizer that can be read: {reason}.") from error


def _check_files(folder: Path) -> None:
    """Refuse what the library would wait for, or read without end. Raises ModelNotFoundError."""
    try:
        for path in folder.iterdir():
            if not path.is_dir() and check_regular(path) > MAX_FILE_BYTES:
                raise ModelNotFoundError(f"{path} has more bytes than any tokenizer.")
    except OSError as error:
        raise ModelNotFoundError(f"{folder} holds no tokenizer that can be read: {error.strerror}.") from error
