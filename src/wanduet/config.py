"""The engine's settings: model, devices, precision, memory limits. They are separate from the request because they
determine how a video is made, not what it shows."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from wanduet.errors import ConfigError
from wanduet.family.registry import DEFAULT_MODEL, RANDOM_SPECS

Strategy = Literal["auto", "single", "placed", "parallel"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
Weights = Literal["auto", "bf16", "q8", "fp8"]
TextDType = Literal["auto", "float32", "bfloat16", "float16", "q8", "fp8"]
TextEncoderResidency = Literal["auto", "resident", "streamed"]
ROLES = ("vae", "transformer", "text_encoder")

GIB = 2**30


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of an engine. With `None` or "auto", the planner chooses."""

    model: str = DEFAULT_MODEL  # a folder in the Diffusers or the official layout, a file, a hub id, `miniature`, `miniature-fast`, `random:1.3b`
    revision: str | None = None
    # Files of any layout, or folders with a config, that take the place of the model's own components.
    transformer: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None  # also a file with a SentencePiece model
    strategy: Strategy = "auto"
    devices: str | None = None  # "cuda:0,cuda:1", "vae=cuda:0,transformer=cuda:1", "cpu"
    device_speeds: tuple[float, ...] | None = None  # relative, of `devices`, for strategy parallel; None: measured
    transformer_dtype: DType = "auto"  # auto: bfloat16 on a GPU, float32 on a CPU
    # How the matrices of the transformer's blocks are in memory; products are computed in transformer_dtype in any case.
    # auto: in transformer_dtype. bf16: in at most 16 bits. q8, fp8: 8 bits and a scale for each row
    # (kernels/dit/weight.py).
    weights: Weights = "auto"
    vae_dtype: DType = "auto"  # auto: float32
    text_encoder_dtype: TextDType = "auto"  # q8, fp8: matrices in 8 bits in memory, computed in bfloat16
    text_encoder_hold: TextEncoderResidency = "auto"
    text_encoder_device: str = "auto"  # "cpu", "cuda:0"; auto: the CPU, or for less work a GPU with room
    tf32: bool = True  # TF32 in the VAE's float32 convolutions (never in the transformer's float32 parts)
    vram_limit: int | None = None  # bytes per device
    ram_limit: int | None = None  # bytes of host memory
    attention: str = "auto"  # name of a back end; auto: the fastest one measured
    cache_embeddings: bool = True
    checkpoint_seconds: float = 15.0  # between checkpoints: what a killed process loses at most
    data_dir: Path | None = None
    lora_dir: Path | None = None  # the folder whose files requests name as LoRAs; None: they name any path

    def __post_init__(self) -> None:
        """Check the settings. Raises ConfigError."""
        if not self.model:
            raise ConfigError("The model must not be empty.", hint="Try --model miniature.")
        if self.files and self.model in RANDOM_SPECS:
            raise ConfigError(f"{self.model} has random weights, beside which no files can be used.")
        for name in ("vram_limit", "ram_limit"):
            limit = getattr(self, name)
            if limit is not None and limit <= 0:
                raise ConfigError(f"{name}={limit} leaves no memory.", hint="Examples: 24GiB, 11.5GiB, 800MiB.")
        if self.weights not in get_args(Weights):
            raise ConfigError(
                f"weights={self.weights!r} is no format of weights in memory.",
                hint=f"Formats: {', '.join(get_args(Weights))}. fp8 takes as many bytes as q8, and is less precise.",
            )
        if self.text_encoder_dtype not in get_args(TextDType):
            raise ConfigError(
                f"text_encoder_dtype={self.text_encoder_dtype!r} is no dtype of the text encoder.",
                hint=f"Dtypes: {', '.join(get_args(TextDType))}.",
            )
        if self.text_encoder_device != "auto" and not re.fullmatch(r"cpu|cuda(:\d+)?", self.text_encoder_device):
            raise ConfigError(
                f"text_encoder_device={self.text_encoder_device!r} is no device for the text encoder.",
                hint="Examples: auto · cpu · cuda:0",
            )
        devices = parse_devices(self.devices)
        speeds = self.device_speeds
        if speeds is not None and (min(speeds, default=0) <= 0 or len(speeds) != len(devices.names)):
            raise ConfigError(f"device_speeds={speeds} must be a positive number for each of --devices.")

    @property
    def files(self) -> dict[str, Path]:
        """The files that take the place of the model's own components, by component."""
        named = {name: getattr(self, name) for name in ("transformer", "vae", "text_encoder", "tokenizer")}
        return {name: Path(path) for name, path in named.items() if path is not None}

    @property
    def data_folder(self) -> Path:
        """The folder for jobs, videos and caches: `data_dir`, `WANDUET_DATA_DIR` or the platform's user data folder."""
        if self.data_dir is not None:
            return Path(self.data_dir)  # from Python, also text
        if given := os.environ.get("WANDUET_DATA_DIR"):
            return Path(given)
        from platformdirs import user_data_dir

        return Path(user_data_dir("wanduet", appauthor=False))


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """The parsed value of `--devices`: devices in order, and the roles given to them."""

    names: tuple[str, ...] = ()
    roles: tuple[tuple[str, str], ...] = ()  # (role, device)

    def role(self, name: str) -> str | None:
        """Return the device given for a role, or None."""
        return dict(self.roles).get(name)


