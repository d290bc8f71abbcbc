"""Embeddings that `encode` wrote are used: nothing is encoded again, and the video is the same."""

from pathlib import Path

import pytest

TINY = (
    "--model",
    "miniature",
    "--resolution",
    "64x64",
    "--num-frames",
    "5",
    "--steps",
    "1",
    "--seed",
    "3",
    "--guidance-scale",
    "1",
)
CIRCLE = "a red circle moving left on a black background"


@pytest.fixture
def encoded(wanduet, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of the circle's embeddings; from then on the data folder is another, whose cache has none."""
    assert wanduet("encode", CIRCLE, "--model", "miniature", "-o", "circle.safetensors").code == 0
    monkeypatch.setenv("WANDUET_DATA_DIR", str(tmp_path / "other"))
    return "circle.safetensors"


def test_the_same_video_without_a_text_encoder(
    wanduet, work: Path, encoded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wanduet.runtime import text_host

    with monkeypatch.context() as without:
        without.setattr(text_host, "TextEncoder", None)
        made = wanduet("generate", "--embeddings", encoded, *TINY, "--json").json
        (work / "prompts.txt").write_text(f"{CIRCLE}\n")
        batch = wanduet("batch", "prompts.txt", "--embeddings", encoded, *TINY, "--json").json
    assert made["settings"]["prompt"] == CIRCLE
    monkeypatch.setenv("WANDUET_DATA_DIR", str(tmp_path / "third"))
    other = wanduet("generate", CIRCLE, *TINY, "--json").json
    assert other["settings"] == made["settings"]
    videos = {
        (work / name).read_bytes()[-500:] for name in (made["output"], other["output"], batch["videos"][0]["output"])
    }
    assert len(videos) == 1
    assert wanduet("verify", made["output"], "--json").json["equal"] is True


def test_embeddings_of_something_else_are_refused(wanduet, encoded: str, model: Path) -> None:
    def refused(*flags: str) -> str:
        ran = wanduet("generate", *flags, "--embeddings", encoded, *TINY[2:], "--json")
        assert ran.code == 2
        return ran.error

    mini = ("--model", "miniature")
    assert f"these are of '{CIRCLE}'" in refused("a blue square", *mini)
    assert "--text-encoder-dtype float32" in refused(*mini, "--text-encoder-dtype", "bfloat16")
    assert "--no-cache-embeddings" in refused(*mini, "--no-cache-embeddings")
    assert "has no text encoder" in refused("--model", "random:1.3b")
    config = model / "tokenizer" / "tokenizer_config.json"
    config.write_text(config.read_text() + " ")
    assert "text encoder; these are of another" in refused("--model", str(model))


def test_a_file_that_has_no_embeddings(wanduet, work: Path) -> None:
    (work / "x.safetensors").write_bytes(b"x")
    ran = wanduet("generate", "--embeddings", "x.safetensors", *TINY, "--json")
    assert ran.code == 1
    assert "holds no prompt embeddings" in ran.error
