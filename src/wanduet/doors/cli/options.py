"""The command line's flags, one field each: what a video shows, and how it is made.

Precedence: flag, then `WANDUET_*` environment, then `wanduet.toml`, then default.
"""

import codecs
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, ArgumentCollection, Group, Parameter, Token
from cyclopts.config import Toml

from wanduet.config import DType, EngineConfig, Strategy, TextEncoderHold, parse_bytes, parse_speeds
from wanduet.errors import ConfigError, InvalidRequestError
from wanduet.family.specs import DEFAULT_MODEL, WAN_1_3B, ModelSpec
from wanduet.request import (
    SAMPLERS,
    GenerationRequest,
    SamplerName,
    check_prompt_length,
    frames_for_seconds,
    parse_resolution,
)
from wanduet.untrusted import read_file

VIDEO = Group("Video", sort_key=1)
ENGINE = Group("Engine", sort_key=2)
SETTINGS_FILE = "wanduet.toml"
SAMPLER_HELP = "The solver: " + "; ".join(f"{name}: {meaning}" for name, meaning in SAMPLERS.items()) + "."
# The default as an object of its own: so it is seen whether somebody has named the default model.
_NOBODYS_MODEL = "".join(list(DEFAULT_MODEL))


class Settings(Toml):
    """`wanduet.toml`, also as Windows' editors and shell write it."""

    def _load_config(self, path: Path) -> dict[str, Any]:
        return parse_settings(path)


def parse_settings(path: Path) -> dict[str, Any]:
    """A settings file's content. Raises OSError, ValueError."""
    try:
        return tomllib.loads(decoded(read_file(path)))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


# Two ways to say one thing.
ALTERNATIVES = (({"resolution"}, {"height", "width"}), ({"seconds"}, {"num-frames"}))
_RANKS = {"cli": 0, "env": 1}  # a settings file's tokens have its path


def drop_overruled(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """A flag wins over the environment and the file also where they say the same in another way.

    Called by cyclopts after all sources are read; both ways in one source stay, and are refused.
    """
    for sides in ALTERNATIVES:
        found = [[a for a in arguments if a.tokens and side & {name.lstrip("-") for name in a.names}] for side in sides]
        ranks = [min((_RANKS.get(t.source, 2) for a in side for t in a.tokens), default=9) for side in found]
        for side, rank in zip(found, ranks, strict=True):
            for argument in side if rank > min(ranks) else ():
                argument.tokens.clear()


def decoded(data: bytes) -> str:
    """Text in UTF-8, or in what its first bytes say. Raises ValueError."""
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return data.decode("utf-16" if wide else "utf-8-sig")


def whole(kind: Any, tokens: Sequence[Token]) -> int:
    """A flag's text as a whole number; cyclopts itself would round `2.7`. Raises ValueError."""
    text = tokens[0].value.strip()
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"a whole number is needed, not {text[:40]!r}") from None


@Parameter(name="*", group=VIDEO)
@dataclass(frozen=True, slots=True)
class VideoFlags:
    """What the video shows."""

    negative_prompt: Annotated[
        str | None, Parameter(help="What the video should not show; '' for nothing. Default: the model's.")
    ] = None
    num_frames: Annotated[
        int | None, Parameter(help="Number of frames, 4n+1. Default: the model's, 81 for Wan2.1.", converter=whole)
    ] = None
    seconds: Annotated[float | None, Parameter(help="Length of the video, instead of --num-frames.")] = None
    resolution: Annotated[str | None, Parameter(help="480p, 720p, 1080p or WIDTHxHEIGHT.")] = None
    height: Annotated[
        int | None, Parameter(help="In pixels, a multiple of 16. Default: the model's.", converter=whole)
    ] = None
    width: Annotated[
        int | None, Parameter(help="In pixels, a multiple of 16. Default: the model's.", converter=whole)
    ] = None
    num_inference_steps: Annotated[
        int | None,
        Parameter(
            name=["--num-inference-steps", "--steps"],
            help="Number of denoising steps. Default: the model's, 50 for Wan2.1.",
            converter=whole,
        ),
    ] = None
    guidance_scale: Annotated[
        float | None, Parameter(help="How closely the prompt is followed; 1 turns guidance off, and halves the time.")
    ] = None
    flow_shift: Annotated[
        float | None, Parameter(help="Higher values spend more steps on the layout, lower ones on details.")
    ] = None
    sampler: Annotated[SamplerName | None, Parameter(help=SAMPLER_HELP)] = None
    seed: Annotated[
        int | None, Parameter(help="The same seed and settings give the same video. Default: random.", converter=whole)
    ] = None
    fps: Annotated[int | None, Parameter(help="Frames per second of the file.", converter=whole)] = None
    num_videos_per_prompt: Annotated[
        int | None, Parameter(help="Number of videos, with consecutive seeds.", converter=whole)
    ] = None

    def request(self, prompt: str, spec: ModelSpec | None = None) -> GenerationRequest:
        """The request that was typed; `spec` is the model's, where it is known. Raises InvalidRequestError."""
        names = (
            "negative_prompt", "num_frames", "height", "width", "num_inference_steps", "guidance_scale",
            "flow_shift", "sampler", "seed", "fps", "num_videos_per_prompt",
        )  # fmt: skip
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.resolution is not None:
            if self.height is not None or self.width is not None:
                raise InvalidRequestError("resolution", self.resolution, "either --resolution or --height and --width")
            try:
                values["height"], values["width"] = parse_resolution(self.resolution)
            except ValueError:  # digits that int() does not take: ², or thousands of them
                raise InvalidRequestError("resolution", self.resolution[:40], "for example 480p or 832x480") from None
        if self.seconds is not None:
            if self.num_frames is not None:
                raise InvalidRequestError("seconds", self.seconds, "either --seconds or --num-frames")
            if not 0 < self.seconds <= 3600:
                raise InvalidRequestError("seconds", self.seconds, "more than 0, at most 3600")
            known = spec or WAN_1_3B
            fps, stride = self.fps or known.defaults.fps, known.vae.temporal_stride
            values["num_frames"] = frames_for_seconds(self.seconds, fps, stride)
        return typed_request(prompt=prompt, **values)


