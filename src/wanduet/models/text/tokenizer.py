"""Prompts to token ids, after the same cleaning as in the official code.

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
from wanduet.models.text.sentencepiece import sentencepiece_tokenizer
from wanduet.untrusted import check_regular, cut

MAX_TOKENS = 512
MAX_FILE_BYTES = 64 * 2**20  # the published one has 17 MiB


def clean_text(text: str) -> str:
    """Clean a prompt as in the text encoder's training: fix encoding errors, unescape HTML, collapse whitespace."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """The token ids of a cleaned prompt, without padding; `cut`: the text that did not fit."""

    text: str
    ids: tuple[int, ...]
    cut: str = ""


class Tokenizer:
    """A checkpoint's tokenizer, loaded by transformers."""

    def __init__(self, folder: Path, sentencepiece: bytes | None = None) -> None:
        """`sentencepiece`: a SentencePiece model to use; `folder` is then only where it is from, for messages.

        Raises ModelNotFoundError if the folder has no tokenizer, or one that cannot be loaded.
        """
        self._folder = folder
        if sentencepiece is None:
            _check_files(folder)
        with self._readable():
            self._tokenizer: Any = load_tokenizer(folder, sentencepiece)

    def __call__(self, prompt: str, max_tokens: int = MAX_TOKENS) -> TokenizedPrompt:
        """Clean and tokenize a prompt, truncated to `max_tokens` including the end mark; the rest is returned as `cut`.

        Raises ModelNotFoundError if the tokenizer fails on the text.
        """
        with self._readable():
            return self._tokenize(clean_text(prompt), max_tokens)

    def save(self, folder: Path) -> None:
        """Write it as a folder that transformers loads. Raises OSError."""
        self._tokenizer.save_pretrained(str(folder))

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
        """Raise any error inside the tokenizer as ModelNotFoundError: its files may contain anything."""
        try:
            yield
        except BaseException as error:
            # The library's Rust code may panic, for example on an unbounded expression, which raises a BaseException.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = cut(str(error).strip() or type(error).__name__)
            raise ModelNotFoundError(f"{self._folder} holds no tokenizer that can be read: {reason}.") from error


def load_tokenizer(folder: Path, sentencepiece: bytes | None = None) -> Any:
    """Return transformers' tokenizer of a folder, or of a SentencePiece model. Raises errors of many types."""
    from transformers import AutoTokenizer

    if sentencepiece is not None:
        return sentencepiece_tokenizer(sentencepiece)
    return AutoTokenizer.from_pretrained(str(folder), use_fast=True, local_files_only=True, trust_remote_code=False)


def _check_files(folder: Path) -> None:
    """Refuse files on which the library would block or read without end. Raises ModelNotFoundError."""
    try:
        for path in folder.iterdir():
            if not path.is_dir() and check_regular(path) > MAX_FILE_BYTES:
                raise ModelNotFoundError(f"{path} has more bytes than any tokenizer.")
    except OSError as error:
        raise ModelNotFoundError(f"{folder} holds no tokenizer that can be read: {error.strerror}.") from error
