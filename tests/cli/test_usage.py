"""Flags, environment, settings file; everything that is refused before anything is loaded."""

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from wanduet.doors.cli.main import app
from wanduet.doors.cli.options import EngineFlags, VideoFlags

DRY = ("generate", "a red circle", "--dry-run", "--json", "--model", "miniature")


def without(heavy: str, arguments: list[str], folder: Path) -> tuple[int, list[str]]:
    """Exit code of a command in a fresh process, and which of these modules it imported."""
    code = (
        "import sys; from wanduet.doors.cli.main import app; from wanduet.doors.cli.run import run;"
        f"code = run(app, {arguments!r}); print(code, *(set({heavy.split()!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    exit_code, *imported = done.stderr.strip().splitlines()[-1].split()
    return int(exit_code), imported


@pytest.mark.parametrize(
    ("arguments", "code", "heavy"),
    [
        (["--help"], 0, "torch av numpy rich.markdown difflib"),
        (["generate", "--help"], 0, "torch av numpy"),
        (["generate", "x", "--nonsense"], 2, "torch av numpy"),
        (["generate", "x", "--steps", "0"], 2, "torch av numpy"),
        (["generate", "x", "--model", "miniature", "--num-frames", "80"], 2, "torch av numpy"),
        (["generate", "x", "--num-frames", "80"], 2, "torch av numpy"),
        (["generate", "x", "--model", "miniature", "-o", "x.avi"], 2, "torch"),
        (["generate", "x", "--model", "/no/such/folder"], 1, "torch"),
        (["batch", "no-such-file"], 2, "torch av numpy"),
        (["download", "--model", "miniature"], 0, "torch"),
    ],
)
def test_what_needs_no_library_does_not_import_it(tmp_path: Path, arguments: list[str], code: int, heavy: str) -> None:
    assert without(heavy, arguments, tmp_path) == (code, [])


@pytest.mark.parametrize(
    ("flags", "field", "words"),
    [
        ("--num-frames 80", "num_frames", "Nearest allowed: 81 or 77"),
        ("--num-frames -1", "num_frames", "Nearest allowed: 1"),
        ("--num-frames 99999999999999999999", "num_frames", "at most 4093"),
        ("--height 17", "height", "Nearest allowed: 16 or 32"),
        ("--width 0", "width", "at least 16"),
        ("--height 1088 --width 16400", "width", "at most 16384"),
        ("--resolution 0x0", "height", "at least 16"),
        ("--resolution ²x²", "resolution", "480p"),
        ("--resolution 480", "resolution", "WIDTHxHEIGHT"),
        ("--resolution 32x32 --height 32", "resolution", "either"),
        ("--seconds nan", "seconds", "more than 0"),
        ("--seconds inf", "seconds", "at most 3600"),
        ("--seconds 1 --num-frames 5", "seconds", "either"),
        ("--fps 0", "fps", "at least 1"),
        ("--fps 121", "fps", "at most 120"),
        ("--steps 0", "num_inference_steps", "at least 1"),
        ("--steps 1001", "num_inference_steps", "at most 1000"),
        ("--guidance-scale nan", "guidance_scale", "finite"),
        ("--guidance-scale -1", "guidance_scale", "at least 0"),
        ("--flow-shift 0", "flow_shift", "more than 0"),
        ("--flow-shift inf", "flow_shift", "finite"),
        ("--timesteps 1000,757", "timesteps", "only with the sampler euler or renoise"),
        ("--timesteps 757,1000 --sampler euler", "timesteps", "each must be less"),
        ("--timesteps 1001 --sampler euler", "timesteps", "at most 1000"),
        ("--timesteps 1000,757 --sampler euler --steps 3", "num_inference_steps", "there are 2 timesteps"),
        ("--timesteps 1000,757 --sampler renoise --flow-shift 8", "flow_shift", "leave it out"),
        ("--seed -1", "seed", "at least 0"),
        ("--seed 9223372036854775808", "seed", "at most 9223372036854775807"),
        ("--num-videos-per-prompt 65", "num_videos_per_prompt", "at most 64"),
        ("--quality 0", "quality", "Nearest allowed: 1"),
        ("--quality 101", "quality", "Nearest allowed: 100"),
        ("--quality 5 --codec ffv1", "quality", "lossless"),
        ("--codec nonsense", "codec", "h264"),
        ("-o clip.avi", "output", "clip.mp4"),
        ("-o clip", "output", "clip.mp4"),
        ("-o clip.webm", "output", "clip.mp4"),
    ],
)
def test_a_value_out_of_range_names_field_and_what_is_allowed(wanduet, flags: str, field: str, words: str) -> None:
    ran = wanduet(*DRY, *flags.split())
    assert ran.code == 2
    assert words in ran.error
    assert ran.json["error"]["param"] == field
    assert field in ran.error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--nonsense", "--nonsense"),
        ("--steps 2.7", "whole number"),
        ("--steps many", "whole number"),
        ("--sampler nonsense", "unipc"),
        ("--strategy nonsense", "placed"),
        ("--devices gpu", "cuda:0"),
        ("--devices cuda:9", "cuda:9"),
        ("--devices vae=cpu,transformer", "role for every"),
        ("--devices tokenizer=cpu", "no role"),
        ("--vram-limit lots", "24GiB"),
        ("--vram-limit 0", "no memory"),
        ("--ram-limit 0", "no memory"),
        ("--attention nonsense", "sdpa"),
        ("--transformer-dtype int8", "bfloat16"),
        ("--weights int4", "q8"),
        ("--checkpoint-seconds -1", "0 or more"),
    ],
)
def test_bad_usage_says_what_is_meant(wanduet, flags: str, words: str) -> None:
    ran = wanduet(*DRY, *flags.split())
    assert ran.code == 2
    assert words in ran.error