def typed_request(**values: Any) -> GenerationRequest:
    """A request of fields that somebody typed. Raises InvalidRequestError, also for prompts that the server refuses as
    too long."""
    request = GenerationRequest.parse(**values)
    for name in ("prompt", "negative_prompt"):
        check_prompt_length(name, getattr(request, name) or "")
    return request


@Parameter(name="*", group=ENGINE)
@dataclass(frozen=True, slots=True)
class EngineFlags:
    """How it is made."""

    model: Annotated[
        str,
        Parameter(
            name=["--model", "--model-path"],
            help="A folder in the layout of diffusers, a Hugging Face id, `miniature`, or `random:1.3b`.",
        ),
    ] = _NOBODYS_MODEL
    revision: Annotated[str | None, Parameter(help="Commit, branch or tag on Hugging Face.")] = None
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
    speeds: Annotated[
        str | None, Parameter(help="Relative speeds of --devices, for example 2,1. Default: measured.")
    ] = None
    vram_limit: Annotated[str | None, Parameter(help="Most memory to use of each GPU, for example 12GiB.")] = None
    ram_limit: Annotated[str | None, Parameter(help="Most host memory to use.")] = None
    transformer_dtype: Annotated[
        DType, Parameter(help="What the transformer computes in. Default: bfloat16 on a GPU.")
    ] = "auto"
    vae_dtype: Annotated[DType, Parameter(help="What the VAE computes in. Default: float32.")] = "auto"
    text_encoder_dtype: Annotated[DType, Parameter(help="What the text encoder computes in.")] = "auto"
    text_encoder_hold: Annotated[
        TextEncoderHold, Parameter(help="Keep the text encoder in memory, or read it layer by layer.")
    ] = "auto"
    tf32: Annotated[
        bool, Parameter(help="Allow TF32 in the VAE's float32 convolutions: faster, slightly less precise.")
    ] = True
    attention: Annotated[str, Parameter(help="Attention back end. Default: the fastest exact one, measured once.")] = (
        "auto"
    )
    cache_embeddings: Annotated[bool, Parameter(help="Keep encoded prompts on disk.")] = True
    checkpoint_seconds: Annotated[float, Parameter(help="How often denoising is saved, in seconds.")] = 15.0
    data_dir: Annotated[Path | None, Parameter(help="Folder of jobs, videos and caches.")] = None

    @property
    def names_model(self) -> bool:
        """Whether somebody named the model, be it the default's own name."""
        return self.model is not _NOBODYS_MODEL

    def config(self) -> EngineConfig:
        """The engine's settings. Raises ConfigError."""
        if not 0 <= self.checkpoint_seconds < float("inf"):
            raise ConfigError(f"checkpoint_seconds={self.checkpoint_seconds}: it must be 0 or more.")
        return EngineConfig(
            model=self.model,
            revision=self.revision,
            strategy=self.strategy,
            devices=self.devices,
            speeds=None if self.speeds is None else parse_speeds(self.speeds),
            transformer_dtype=self.transformer_dtype,
            vae_dtype=self.vae_dtype,
            text_encoder_dtype=self.text_encoder_dtype,
            text_encoder_hold=self.text_encoder_hold,
            tf32=self.tf32,
            vram_limit=None if self.vram_limit is None else parse_bytes(self.vram_limit),
            ram_limit=None if self.ram_limit is None else parse_bytes(self.ram_limit),
            attention=self.attention,
            cache_embeddings=self.cache_embeddings,
            checkpoint_seconds=self.checkpoint_seconds,
            data_dir=None if self.data_dir is None else _home(self.data_dir),
        )


def _home(path: Path) -> Path:
    """`~/x` from a settings file or the environment, where no shell has replaced it; absolute, for the current folder
    may be gone later. Raises ConfigError."""
    try:
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise ConfigError(f"data_dir={str(path)!r}: {str(error).rstrip('.')}.") from error
