from dataclasses import replace
from pathlib import Path

import pytest
from cyclopts import Token

from wanduet.config import EngineConfig
from wanduet.doors.cli.options import EngineFlags, VideoFlags, whole
from wanduet.doors.cli.validate import early_request, known_spec, read_batch
from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.family.registry import DEFAULT_MODEL
from wanduet.family.wan21 import WAN_1_3B
from wanduet.request import GenerationRequest


def test_flags_and_configuration_have_the_same_fields_and_defaults() -> None:
    flags = {name: getattr(EngineFlags(), name) for name in EngineFlags.__dataclass_fields__}
    config = {name: getattr(EngineConfig(), name) for name in EngineConfig.__dataclass_fields__}
    assert config.pop("lora_dir") is None  # names stand for a folder's files only where requests are strangers'
    assert flags == config
    assert EngineFlags().config() == EngineConfig()


def test_every_field_of_a_request_has_a_flag() -> None:
    flags = set(VideoFlags.__dataclass_fields__) - {"seconds", "resolution"}
    assert flags - {"lora"} == set(GenerationRequest.model_fields) - {"prompt", "loras"}
    assert [lora.name for lora in VideoFlags(lora=("a", "b:2")).request("x").loras] == ["a", "b"]


def test_flags_become_a_request() -> None:
    request = VideoFlags(resolution="1080p", seconds=2, negative_prompt="", seed=0).request("x")
    assert (request.height, request.width, request.num_frames) == (1080, 1920, 33)
    assert (request.negative_prompt, request.seed) == ("", 0)
    assert VideoFlags(seconds=2, fps=24).request("x").num_frames == 49
    assert VideoFlags().request("x").model_fields_set == {"prompt"}


def test_sizes_of_memory_and_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    config = EngineFlags(vram_limit="11.5GiB", ram_limit="800MB", data_dir=Path("~/x")).config()
    assert (config.vram_limit, config.ram_limit) == (int(11.5 * 2**30), 800 * 10**6)
    assert config.data_dir == Path.home() / "x"
    with pytest.raises(ConfigError):
        EngineFlags(data_dir=Path("~nobody-of-that-name/x")).config()
    for seconds in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="checkpoint_seconds"):
            EngineFlags(checkpoint_seconds=seconds).config()


@pytest.mark.parametrize(("text", "value"), [("5", 5), (" -3 ", -3), ("0", 0)])
def test_whole_numbers(text: str, value: int) -> None:
    assert whole(int, [Token(value=text)]) == value


@pytest.mark.parametrize("text", ["", "2.7", "1e3", "five", "0x10", "nan", "9" * 5000])
def test_what_is_no_whole_number(text: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        whole(int, [Token(value=text)])


def test_shapes_known_without_the_hub() -> None:
    assert known_spec(DEFAULT_MODEL) == WAN_1_3B
    assert known_spec("some/model") is None
    miniature = known_spec("miniature")
    assert miniature is not None
    assert miniature.name == "miniature"
    with pytest.raises(InvalidRequestError, match="num_frames"):
        early_request("x", VideoFlags(num_frames=80), EngineConfig())
    assert early_request("x", VideoFlags(num_frames=80), EngineConfig(model="some/model")).num_frames == 80


def test_seconds_are_those_of_the_model() -> None:
    slow = replace(
        WAN_1_3B, defaults=replace(WAN_1_3B.defaults, fps=8), vae=replace(WAN_1_3B.vae, temperal_downsample=(True,) * 3)
    )
    assert VideoFlags(seconds=2).request("x", slow).num_frames == 17
    assert VideoFlags(seconds=2, fps=4).request("x", slow).num_frames == 9


def test_a_batch_takes_flags_as_defaults(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text('one\r\n  two  \n{"prompt": "three", "seed": 9, "height": 64}\n#no\n\n', encoding="utf-8")
    requests = read_batch(file, VideoFlags(seed=1, num_frames=5), EngineConfig())
    assert [(r.prompt, r.seed, r.num_frames, r.height) for r in requests] == [
        ("one", 1, 5, None),
        ("two", 1, 5, None),
        ("three", 9, 5, 64),
    ]
    for path in (tmp_path / "none", tmp_path, Path("nul\0")):
        with pytest.raises(InvalidRequestError, match="can be read"):
            read_batch(path, VideoFlags(), EngineConfig())


def test_a_batch_as_csv(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text('prompt,seed,num_frames\n"a circle, red",7,9\na star,,\n\n', encoding="utf-8")
    first, second = read_batch(file, VideoFlags(num_frames=5, guidance_scale=2.0), EngineConfig())
    assert (first.prompt, first.seed, first.num_frames, first.guidance_scale) == ("a circle, red", 7, 9, 2.0)
    assert (second.prompt, second.seed, second.num_frames) == ("a star", None, 5)
    file.write_text("prompt,sede\na star,3\n")
    with pytest.raises(InvalidRequestError, match=r"line 2.*sede"):
        read_batch(file, VideoFlags(), EngineConfig())
    file.write_text("prompt\na,b,c\n")
    with pytest.raises(InvalidRequestError, match="surplus"):
        read_batch(file, VideoFlags(), EngineConfig())


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_of_any_spreadsheet(tmp_path: Path, delimiter: str) -> None:
    file = tmp_path / "prompts.csv"
    text = 'prompt,seed \r\n\r\n"a, b; c\td",3\r\n"two\nlines",\r\n'.replace(",seed", f"{delimiter}seed")
    file.write_bytes(("\ufeff" + text.replace('",', f'"{delimiter}')).encode())
    first, second = read_batch(file, VideoFlags(), EngineConfig())
    assert (first.prompt, first.seed) == ("a, b; c\td", 3)
    assert (second.prompt, second.seed) == ("two\nlines", None)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_batch_in_the_encoding_that_a_shell_gave_it(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("un café\r\n红色\u2028的\x0c圆\r\n", encoding=encoding)
    requests = read_batch(file, VideoFlags(), EngineConfig())
    assert [r.prompt for r in requests] == ["un café", "红色\u2028的\x0c圆"]


def test_a_line_that_the_model_cannot_make_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text('one\n\n{"prompt": "two", "num_frames": 80}\nthree\n')
    with pytest.raises(InvalidRequestError, match=r"line 3: num_frames=80") as refused:
        read_batch(file, VideoFlags(), EngineConfig(model="miniature"))
    assert refused.value.hint == "Nearest allowed: 81 or 77."


def test_json_lines_are_objects_or_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n"two"\n')
    assert [r.prompt for r in read_batch(file, VideoFlags(), EngineConfig())] == ["one", "two"]
    for line, words in (("three", "JSON"), ("[1]", "object"), ('{"seed": 1}', "prompt=None")):
        file.write_text(f'{{"prompt": "one"}}\n{line}\n')
        with pytest.raises(InvalidRequestError, match=f"line 2.*{words}"):
            read_batch(file, VideoFlags(), EngineConfig())
