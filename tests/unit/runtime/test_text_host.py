import importlib
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wanduet.errors import CancelledError, WeightsError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.media.embeddings import PromptEmbeds, load_embeddings, save_embeddings
from wanduet.media.files import UnreadableFileError
from wanduet.models.text.umt5 import TextEncoder
from wanduet.runtime.text_host import CachedPromptEncoder, RandomPromptEncoder, check_tied_embedding
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.hub import open_model
from wanduet.weights.safetensors import TensorFiles

CIRCLE = "a red circle moving left"


@pytest.fixture
def folder() -> ModelFolder:
    return open_model("miniature")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts went through the encoder, each time."""
    whole, found = TextEncoder.encode, []

    def encode(self, prompts, **keywords):
        found.append(len(prompts))
        return whole(self, prompts, **keywords)

    monkeypatch.setattr(TextEncoder, "encode", encode)
    return found


def test_the_cache_saves_the_encoder(folder: ModelFolder, tmp_path: Path, passes: list[int]) -> None:
    first = CachedPromptEncoder(folder, "float32", "resident", tmp_path).encode([CIRCLE, ""])
    assert passes == [2]
    again = CachedPromptEncoder(folder, "float32", "resident", tmp_path).encode(["", CIRCLE, "new"])
    assert passes == [2, 1]
    assert torch.equal(again[1].embeds, first[0].embeds)
    assert torch.equal(again[0].embeds, first[1].embeds)
    assert [e.text for e in again] == ["", CIRCLE, "new"]
    CachedPromptEncoder(folder, "float32", "resident", None).encode([CIRCLE])
    assert passes == [2, 1, 1]


def test_both_ways_to_hold_the_encoder_give_the_same(folder: ModelFolder) -> None:
    resident, streamed = (CachedPromptEncoder(folder, "float32", hold, None) for hold in ("resident", "streamed"))
    assert torch.equal(resident.encode([CIRCLE])[0].embeds, streamed.encode([CIRCLE])[0].embeds)


def test_the_key_is_the_cleaned_text_the_weights_the_precision_and_the_limit(
    folder: ModelFolder, tmp_path: Path
) -> None:
    encoder = CachedPromptEncoder(folder, "float32", "resident", tmp_path)
    key = encoder.path_of(CIRCLE)
    assert encoder.path_of("  a  red\ncircle moving left ") == key
    assert CachedPromptEncoder(folder, "float32", "streamed", tmp_path).path_of(CIRCLE) == key
    copy = tmp_path / "model"
    shutil.copytree(folder.path, copy)
    assert CachedPromptEncoder(ModelFolder(copy, "x"), "float32", "resident", tmp_path).path_of(CIRCLE) == key
    (copy / "tokenizer" / "added.txt").write_text("")
    other_tokenizer = ModelFolder(copy, "x")
    others = {
        encoder.path_of("a blue circle"),
        encoder.path_of(CIRCLE, 64),
        CachedPromptEncoder(folder, "bfloat16", "resident", tmp_path).path_of(CIRCLE),
        CachedPromptEncoder(other_tokenizer, "float32", "resident", tmp_path).path_of(CIRCLE),
    }
    assert len(others - {key}) == 4
    assert CachedPromptEncoder(folder, "float32", "resident", None).path_of(CIRCLE) is None


def test_an_entry_of_another_prompt_is_not_believed(folder: ModelFolder, tmp_path: Path, passes: list[int]) -> None:
    encoder = CachedPromptEncoder(folder, "float32", "resident", tmp_path)
    encoder.encode([CIRCLE, "a blue square"])
    one, other = encoder.path_of(CIRCLE), encoder.path_of("a blue square")
    assert one is not None
    assert other is not None
    one.write_bytes(other.read_bytes())
    assert encoder.encode([CIRCLE])[0].text == CIRCLE
    assert passes == [2, 1]


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(folder: ModelFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    encoder = CachedPromptEncoder(folder, "float32", "resident", tmp_path / "file")
    for _ in range(2):
        assert encoder.encode([CIRCLE])[0].text == CIRCLE


def test_a_prompt_longer_than_the_limit_is_cut(folder: ModelFolder) -> None:
    encoder = CachedPromptEncoder(folder, "float32", "resident", None)
    (whole,) = encoder.encode([CIRCLE])
    (cut,) = encoder.encode([CIRCLE], max_tokens=4)
    assert (whole.cut, cut.embeds.shape[0]) == ("", 4)
    assert CIRCLE.endswith(cut.cut)
    assert cut.cut


def test_cancelled_before_a_layer(folder: ModelFolder) -> None:
    encoder = CachedPromptEncoder(folder, "float32", "resident", None)
    layers: list[tuple[int, int]] = []
    with pytest.raises(CancelledError):
        encoder.encode([CIRCLE], lambda: len(layers) == 1, lambda done, total: layers.append((done, total)))
    assert layers == [(1, 2)]


def test_cancelled_in_the_middle_of_a_layer(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, read = TensorFiles.read, []

    def reading(self, names, dtype):
        read.extend(names)
        return whole(self, names, dtype)

    monkeypatch.setattr(TensorFiles, "read", reading)
    encoder = CachedPromptEncoder(folder, "float32", "resident", None)
    with pytest.raises(CancelledError):
        encoder.encode([CIRCLE], lambda: len(read) >= 3)
    assert len(read) == 3


def test_cancelled_between_the_prompts_of_a_layer(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.umt5.modeling_umt5 import UMT5Block

    whole, passed = UMT5Block.forward, []

    def forward(self, *values, **keywords):
        passed.append(values)
        return whole(self, *values, **keywords)

    monkeypatch.setattr(UMT5Block, "forward", forward)
    with pytest.raises(CancelledError):
        CachedPromptEncoder(folder, "float32", "resident", None).encode([CIRCLE, "a"], lambda: bool(passed))
    assert len(passed) == 1


def test_cancelled_while_libraries_are_imported(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "transformers.models.umt5.modeling_umt5"
    begun, may_go_on = threading.Event(), threading.Event()

    class Slow:
        def find_spec(self, module, *_):
            if module == name:
                begun.set()
                may_go_on.wait(30.0)

    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Slow(), *sys.meta_path])
    try:
        with pytest.raises(CancelledError):
            CachedPromptEncoder(folder, "float32", "resident", None).encode([CIRCLE], begun.is_set)
        assert name not in sys.modules, "it did not wait for the import"
    finally:
        may_go_on.set()
        importlib.import_module(name)  # not before the thread that began it is done


def test_two_embeddings_that_differ_are_refused(folder: ModelFolder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder.path, tmp_path / "model")
    path = tmp_path / "model" / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, path)
    check_tied_embedding(ModelFolder(tmp_path / "model", "x"))
    tensors["encoder.embed_tokens.weight"][-1] += 1
    save_file(tensors, path)
    with pytest.raises(WeightsError, match="differ"):
        check_tied_embedding(ModelFolder(tmp_path / "model", "x"))


def test_random_embeddings_depend_on_the_text_only() -> None:
    encoder = RandomPromptEncoder(WAN_1_3B)
    one, again, other = encoder.encode(["a cat", "a  cat", "a dog"])
    assert torch.equal(one.embeds, again.embeds)
    assert not torch.equal(one.embeds, other.embeds)
    assert one.embeds.shape == (3, 4096)
    with pytest.raises(CancelledError):
        encoder.encode(["a cat"], lambda: True)


def test_embeddings_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    made = PromptEmbeds(torch.randn(3, 8), "红色 \U0001f3ac", "cut", "encoder", "float32")
    save_embeddings(path, made)
    found = load_embeddings(path)
    assert torch.equal(found.embeds, made.embeds)
    assert replace(found, embeds=made.embeds) == replace(made, embeds=made.embeds)
    assert TensorFiles("embeddings", [path]).shapes == {"prompt_embeds": (3, 8)}
    whole = path.read_bytes()
    detected = 0
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1
        path.write_bytes(data)
        try:
            load_embeddings(path)
        except UnreadableFileError:
            detected += 1
    assert detected >= len(whole) - 64  # padding of the header, and the spelling of a tensor's name, hold nothing
    path.write_bytes(whole)
    save_embeddings(path, replace(made, embeds=torch.full((3, 8), float("nan"))))
    with pytest.raises(UnreadableFileError, match="NaN"):
        load_embeddings(path)
