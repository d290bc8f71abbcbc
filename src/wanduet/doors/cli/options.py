"""The command line's flags: one field each for what a video shows, and for how it is made.

Precedence: flag, then `WANDUET_*` environment, then `wanduet.toml`, then default.
"""

import codecs
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, ArgumentCollection, Group, Parameter, Token
from cyclopts.config import Toml

from wanduet.config import (
    DType,
    EngineConfig,
    Strategy,
    TextDType,
    TextEncoderResidency,
    Weights,
    parse_bytes,
    parse_speeds,
)
from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.family.registry import DEFAULT_MODEL
from wanduet.family.sizes import frames_for_seconds, parse_resolution
from wanduet.family.spec import ModelSpec
from wanduet.family.speeds import CHOSEN, FIELDS
from wanduet.family.wan21 import WAN_1_3B
from wanduet.request import (
    APPROXIMATIONS,
    REQUEST_FIELDS,
    GenerationRequest,
    check_prompt_length,
)
from wanduet.untrusted import read_file

VIDEO = Group("Video", sort_key=1)
SPEED = Group("Speed, at a loss", sort_key=2)
MODEL = Group("Model", sort_key=3)
ENGINE = Group("Engine", sort_key=4)
SETTINGS_FILE = "wanduet.toml"
RENAMED = {"speeds": "device-speeds"}  # flags by their names in version 0.1
# A distinct object with the default's value, to detect whether the user named the default model.
_UNSET_MODEL = "".join(list(DEFAULT_MODEL))


class Settings(Toml):
    """Reads `wanduet.toml`, also in the encodings of Windows' editors and shell."""

    def _load_config(self, path: Path) -> dict[str, Any]:
        return parse_settings(path)


def parse_settings(path: Path) -> dict[str, Any]:
    """Return a settings file's content. Raises OSError, ValueError."""
    try:
        return tomllib.loads(decoded(read_file(path)))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


# Pairs of flags that set the same thing, or of which one sets the other.
ALTERNATIVES = (
    ({"resolution"}, {"height", "width"}),
    ({"seconds"}, {"num-frames"}),
    ({"speed"}, {name.replace("_", "-") for name in CHOSEN}),
    *(
        ({name.replace("_", "-")}, {other.replace("_", "-")})
        for name, field in REQUEST_FIELDS.items()
        for other in field.shown.replaces
    ),
)
_RANKS = {"cli": 0, "env": 1}  # the source of a settings file's tokens is its path


def drop_overruled(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Let a flag override the environment and the file, also if they use an alternative of it.

    Cyclopts calls it after reading all sources. If one source has both alternatives, both stay, and are refused later.
    """
    for sides in ALTERNATIVES:
        found = [[a for a in arguments if a.tokens and side & {name.lstrip("-") for name in a.names}] for side in sides]
        ranks = [min((_RANKS.get(t.source, 2) for a in side for t in a.tokens), default=9) for side in found]
        for side, rank in zip(found, ranks, strict=True):
            for argument in side if rank > min(ranks) else ():
                argument.tokens.clear()


def decoded(data: bytes) -> str:
    """Decode UTF-8, or the encoding that a byte order mark names. Raises ValueError."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig")


def whole(kind: Any, tokens: Sequence[Token]) -> int:
    """Parse a flag as an int; cyclopts itself would round `2.7`. Raises ValueError."""
    text = tokens[0].value.strip()
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"a whole number is needed, not {text[:40]!r}") from None


# Alternative flags that set one or two fields, each with the field after which the help lists it.
_SHORTHANDS: tuple[tuple[str, str, Any], ...] = (
    (
        "num_frames",
        "seconds",
        Annotated[float, Parameter(help="Length of the video, instead of --num-frames, for example 5.")],
    ),
    (
        "num_frames",
        "resolution",
        Annotated[str, Parameter(help="480p, 720p, 1080p or WIDTHxHEIGHT. Default: the model's, 832x480 for Wan2.1.")],
    ),
)


LoraFlags = Annotated[
    tuple[str, ...],
    Parameter(
        help="A LoRA to merge into the weights: FILE[:STRENGTH[@FROM-TO]], for example style.safetensors:0.8, or :1@0-0.5 for "
        "the first half of the steps. Give it once for each.",
        negative="",
    ),
]


