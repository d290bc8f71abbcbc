from pathlib import Path

import pytest

from wanduet.config import GIB, EngineConfig, format_bytes, format_seconds, parse_bytes, parse_devices
from wanduet.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24GiB", 24 * 2**30), ("24G", 24 * 2**30), ("24GB", 24 * 10**9), ("512MiB", 2**29), ("1.5 TiB", 3 * 2**39),
        ("8000", 8000), ("800B", 800), ("0", 0), (" 1kib ", 1024), (77, 77),
    ],
)  # fmt: skip
def test_amounts_of_memory(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "lots", "-1GiB", "1..5G", "24 Gibi", "GiB", "1e3", "nan"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(ConfigError, match="no amount of memory"):
        parse_bytes(text)


def test_devices() -> None:
    assert parse_devices(None).names == parse_devices("  ").names == ()
    assert parse_devices("cpu, cpu").names == ("cpu", "cpu")
    named = parse_devices("vae=cuda:0,transformer=cuda:1")
    assert (named.role("vae"), named.role("transformer"), named.role("text_encoder")) == ("cuda:0", "cuda:1", None)
    assert parse_devices("vae=cpu,transformer=cpu").names == ("cpu",)


@pytest.mark.parametrize(
    "text",
    ["gpu", "cuda:", "cuda:-1", "cpu,", ",", "vae=cpu,cpu", "x=cpu", "vae=cpu,vae=cpu", "vae=", "=cpu", "cuda:0 1"],
)
def test_devices_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError):
        EngineConfig(devices=text)


@pytest.mark.parametrize("name", ["fp4", "int8", "", None])
def test_formats_of_weights_that_do_not_exist(name) -> None:
    with pytest.raises(ConfigError, match="no format of weights") as refused:
        EngineConfig(weights=name)
    assert "q8" in (refused.value.hint or "")
    with pytest.raises(ConfigError, match="no dtype of the text encoder") as refused:
        EngineConfig(text_encoder_dtype=name)
    assert "q8" in (refused.value.hint or "")


def test_a_model_must_be_named() -> None:
    with pytest.raises(ConfigError):
        EngineConfig(model="")


def test_the_data_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDUET_DATA_DIR", str(tmp_path))
    assert EngineConfig().data_folder == tmp_path
    assert EngineConfig(data_dir=tmp_path / "x").data_folder == tmp_path / "x"
    assert EngineConfig(data_dir=str(tmp_path)).data_folder == tmp_path  # type: ignore[arg-type]
    monkeypatch.setenv("WANDUET_DATA_DIR", "")
    assert EngineConfig().data_folder.name == "wanduet"


def test_a_number_that_was_meant_as_gib_says_so() -> None:
    with pytest.raises(ConfigError, match="12GiB"):
        parse_bytes("12")


def test_an_amount_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(ConfigError):
        parse_bytes("9" * 400)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 MiB"), (52 * 1024, "52 KiB"), (189 * 2**20, "189 MiB"), (3 * GIB, "3.00 GiB")]
)
def test_bytes_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (42, "42 s"), (119, "119 s"), (120, "2.0 min"), (1500, "25 min"), (7200, "2.0 h"), (90000, "25 h"),
     (1142340, "13 days")],
)  # fmt: skip
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
