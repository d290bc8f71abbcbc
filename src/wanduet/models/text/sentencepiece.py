"""Makes a tokenizer of a SentencePiece model, as ComfyUI's text encoder has it in itself.

The format is a protobuf message (sentencepiece_model.proto of google/sentencepiece), of which few fields are needed.
"""

import struct
from collections.abc import Iterator
from typing import Any

# Fields of the messages, by number.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_TEXT, _SCORE, _KIND = 1, 2, 3  # of a piece
_MODEL_TYPE, _BYTE_FALLBACK, _UNKNOWN_ID = 3, 35, 40  # of the trainer's settings
_CHARACTERS = 2  # of the normalizer's: a table of replacements
_UNIGRAM, _CONTROL, _USER_DEFINED = 1, 3, 4
_PAD, _END = 0, 1  # ids in T5's models, which have no mark of a beginning


def sentencepiece_tokenizer(data: bytes) -> Any:
    """Return transformers' tokenizer of a SentencePiece model of UMT5: text, then the end mark.

    Raises ValueError for another kind of model, or damaged bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pieces: list[tuple[str, float]] = []
    kinds: list[int] = []
    trainer: dict[int, Any] = {}
    characters = b""
    for number, value in _fields(data):
        if number == _PIECES:
            piece = dict(_fields(value))
            pieces.append((bytes(piece[_TEXT]).decode(), struct.unpack("<f", piece.get(_SCORE, bytes(4)))[0]))
            kinds.append(piece.get(_KIND, 1))
        elif number == _TRAINER:
            trainer = dict(_fields(value))
        elif number == _NORMALIZER:
            characters = dict(_fields(value)).get(_CHARACTERS, b"")
    if trainer.get(_MODEL_TYPE, _UNIGRAM) != _UNIGRAM or len(pieces) <= _END:
        raise ValueError("its SentencePiece model is not of the kind unigram")
    unknown = trainer.get(_UNKNOWN_ID, 0)
    made = Tokenizer(models.Unigram(pieces, unknown, bool(trainer.get(_BYTE_FALLBACK, 0))))
    if characters:
        made.normalizer = normalizers.Precompiled(bytes(characters))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    made.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    pad, end = pieces[_PAD][0], pieces[_END][0]
    made.post_processor = processors.TemplateProcessing(single=["$A", end], special_tokens=[(end, _END)])
    for (text, _), kind in zip(pieces, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            made.add_tokens([AddedToken(text, normalized=False, special=kind == _CONTROL)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=end, pad_token=pad, unk_token=pieces[unknown][0]
    )  # fmt: skip


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protobuf message: an int, or bytes. Raises ValueError."""
    position, view = 0, memoryview(data)
    while position < len(view):
        tag, position = _varint(view, position)
        if tag & 7 == 0:
            value, position = _varint(view, position)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            length, position = _varint(view, position)
        elif tag & 7 in (1, 5):
            length = 8 if tag & 7 == 1 else 4
        else:
            raise ValueError("its SentencePiece model is damaged")
        if position + length > len(view):
            raise ValueError("its SentencePiece model is damaged")
        yield tag >> 3, bytes(view[position : position + length])
        position += length


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    """Return a number of seven bits a byte, and the position after it."""
    value = shift = 0
    while position < len(view) and shift < 64:
        byte = view[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position
    raise ValueError("its SentencePiece model is damaged")