def _video_flags() -> Iterator[tuple[str, Any, None]]:
    """Yield name, type and default (None) of a video's flags: for each field except the prompt, and alternatives."""
    for name, field in REQUEST_FIELDS.items():
        if not field.is_required:
            converter = whole if field.kind is int else None
            group = SPEED if name in (*FIELDS, *APPROXIMATIONS) else VIDEO
            flag = Parameter(help=field.help, alias=field.shown.aliases, converter=converter, group=group)
            yield name, Annotated[str if field.is_list else field.kind, flag] | None, None
        yield from ((shorthand, kind | None, None) for after, shorthand, kind in _SHORTHANDS if after == name)
    yield "lora", LoraFlags | None, None


@Parameter(name="*", group=VIDEO)
class VideoFlags(make_dataclass("VideoFlags", _video_flags(), frozen=True, slots=True)):  # type: ignore[misc]
    """Flags of the video. A field is None unless it is set."""

    __slots__ = ()

    def request(self, prompt: str, spec: ModelSpec | None = None) -> GenerationRequest:
        """Return the request that the flags describe; `spec` is the model's, if known. Raises InvalidRequestError."""
        values = {name: value for name in REQUEST_FIELDS if (value := getattr(self, name, None)) is not None}
        if self.resolution is not None:
            if self.height is not None or self.width is not None:
                raise InvalidRequestError("resolution", self.resolution, "either --resolution or --height and --width")
            try:
                values["height"], values["width"] = parse_resolution(self.resolution)
            except ValueError:  # digits that int() refuses: ², or thousands of them
                raise InvalidRequestError("resolution", self.resolution[:40], "for example 480p or 832x480") from None
        if self.seconds is not None:
            if self.num_frames is not None:
                raise InvalidRequestError("seconds", self.seconds, "either --seconds or --num-frames")
            if not 0 < self.seconds <= 3600:
                raise InvalidRequestError("seconds", self.seconds, "more than 0, at most 3600")
            known = spec or WAN_1_3B
            fps, stride = self.fps or known.defaults.fps, known.vae.temporal_stride
            values["num_frames"] = frames_for_seconds(self.seconds, fps, stride)
        if self.lora:
            values["loras"] = self.lora
        return typed_request(prompt=prompt, **values)


def typed_request(**values: Any) -> GenerationRequest:
    """Return a request of fields that a user typed.

    Raises InvalidRequestError, also for prompts that exceed the server's limit.
    """
    request = GenerationRequest.parse(**values)
    for name in ("prompt", "negative_prompt"):
        check_prompt_length(name, getattr(request, name) or "")
    return request