def parse_devices(text: str | None) -> DeviceRequest:
    """Parse `cuda:0,cuda:1`, `vae=cuda:0,transformer=cuda:1` or `cpu,cpu`; None gives no devices. Raises
    ConfigError."""
    if text is None or not text.strip():
        return DeviceRequest()
    parts = [part.strip() for part in text.split(",")]
    pairs = [part.split("=", 1) for part in parts if "=" in part]
    if pairs and len(pairs) != len(parts):
        raise ConfigError(f"devices={text!r}: name a role for every device, or for none.")
    names = [pair[1].strip() for pair in pairs] if pairs else parts
    for name in names:
        if not re.fullmatch(r"cpu|mps|(cuda|xpu)(:\d+)?", name):
            raise ConfigError(
                f"devices={text!r}: {name!r} is no device.",
                hint="Examples: cuda:0 · cuda:0,cuda:1 · vae=cuda:0,transformer=cuda:1 · cpu",
            )
    roles = tuple((pair[0].strip(), name) for pair, name in zip(pairs, names, strict=False))
    for role, _ in roles:
        if role not in ROLES:
            raise ConfigError(f"devices={text!r}: {role!r} is no role.", hint=f"Roles: {', '.join(ROLES)}.")
    if len({role for role, _ in roles}) != len(roles):
        raise ConfigError(f"devices={text!r}: a role is named twice.")
    return DeviceRequest(tuple(dict.fromkeys(names)) if pairs else tuple(names), roles)


def parse_bytes(text: str | int) -> int:
    """Parse `24GiB`, `24GB`, `24G`, `512MiB` or a number of bytes. GB means 10**9, G and GiB 2**30. Raises
    ConfigError."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?B?)\s*", text, re.IGNORECASE | re.ASCII)
    if not match:
        raise ConfigError(f"{text!r} is no amount of memory.", hint="Examples: 24GiB, 11.5GiB, 800MiB.")
    number, prefix, suffix = match.groups()
    if not prefix and not suffix and 0 < float(number) < 1024:
        raise ConfigError(f"{text.strip()} bytes of memory are not meant.", hint=f"Say the unit: {text.strip()}GiB.")
    power = " KMGT".index(prefix.upper()) if prefix else 0
    base = 1000 if prefix and suffix.upper() == "B" else 1024
    return int(float(number) * base**power)


def format_bytes(count: int) -> str:
    """Format bytes for people: `3.42 GiB`, `189 MiB`, `52 KiB`."""
    if 0 < count < 2**20:
        return f"{count / 1024:.0f} KiB"
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def format_seconds(seconds: float) -> str:
    """Format seconds for people: `42 s`, `13 min`, `6.2 h`, `13 days`."""
    for unit, length in (("days", 48 * 3600), ("h", 2 * 3600), ("min", 120)):
        if seconds >= length:
            number = seconds / (24 * 3600 if unit == "days" else length / 2)
            return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"
    return f"{seconds:.0f} s"


def parse_speeds(text: str) -> tuple[float, ...]:
    """Parse `2,1` to numbers. Raises ConfigError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(
            f"device_speeds={text!r} is no list of numbers.", hint="Example: --device-speeds 2,1"
        ) from None
