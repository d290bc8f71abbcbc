"""A tokenizer of SentencePiece bytes, against one that the tokenizers library makes of the same pieces."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers

from tests.weight_files import sentencepiece_model, tensors_of
from wanduet.errors import ModelNotFoundError
from wanduet.models.text.sentencepiece import sentencepiece_tokenizer
from wanduet.models.text.tokenizer import Tokenizer
from wanduet.weights.hub import open_model

PIECES = [
    ("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -2.0, 1), ("a", -4.0, 1), ("▁a", -3.0, 1),
    ("▁cat", -3.5, 1), ("▁ca", -3.4, 1), ("t", -5.0, 1), ("s", -5.5, 1), ("é", -6.0, 1), ("▁湖", -4.0, 1),
    ("<extra_id_0>", 0.0, 4),
]  # fmt: skip
TEXTS = ["a cat", "cats a", "  a\n cat ", "é 湖 湖t", "", "a zebra", "cat <extra_id_0> a", "x" * 50]


def expected(text: str) -> list[int]:
    library = Library(models.Unigram([(piece, score) for piece, score, _ in PIECES], 2, False))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    library.add_tokens(["<extra_id_0>"])
    return [*library.encode(" ".join(text.split())).ids, 1]


@pytest.mark.parametrize("text", TEXTS)
def test_the_ids_are_those_of_the_pieces(text: str) -> None:
    tokenizer = Tokenizer(Path("spiece.model"), sentencepiece_model(PIECES))
    assert list(tokenizer(text).ids) == expected(text)
    assert len(tokenizer("a cat a cat a cat", 4).ids) == 4
    assert tokenizer("a cat a cat", 4).ids[-1] == 1


def test_special_ids() -> None:
    made = sentencepiece_tokenizer(sentencepiece_model(PIECES))
    assert (made.pad_token_id, made.eos_token_id, made.unk_token_id, made.bos_token_id) == (0, 1, 2, None)


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x0a\x7fx", sentencepiece_model(PIECES)[:-2], b"\x0b\x01"])
def test_damaged_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ModelNotFoundError, match="holds no tokenizer that can be read"):
        Tokenizer(Path("spiece.model"), data)


def test_another_kind_of_model_is_refused() -> None:
    with pytest.raises(ModelNotFoundError, match="not of the kind unigram"):
        Tokenizer(Path("spiece.model"), sentencepiece_model(PIECES, kind=2))


def test_a_text_encoder_brings_its_tokenizer(tmp_path: Path) -> None:
    model, data = open_model("miniature"), sentencepiece_model(PIECES)
    state = tensors_of(model, "text_encoder", official=False)
    state["spiece_model"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    save_file(state, tmp_path / "umt5.safetensors")
    found = open_model("miniature", files={"text_encoder": tmp_path / "umt5.safetensors"})
    assert found.sentencepiece == data
    assert found.text_encoder.shapes == model.text_encoder.shapes
    (tmp_path / "spiece.model").write_bytes(data)
    other = open_model("miniature", files={"tokenizer": tmp_path / "spiece.model"})
    assert other.sentencepiece == data
    assert len({m.text_fingerprint for m in (model, found, other)}) == 3
    with pytest.raises(ModelNotFoundError, match="has no tokenizer"):
        open_model("miniature", files={"tokenizer": model.part("vae") / "diffusion_pytorch_model.safetensors"})