def test_a_text_encoder_on_a_device_that_is_not_here(wanduet, work: Path) -> None:
    for command in (DRY, ("encode", "x", "--json", "--model", "miniature")):
        ran = wanduet(*command, "--text-encoder-device", "cuda:9")
        assert ran.code == 2
        assert "no device 'cuda:9'" in ran.error


def test_prompts_are_as_long_as_the_server_takes_them(wanduet, work: Path) -> None:
    most, longer = "x" * 8000, "x" * 8001
    assert wanduet(*DRY[:1], most, *DRY[2:], "--negative-prompt", most).code == 0
    for command in ("generate", "encode", "bench"):
        ran = wanduet(command, longer, "--model", "miniature", "--json")
        assert (ran.code, ran.json["error"]["param"]) == (2, "prompt")
        assert "at most 8000 characters" in ran.error
        assert longer not in ran.err
    assert wanduet(*DRY, "--negative-prompt", longer).json["error"]["param"] == "negative_prompt"
    for row in (longer, json.dumps({"prompt": longer}), json.dumps({"prompt": "x", "negative_prompt": longer})):
        (work / "prompts.txt").write_text(f"a circle\n{row}\n")
        refused = wanduet("batch", "prompts.txt", "--model", "miniature", "--json")
        assert refused.code == 2
        assert "line 2" in refused.error
        assert "at most 8000 characters" in refused.error