@Parameter(name="*", group=ENGINE)
@dataclass(frozen=True, slots=True)
class EngineFlags:
    """Flags of the engine: model, devices, memory, precision and the like."""

    model: Annotated[
        str,
        Parameter(
            name=["--model", "--model-path"],
            group=MODEL,
            help="A folder in the layout of diffusers or of Wan's repositories, a file of a transformer, a Hugging Face id, "
            "`miniature`, `miniature-fast`, or `random:1.3b`.",
        ),
    ] = _UNSET_MODEL
    revision: Annotated[str | None, Parameter(help="Commit, branch or tag on Hugging Face.", group=MODEL)] = None
    transformer: Annotated[
        Path | None,
        Parameter(
            help="A file with the transformer, in place of the model's: .safetensors or .pth, official or diffusers' names.",
            group=MODEL,
        ),
    ] = None
    vae: Annotated[Path | None, Parameter(help="A file with the VAE, in place of the model's.", group=MODEL)] = None
    text_encoder: Annotated[
        Path | None, Parameter(help="A file with the text encoder UMT5-XXL, in place of the model's.", group=MODEL)
    ] = None
    tokenizer: Annotated[
        Path | None,
        Parameter(
            help="A folder with the text encoder's tokenizer. Default: the one in ComfyUI's --text-encoder, or the model's.",
            group=MODEL,
        ),
    ] = None
    strategy: Annotated[
        Strategy,
        Parameter(
            help="How GPUs share the work: one does all, one denoises and one decodes, or all denoise one video."
        ),
    ] = "auto"
    devices: Annotated[
        str | None,
        Parameter(help="Which devices to use: cuda:0,cuda:1 · vae=cuda:0,transformer=cuda:1 · cpu. Default: all GPUs."),
    ] = None
    device_speeds: Annotated[
        str | None, Parameter(help="Relative speeds of --devices, for example 2,1. Default: measured.")
    ] = None
    vram_limit: Annotated[str | None, Parameter(help="Most memory to use of each GPU, for example 12GiB.")] = None
    ram_limit: Annotated[str | None, Parameter(help="Most host memory to use.")] = None
    transformer_dtype: Annotated[
        DType, Parameter(help="What the transformer computes in. Default: bfloat16 on a GPU.")
    ] = "auto"
    weights: Annotated[
        Weights,
        Parameter(
            help="How the transformer's large matrices are in memory: as they are computed, 16 or 8 bits (q8; fp8 for weights "
            "that are stored in fp8). Saves memory, not time: products are still computed in --transformer-dtype."
        ),
    ] = "auto"
    vae_dtype: Annotated[
        DType,
        Parameter(
            help="What the VAE computes in. Default: float32. bfloat16 takes about 0.6 of the time and half the memory on newer "
            "GPUs, and changes pixels by a few levels of 255 at most."
        ),
    ] = "auto"
    text_encoder_dtype: Annotated[
        TextDType,
        Parameter(
            help="What the text encoder computes in. q8, fp8: in bfloat16, from matrices that are in memory in 8 bits, which "
            "is half the size; fp8 for a file in fp8."
        ),
    ] = "auto"
    text_encoder_hold: Annotated[
        TextEncoderResidency, Parameter(help="Keep the text encoder in memory, or read it layer by layer.")
    ] = "auto"
    text_encoder_device: Annotated[
        str,
        Parameter(
            help="Where prompts are encoded: cpu, cuda:0. Default: the CPU; for a speed or few-step weights, a GPU that "
            "has room beside the video."
        ),
    ] = "auto"
    tf32: Annotated[
        bool, Parameter(help="Allow TF32 in the VAE's float32 convolutions: faster, slightly less precise.")
    ] = True
    attention: Annotated[
        str,
        Parameter(
            help="Attention back end. Default: the fastest exact one, measured once. int8 and the less accurate int8-fast "
            "are approximate."
        ),
    ] = "auto"
    cache_embeddings: Annotated[bool, Parameter(help="Keep encoded prompts on disk.")] = True
    checkpoint_seconds: Annotated[float, Parameter(help="How often denoising is saved, in seconds.")] = 15.0
    data_dir: Annotated[Path | None, Parameter(help="Folder of jobs, videos and caches.")] = None

    @property
    def names_model(self) -> bool:
        """Whether the user named a model, even if it is the default."""
        return self.model is not _UNSET_MODEL

    def config(self) -> EngineConfig:
        """Return the engine's settings. Raises ConfigError."""
        if not 0 <= self.checkpoint_seconds < float("inf"):
            raise ConfigError(f"checkpoint_seconds={self.checkpoint_seconds}: it must be 0 or more.")
        settings = asdict(self)  # the flags have the settings' names
        for name, parse in (("device_speeds", parse_speeds), ("vram_limit", parse_bytes), ("ram_limit", parse_bytes)):
            if settings[name] is not None:
                settings[name] = parse(settings[name])
        for name in ("transformer", "vae", "text_encoder", "tokenizer", "data_dir"):
            settings[name] = _home(settings[name], name)
        return EngineConfig(**settings)


def lora_folder(given: Path | None, config: EngineConfig) -> Path:
    """Return a server's folder of LoRA: `loras` in the data folder, unless one is given, which must exist. Raises ConfigError."""
    folder = _home(given, "lora_dir")
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"lora_dir={str(folder)!r}: there is no such folder.")
    return folder or config.data_folder / "loras"


def _home(path: Path | None, name: str) -> Path | None:
    """Expand `~/x` from a settings file or the environment, which no shell expands. Raises ConfigError.

    The path becomes absolute, since the current folder may be removed later.
    """
    try:
        return None if path is None else path.expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"{name}={str(path)!r}: {str(error).rstrip('.')}.") from error
