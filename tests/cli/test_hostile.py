"""Files that a stranger made: one clear line and exit code 1 or 2, whatever is in them, and soon."""

import json
import os
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save, save_file

from wanduet.media.latents import save_latents
from wanduet.media.video import write_video

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
TINY = ("--steps", "1", "--num-frames", "1", "--resolution", "16x16", "--seed", "1")
SANE = 2000  # characters of a message
DEEP = "[" * 100_000
POSIX_KINDS = ("pipe", "device", "socket", "loop", "sparse")
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")


def with_header(header: str, data: bytes = b"") -> bytes:
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def refused(wanduet) -> Callable[..., str]:
    """Runs a command that must fail; its message, which is short and holds nothing that steers a terminal."""

    def run(*arguments: str, code: int = 1) -> str:
        ran = wanduet(*arguments, "--json")
        assert ran.code == code, ran.err
        assert ran.json["error"]["code"] != "internal_error"
        assert len(ran.err) < SANE
        assert "\x1b" not in ran.err
        return str(ran.error)

    return run


@pytest.mark.parametrize(
    "content",
    [
        with_header('{"__metadata__": {"wanduet": "' + DEEP + '"}}'),
        with_header('{"__metadata__": ' + DEEP),
        with_header('{"__metadata__": {"wanduet_embeddings": "' + DEEP + '"}}'),
        with_header(DEEP),
        with_header('{"' + "\\u001b" + "x" * 2_000_000 + '": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        with_header('{"latents": {"dtype": "' + "x" * 2_000_000 + '", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        with_header('{"__metadata__": {"wanduet": "{\\"seed\\": NaN}"}}'),
        struct.pack("<Q", 90 * 2**20) + b" " * 2**20,
        struct.pack("<Q", 2**63),
    ],
    ids=["deep metadata", "deep header", "deep embeddings", "brackets", "long name", "long dtype", "NaN", "cut", "huge"],
)  # fmt: skip
def test_safetensors_of_a_stranger(refused, work: Path, content: bytes) -> None:
    (work / "x.safetensors").write_bytes(content)
    for command in ("inspect", "decode"):
        assert "x.safetensors" in refused(command, "x.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"timings": []}, {"timings": {"denoise_s": "x"}}, {"rungs": {}}, {"warnings": [[]]}, {"engine": DEEP}, {"request": []},
        {"model": "miniature"}, {"attention": {}},
    ],
)  # fmt: skip
def test_metadata_of_wrong_kinds(refused, work: Path, change: dict) -> None:
    about = {"request": {"prompt": "x", "num_frames": 1}, "seed": 1, "model": {"name": "miniature"}} | change
    save_latents(work / "x.safetensors", torch.zeros(16, 1, 2, 2), about)
    assert "x.safetensors" in refused("decode", "x.safetensors")


@pytest.mark.parametrize("name", ["transformer_dtype", "weights", "vae_dtype", "text_encoder_dtype"])
@pytest.mark.parametrize("value", ["float8", "load", "__class__", "x" * 100_000, 5])
def test_a_precision_that_does_not_exist(refused, work: Path, name: str, value: object) -> None:
    about = {"request": {"prompt": "x", "num_frames": 1, "height": 16, "width": 16}, "seed": 1}
    about |= {"model": {"name": "miniature"}, "engine": {name: value}}
    write_video(np.zeros((1, 16, 16, 3), np.uint8), work / "x.mp4", metadata=about)
    save_latents(work / "x.safetensors", torch.zeros(16, 1, 2, 2), about)
    assert name in refused("verify", "x.mp4")
    assert name in refused("decode", "x.safetensors")


@pytest.mark.parametrize("value", ["int8", "sdpa", "__class__", 5])
def test_an_approximate_attention_is_used_again_and_no_other_name(refused, work: Path, value: object) -> None:
    about = {
        "request": {"prompt": "x", "num_frames": 1, "height": 16, "width": 16, "num_inference_steps": 1},
        "seed": 1,
    }
    about |= {"model": {"name": "miniature"}, "engine": {"approximate_attention": value}}
    write_video(np.zeros((1, 16, 16, 3), np.uint8), work / "x.mp4", metadata=about)
    said = refused("verify", "x.mp4", code=2 if value == "int8" else 1)  # on a CPU
    assert ("attention='int8' needs a GPU" if value == "int8" else f"attention={value!r}, which does not exist") in said


@pytest.mark.parametrize(
    "name", ["evil/model", "/tmp", "../model", "\\\\host\\share", ["miniature"], {"a": 1}, "x" * 100_000]
)
def test_a_file_names_no_model_that_is_not_known(refused, wanduet, work: Path, model: Path, name: object) -> None:
    about = {"request": {"prompt": "x", "num_frames": 1, "height": 16, "width": 16}, "seed": 1}
    about |= {"model": {"name": str(model) if name == "/tmp" else name}}
    write_video(np.zeros((1, 16, 16, 3), np.uint8), work / "x.mp4", metadata=about)
    save_latents(work / "x.safetensors", torch.zeros(16, 1, 2, 2), about)
    assert "--model" in refused("verify", "x.mp4")
    assert "--model" in refused("decode", "x.safetensors")
    assert wanduet("decode", "x.safetensors", "--model", "miniature", "--json").code == 0


def test_a_published_model_is_not_fetched_because_a_file_names_it(
    refused, wanduet, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    name, revision = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "0" * 40
    about = {"request": {"prompt": "x"}, "seed": 1, "model": {"name": name, "revision": revision}}
    save_latents(work / "x.safetensors", torch.zeros(16, 1, 2, 2), about)
    assert f"--model {name} --revision {revision}" in refused("decode", "x.safetensors")
    confirmed = refused("decode", "x.safetensors", "--model", name)  # now it is tried, and there is no network
    assert "cannot be fetched" in confirmed


def test_a_file_that_names_no_model_fetches_none(
    refused, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    about = {"request": {"prompt": "x", "num_frames": 1}, "seed": 1, "model": {}}
    write_video(np.zeros((1, 16, 16, 3), np.uint8), work / "x.mp4", metadata=about)
    save_latents(work / "x.safetensors", torch.zeros(16, 1, 2, 2), about)
    save_file({"latents": torch.zeros(16, 1, 2, 2)}, work / "other.safetensors")
    for command, name in (("verify", "x.mp4"), ("decode", "x.safetensors"), ("decode", "other.safetensors")):
        assert f"{name} does not say which model made it" in refused(command, name)


@pytest.mark.parametrize(
    "change", [{"seed": "x"}, {"request": {"prompt": "x", "fps": 0}}, {"request": {"prompt": ["x"]}}]
)
def test_latents_whose_request_is_none_are_named(refused, work: Path, change: dict) -> None:
    about = {"request": {"prompt": "x", "num_frames": 1, "height": 16, "width": 16}, "seed": 1}
    save_latents(work / "x.safetensors", torch.zeros(16, 1, 2, 2), about | {"model": {"name": "miniature"}} | change)
    assert "x.safetensors cannot have been made as it says" in refused("decode", "x.safetensors")


@pytest.mark.parametrize("kind", ["folder", *(pytest.param(k, marks=posix) for k in POSIX_KINDS)])
@pytest.mark.parametrize("suffix", [".mp4", ".safetensors"])
def test_what_is_no_plain_file(refused, wanduet, work: Path, kind: str, suffix: str) -> None:
    path = work / f"x{suffix}"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.touch()
        os.truncate(path, 2**40)
    for command in ("inspect", "verify", "decode"):
        assert path.name in refused(command, path.name)
    if suffix == ".mp4":  # as the output of an earlier run, and beside it
        ran = wanduet("generate", "x", *TINY, "--model", "miniature", "--resume", "--json")
        assert ran.code == 0
        assert ran.json["output"] != path.name


def test_files_of_requests_and_settings(refused, work: Path) -> None:
    (work / "deep.jsonl").write_text('{"prompt": ' + DEEP)
    for name in ("deep.jsonl", "."):
        refused("batch", name, "--model", "miniature", code=2)
    (work / "wanduet.toml").write_text("steps = " + DEEP)
    assert "wanduet.toml" in refused("plan", code=2)
    (work / "wanduet.toml").write_text("x" * 100_000 + " = 1")
    assert "wanduet.toml" in refused("plan", code=2)


@posix
def test_requests_and_settings_that_are_no_plain_files(refused, work: Path) -> None:
    os.mkfifo(work / "prompts.txt")
    (work / "zero.txt").symlink_to("/dev/zero")
    for name in ("prompts.txt", "zero.txt"):
        refused("batch", name, "--model", "miniature", code=2)
    os.mkfifo(work / "wanduet.toml")
    assert "wanduet.toml" in refused("plan", code=2)


def test_prompts_come_through_a_pipe(wanduet, work: Path) -> None:
    """As a shell's `<(command)` gives them."""
    reading, writing = os.pipe()
    os.write(writing, b"x\n")
    os.close(writing)
    try:
        ran = wanduet("batch", f"/dev/fd/{reading}", *TINY, "--model", "miniature", "--json")
    finally:
        os.close(reading)
    assert ran.json["failed"] == 0


@pytest.mark.parametrize(
    ("component", "change"),
    [
        ("transformer", {"num_layers": 10**9}), ("transformer", {"num_layers": 10**400}), ("text_encoder", {"num_layers": 10**9}),
        ("vae", {"num_res_blocks": 10**9}), ("vae", {"dim_mult": [1] * 10**6}), ("transformer", {"num_layers": "x" * 10**6}),
        ("text_encoder", {"vocab_size": 10**12}), ("transformer", {"patch_size": [1, 10**9, 10**9]}),
    ],
)  # fmt: skip
def test_a_config_that_asks_for_too_much(refused, model: Path, component: str, change: dict) -> None:
    (model / "manifest.json").unlink()
    config = model / component / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert next(iter(change)) in refused("generate", "x", *TINY, "--model", str(model))


@pytest.mark.parametrize(
    "name", ["transformer/config.json", "model_index.json", "manifest.json", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("content", [DEEP, '{"a": ' * 100_000, '{"a": 1, "a": 2}'])
def test_json_that_no_program_expects(refused, model: Path, name: str, content: str) -> None:
    if name != "manifest.json":
        (model / "manifest.json").unlink()
    (model / name).write_text(content)
    assert name.partition("/")[0] in refused("generate", "x", *TINY, "--model", str(model))


@pytest.mark.parametrize("file", ["/etc/passwd", "../x", "/dev/zero", "tokenizer"])
def test_a_manifest_that_names_other_files(refused, model: Path, file: str) -> None:
    (model / "manifest.json").write_text(json.dumps({"sha256": {file: "0" * 64}}))
    refused("download", "--model", str(model))


def test_a_tokenizer_whose_expression_never_ends(refused, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUST_BACKTRACE", "0")
    (model / "manifest.json").unlink()
    path = model / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    slow = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}
    tokenizer["normalizer"] = slow
    path.write_text(json.dumps(tokenizer))
    assert "tokenizer" in refused("generate", "x" * 64, *TINY, "--model", str(model))


@posix
def test_a_tokenizer_that_is_a_pipe(refused, model: Path) -> None:
    (model / "manifest.json").unlink()
    (model / "tokenizer" / "tokenizer.json").unlink()
    os.mkfifo(model / "tokenizer" / "tokenizer.json")
    assert "pipe" in refused("generate", "x", *TINY, "--model", str(model))


@pytest.mark.parametrize("what", ["twice", "overlap", "gap", "kind", "other file", "long name"])
def test_weights_whose_header_lies(refused, model: Path, what: str) -> None:
    (model / "manifest.json").unlink()
    path = model / TRANSFORMER
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    text, data = whole[8 : 8 + length].decode().rstrip(), whole[8 + length :]
    header = json.loads(text)
    first = next(name for name in header if name != "__metadata__")
    if what == "twice":
        path.write_bytes(with_header(text[:-1] + f", {json.dumps(first)}: {json.dumps(header[first])}" + "}", data))
    elif what == "other file":
        path.rename(path.with_name("one.safetensors"))
        path.with_name("two.safetensors").write_bytes(
            save({first: load_file(path.with_name("one.safetensors"))[first]})
        )
    else:
        begin, end = header[first]["data_offsets"]
        if what == "overlap":
            other = [n for n in header if n != "__metadata__" and header[n]["shape"] == header[first]["shape"]][-1]
            header[other]["data_offsets"] = [begin, end]
        elif what == "gap":
            header[first]["data_offsets"] = [begin + 1, end + 1]
        elif what == "kind":
            header[first]["dtype"] = "float8" * 100_000
        else:
            header["x\x1b" * 100_000] = header.pop(first)
        path.write_bytes(with_header(json.dumps(header), data))
    refused("generate", "x", *TINY, "--model", str(model))


def test_what_a_file_says_does_not_fill_the_screen(wanduet, work: Path) -> None:
    save_file({"x" * 1_000_000: torch.zeros(1)}, work / "x.safetensors")
    ran = wanduet("inspect", "x.safetensors")
    assert ran.code == 1
    assert len(ran.err) < SANE