@pytest.mark.parametrize("prompt", ["", "   ", "\t\n", "\ud800"])
def test_a_prompt_that_is_none(wanduet, prompt: str) -> None:
    for command in ("generate", "encode"):
        ran = wanduet(command, prompt, "--model", "miniature", "--json")
        assert ran.code == 2
        assert ran.json["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("decode", "no-such-file"), "Cannot read no-such-file: No such file"),
        (("decode", "notes.txt"), "notes.txt is a text file, not a safetensors file."),
        (("decode", "clip.mp4"), "clip.mp4 is a video, not a safetensors file."),
        (("decode", "cut.safetensors"), "cut.safetensors is no safetensors file, or damaged"),
        (
            ("generate", "--embeddings", "no-such-file", "--model", "miniature"),
            "Cannot read no-such-file: No such file",
        ),
        (("convert", "clip.mp4", "out"), "clip.mp4 is a video, not a safetensors file."),
    ],
)
def test_files_that_are_not_what_a_command_reads(wanduet, work: Path, arguments: tuple[str, ...], words: str) -> None:
    (work / "notes.txt").write_text("a list of things")
    (work / "clip.mp4").write_bytes(b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41" + bytes(64))
    (work / "cut.safetensors").write_bytes(b"\xff" * 9)
    ran = wanduet(*arguments, "--json")
    assert ran.code == 1
    assert words in ran.error


def test_where_a_data_folder_cannot_be(wanduet, work: Path) -> None:
    (work / "file").write_text("")
    ran = wanduet("jobs", "list", "--data-dir", "file/data")
    assert ran.code == 1
    assert "another place with --data-dir" in ran.err


def test_commands_that_are_none(wanduet) -> None:
    assert wanduet("nonsense", "--json").code == 2
    assert "nonsense" in wanduet("nonsense", "--json").error
    assert wanduet("generate", "--json").code == 2
    ran = wanduet()
    assert (ran.code, ran.err) == (0, "")
    assert "generate" in ran.out
    assert wanduet("--version").code == 0


def test_flag_before_environment_before_file_before_default(
    wanduet, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps(*flags: str) -> int:
        return int(wanduet(*DRY, *flags).json["settings"]["num_inference_steps"])

    assert steps() == 20  # the miniature's own
    (work / "wanduet.toml").write_text("num_inference_steps = 3\n")
    assert steps() == 3
    (work / "wanduet.toml").write_text("steps = 4\n")
    assert steps() == 4
    monkeypatch.setenv("WANDUET_NUM_INFERENCE_STEPS", "5")
    assert steps() == 5
    assert steps("--steps", "6") == 6
    assert steps("--num-inference-steps", "7") == 7


@pytest.mark.parametrize(
    ("flags", "environment", "file", "expected"),
    [
        ("--height 32 --width 48", {}, 'resolution = "64x64"', (32, 48, 33)),
        ("--resolution 32x48", {}, "height = 64\nwidth = 64", (48, 32, 33)),
        ("--height 32", {"RESOLUTION": "64x64"}, "", (32, 96, 33)),
        ("", {"RESOLUTION": "64x48"}, "height = 32", (48, 64, 33)),
        ("--seconds 1", {"NUM_FRAMES": "5"}, "", (96, 96, 17)),
        ("--num-frames 5", {"SECONDS": "1"}, "seconds = 2", (96, 96, 5)),
        ("", {"SECONDS": "1"}, "num_frames = 5", (96, 96, 17)),
        ("", {}, "seconds = 1\nheight = 32", (32, 96, 17)),
    ],
)
def test_the_same_order_where_one_thing_is_said_in_two_ways(
    wanduet, work: Path, monkeypatch: pytest.MonkeyPatch, flags: str, environment: dict, file: str, expected: tuple
) -> None:
    (work / "wanduet.toml").write_text(file)
    for name, text in environment.items():
        monkeypatch.setenv(f"WANDUET_{name}", text)
    settings = wanduet(*DRY, *flags.split()).json["settings"]
    assert (settings["height"], settings["width"], settings["num_frames"]) == expected


@pytest.mark.parametrize(
    ("flags", "file", "steps"),
    [
        ("--timesteps 1000,757", "steps = 20\nflow_shift = 5", [1000.0, 757.0]),
        ("--steps 20", 'timesteps = "1000,757"', 20),
        ("--flow-shift 5", 'timesteps = "1000,757"\nsteps = 20', 20),
    ],
)
def test_a_flag_overrules_the_files_schedule(wanduet, work: Path, flags: str, file: str, steps: object) -> None:
    (work / "wanduet.toml").write_text(f"{file}\nsampler = 'euler'\n")
    settings = wanduet(*DRY, *flags.split()).json["settings"]
    assert settings.get("timesteps", settings["num_inference_steps"]) == steps


def test_both_ways_in_one_source_are_refused(wanduet, work: Path) -> None:
    (work / "wanduet.toml").write_text('resolution = "64x64"\nheight = 32\n')
    assert "either" in wanduet(*DRY).error


@pytest.mark.parametrize("option", [*fields(VideoFlags), *fields(EngineFlags)], ids=lambda option: option.name)
def test_every_option_has_a_flag_a_variable_and_a_setting(
    option, work: Path, wanduet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By flag before environment before file."""
    special = {
        "resolution": ("32x32", "48x48", "64x64"), "sampler": ("euler", "unipc", "dpm++2m"),
        "speed": ("near", "fine", "exact"), "quantize": ("fp8", "int8", "off"),
        "quantize_attention": ("int8", "int8-fast", "off"),
        "guidance_interval": ("0-0.5", "0.1-1", "0.2-0.8"), "guidance_mode": ("cfg-zero", "apg", "cfg"),
        "strategy": ("single", "placed", "parallel"), "text_encoder_hold": ("resident", "streamed", "auto"),
        **dict.fromkeys(("transformer_dtype", "vae_dtype", "text_encoder_dtype"), ("float32", "bfloat16", "float16")),
        "weights": ("q8", "bf16", "auto"),
        **dict.fromkeys(("tf32", "cache_embeddings", "low_res_first"), ("true", "false", "true")),
    }  # fmt: skip
    flag, variable, setting = special.get(option.name, ("32", "48", "64"))
    group = "video" if option in fields(VideoFlags) else "engine"

    def value(*flags: str) -> str:
        _, bound, _ = app.parse_args(["generate", "x", *flags], exit_on_error=False, print_error=False)
        found = getattr(bound.arguments[group], option.name)
        return str(found[0] if isinstance(found, tuple) else found).lower().removesuffix(".0")

    literal = (
        setting
        if setting in ("true", "false") or (setting.isdecimal() and "str" not in str(option.type))
        else repr(setting)
    )
    monkeypatch.delenv(f"WANDUET_{option.name.upper()}", raising=False)
    (work / "wanduet.toml").write_text(f"{option.name} = {literal}\n")
    assert value() == setting
    monkeypatch.setenv(f"WANDUET_{option.name.upper()}", variable)
    assert value() == variable
    assert value(f"--{option.name.replace('_', '-')}={flag}") == flag


def test_an_output_at_home(wanduet, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a settings file no shell has replaced the `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (work / "wanduet.toml").write_text('output = "~/x.mp4"\n')
    assert wanduet(*DRY).json["output"] == str(tmp_path / "x.mp4")
    assert "home directory" in wanduet(*DRY, "-o", "~nobody-of-this-name/x.mp4").error


def test_the_same_order_for_what_is_true_or_false(wanduet, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tf32(*flags: str) -> bool:
        choices = wanduet("plan", "--model", "miniature", "--json", *flags).json["choices"]
        return next(c["value"] for c in choices if c["setting"] == "tf32")

    assert tf32() is True
    (work / "wanduet.toml").write_text("tf32 = false\n")
    assert tf32() is False
    monkeypatch.setenv("WANDUET_TF32", "true")
    assert tf32() is True
    assert tf32("--no-tf32") is False
    monkeypatch.setenv("WANDUET_TF32", "0")
    assert tf32() is False
    assert tf32("--tf32") is True


def test_model_from_environment_and_file(wanduet, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (work / "wanduet.toml").write_text('model = "random:1.3b"\nseed = 7\n"guidance-scale" = 2.5\n')
    settings = wanduet("generate", "x", "--dry-run", "--json").json["settings"]
    assert (settings["height"], settings["seed"], settings["guidance_scale"]) == (480, 7, 2.5)
    monkeypatch.setenv("WANDUET_MODEL", "miniature")
    assert wanduet("generate", "x", "--dry-run", "--json").json["settings"]["height"] == 96


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("garbage [", "wanduet.toml is no TOML"),
        ("num_frames = 'x'", "num_frames"),
        ("num_frames = [1, 2]", "num_frames"),
        ("seed = 1.5", "whole number"),
        ("tf32 = 'perhaps'", "tf32"),
        ("num_frame = 9", "Did you mean num_frames?"),
        ("[video]\nnum_frames = 9", "without sections"),
        ("[generate]\nnum_frames = 9", "without sections"),
    ],
)
def test_a_settings_file_that_is_wrong(wanduet, work: Path, text: str, words: str) -> None:
    (work / "wanduet.toml").write_text(text)
    ran = wanduet(*DRY)
    assert ran.code == 2
    assert words in ran.error


def test_a_settings_file_that_cannot_be_read(wanduet, work: Path) -> None:
    (work / "wanduet.toml").write_bytes(b"\xff\x00")
    assert wanduet(*DRY).code == 2
    (work / "wanduet.toml").unlink()
    (work / "wanduet.toml").mkdir()
    ran = wanduet(*DRY)
    assert ran.code == 2
    assert "wanduet.toml cannot be read" in ran.error


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_settings_file_as_windows_writes_it(wanduet, work: Path, encoding: str) -> None:
    (work / "wanduet.toml").write_text("negative_prompt = '模糊'\r\nsteps = 3\r\n", encoding=encoding)
    settings = wanduet(*DRY).json["settings"]
    assert (settings["negative_prompt"], settings["num_inference_steps"]) == ("模糊", 3)


@pytest.mark.parametrize(("name", "text"), [("TF32", "maybe"), ("NUM_FRAMES", ""), ("STRATEGY", "x")])
def test_an_environment_that_is_wrong(wanduet, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    monkeypatch.setenv(f"WANDUET_{name}", text)
    ran = wanduet(*DRY)
    assert ran.code == 2
    assert f"WANDUET_{name}" in ran.error


@pytest.mark.parametrize("how", ["flag", "environment", "file"])
def test_json_is_wanted_by_flag_environment_or_file(
    wanduet, work: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "environment":
        monkeypatch.setenv("WANDUET_JSON", "1")
    elif how == "file":
        (work / "wanduet.toml").write_text("json = true")
    flags = ["--json"] if how == "flag" else []
    base = ["generate", "x", "--model", "miniature", "--dry-run"]
    assert wanduet(*base, *flags).json["output"] == "x.mp4"
    assert wanduet(*base, *flags, "--num-frames", "6").json["error"]["code"] == "invalid_request"
    if how != "flag":
        ran = wanduet(*base, "--no-json", "--num-frames", "6")
        assert (ran.code, ran.out) == (2, "")


def test_a_plan_needs_no_network_and_no_weights(wanduet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    ran = wanduet("plan", "--json", "--hardware", "2x24GiB", "--resolution", "480x288", "--num-frames", "9")
    assert ran.code == 0
    assert {d["name"] for d in ran.json["devices"]} >= {"cuda:0"}
    assert "published shapes" in ran.err
    plans = [ran.json, wanduet("generate", "x", "--dry-run", "--json").json["plan"]]
    reasons = [next(c["why"] for c in plan["choices"] if c["setting"] == "text_encoder_hold") for plan in plans]
    assert all("random" not in why for why in reasons)  # it is the published model that is planned
    unknown = wanduet("plan", "--json", "--model", "foo/bar")
    assert unknown.code == 1
    assert "wanduet download --model foo/bar" in unknown.error
    assert not (tmp_path / "hub").exists()


def test_a_plan_that_does_not_fit_exits_with_1(wanduet) -> None:
    small = ("--model", "miniature", "--ram-limit", "1MiB", "--resolution", "16x16", "--num-frames", "1", "--json")
    ran = wanduet("plan", *small)
    assert ran.code == 1
    assert ran.json["fits"] is False
    refused = wanduet("generate", "x", *small)
    assert refused.code == 1
    assert refused.json["error"]["code"] == "does_not_fit"


def test_no_network_and_nothing_cached(wanduet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    one, several = "foo/bar", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"  # forms
    for arguments in (["generate", "x", one], ["encode", "x", one], ["download", one], ["download", several]):
        ran = wanduet(*arguments[:-1], "--model", arguments[-1], "--json")
        assert ran.code == 1
        assert "cannot be fetched" in ran.error
        assert ran.json["error"]["code"] == "model_not_found"
    assert "not in the cache" in wanduet("inspect", "a prompt", "--model", "foo/bar", "--json").error


def test_cpu_threads_do_not_spin_for_long(wanduet, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    wanduet("plan", "--num-frames", "2")  # refused; but the environment is set before anything imports torch
    assert int(os.environ["GOMP_SPINCOUNT"]) <= 1000
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    wanduet("plan", "--num-frames", "2")
    assert "GOMP_SPINCOUNT" not in os.environ  # somebody has decided


def test_an_unexpected_error_is_one_object_and_a_trace_on_stderr(wanduet, monkeypatch: pytest.MonkeyPatch) -> None:
    from wanduet.engine import tools

    def broken(*_: object) -> None:
        raise RuntimeError("the dog ate it\nsecond line")

    monkeypatch.setattr(tools, "doctor", broken)
    ran = wanduet("doctor", "--json")
    assert ran.code == 1
    assert ran.json["error"]["code"] == "internal_error"
    assert "the dog ate it" in ran.json["error"]["message"]
    assert "Traceback" in ran.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_cannot_be_printed(tmp_path: Path) -> None:
    code = "from wanduet.doors.cli.main import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "download", "--model", "random:1.3b", "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        )  # fmt: skip
    assert done.returncode == 1
    assert "cannot be printed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_messages_that_nobody_takes_end_no_work(tmp_path: Path) -> None:
    code = "from wanduet.doors.cli.main import main; main()"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "plan", "--num-frames", "5", "--resolution", "96x96", "--json"],
            stdout=subprocess.PIPE, stderr=full, text=True, cwd=tmp_path, env=environment,
        )  # fmt: skip
    assert done.returncode == 0
    assert json.loads(done.stdout)["fits"] in (True, False)


def test_a_console_of_another_encoding_gets_whole_json(tmp_path: Path) -> None:
    code = "from wanduet.doors.cli.run import emit; emit({'prompt': '红色 é'}, True)"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, cwd=tmp_path)
    assert done.stdout.strip() == rb'{"prompt": "\u7ea2\u8272 \u00e9"}'
