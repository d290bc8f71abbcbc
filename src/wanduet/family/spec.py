"""The shapes of a model as frozen dataclasses, and the checks of the config files from which they are read. Does not
import torch.

A spec contains all that memory planning and initialisation on the meta device need of a model. The classes have no
defaults: the values of each published model are rows of data (`wan21.py`), and a checkpoint's config changes such a row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

from wanduet.errors import ModelNotFoundError
from wanduet.untrusted import cut

SUPPORTED = "wanduet runs Wan2.1 text-to-video checkpoints in the Diffusers layout."

# Upper limits of a config's values. Published models have at most 40 layers and a vocabulary of 256,384. With 10**9
# layers, planning and building on the meta device would take days.
LARGEST = 2**20
MOST = {"num_layers": 256, "num_res_blocks": 64, "dim_mult": 64, "patch_size": 16, "z_dim": 1024}
MOST_ENTRIES, MOST_FLOATS, MOST_CHARACTERS = 8, 1024, 2**16


SelfAttention = Literal["dense", "vsa", "sla"]
NOT_IN_CONFIG = ("attention", "key_share")  # fields of TransformerSpec that only the tensors' names show


@dataclass(frozen=True, slots=True)
class TransformerSpec:
    """Shapes of the transformer (transformer/config.json), and its self-attention, which the config does not say.

    `attention`: "dense" reads all keys; "vsa" and "sla" (`models.dit.trained_sparse`) have a module of their own, and read
    the share `key_share` of the key blocks.
    """

    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    patch_size: tuple[int, int, int]
    eps: float
    rope_max_seq_len: int
    attention: SelfAttention = "dense"
    key_share: float = 1.0

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    def with_config(self, config: Mapping[str, Any]) -> Self:
        """Return this spec with the entries of a Diffusers `WanTransformer3DModel` config.

        Raises ModelNotFoundError for image-conditioned variants.
        """
        _require(
            "transformer",
            config,
            {
                "image_dim": None,
                "added_kv_proj_dim": None,
                "pos_embed_seq_len": None,
                "qk_norm": "rms_norm_across_heads",
                "cross_attn_norm": True,
            },
        )
        shapes = {name: value for name, value in config.items() if name not in NOT_IN_CONFIG}
        return replace(self, **_pick(type(self), shapes))


@dataclass(frozen=True, slots=True)
class VAESpec:
    """Shapes of the causal video VAE (vae/config.json).

    `latents_mean` and `latents_std`: one value a latent channel. The decoder's input is z * std + mean; without it,
    colours are wrong.
    """

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]  # spelled as in the checkpoints
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent row or column (8 for Wan2.1)."""
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame (4 for Wan2.1); the first latent frame gives only one frame."""
        return int(2 ** sum(self.temperal_downsample))

    def with_config(self, config: Mapping[str, Any]) -> Self:
        """Return this spec with the entries of a Diffusers `AutoencoderKLWan` config.

        Raises ModelNotFoundError for Wan2.2's residual variant.
        """
        _require(
            "vae",
            config,
            {"is_residual": False, "attn_scales": [], "dropout": 0.0, "in_channels": 3, "out_channels": 3,
             "patch_size": None, "decoder_base_dim": None},
        )  # fmt: skip
        return replace(self, **_pick(type(self), config))


@dataclass(frozen=True, slots=True)
class TextEncoderSpec:
    """Shapes of the UMT5 encoder (text_encoder/config.json)."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int

    def with_config(self, config: Mapping[str, Any]) -> Self:
        """Return this spec with the entries of a transformers `UMT5EncoderModel` config."""
        return replace(self, **_pick(type(self), config))


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The values for fields of a request that are None. Sizes in pixels."""

    height: int
    width: int
    num_frames: int
    fps: int
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    negative_prompt: str
    sampler: str
    timesteps: tuple[float, ...]  # those that few-step weights are distilled for; () for other weights
    of_lora: bool = False  # a few-step LoRA brings them: its strength and its steps are the request's own

    @property
    def of_distilled_weights(self) -> bool:
        """Whether the weights themselves are distilled for few steps, whatever LoRA is added."""
        return bool(self.timesteps) and not self.of_lora

    def with_config(self, config: Mapping[str, Any]) -> Self:
        """Return these defaults with the entries of `generation_defaults.json`.

        It is an optional file of wanduet's at the root of a model folder.
        """
        return replace(self, **_pick(type(self), config))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shapes and defaults of one text-to-video model.

    `text_len`: tokens in cross-attention; shorter prompts are zero-padded to it.
    """

    name: str
    transformer: TransformerSpec
    vae: VAESpec
    text_encoder: TextEncoderSpec
    defaults: GenerationDefaults
    text_len: int

    @property
    def size_multiple(self) -> int:
        """The number of which a generated height and width must be multiples (16 for Wan2.1)."""
        return self.vae.spatial_stride * self.transformer.patch_size[1]

    def latent_shape(self, height: int, width: int, num_frames: int) -> tuple[int, int, int, int]:
        """Return `(channels, frames, rows, columns)` of the latents for a *generated* size in pixels."""
        return (
            self.vae.z_dim,
            (num_frames - 1) // self.vae.temporal_stride + 1,
            height // self.vae.spatial_stride,
            width // self.vae.spatial_stride,
        )

    def num_tokens(self, height: int, width: int, num_frames: int) -> int:
        """Return the length of the transformer's sequence for a generated size in pixels."""
        _, frames, rows, columns = self.latent_shape(height, width, num_frames)
        pt, ph, pw = self.transformer.patch_size
        return (frames // pt) * (rows // ph) * (columns // pw)


@dataclass(frozen=True, slots=True)
class Member:
    """A published model: its spec, its hub id in the Diffusers layout, and its name with random weights."""

    spec: ModelSpec
    hub_id: str
    random_name: str


Component = TransformerSpec | VAESpec | TextEncoderSpec | GenerationDefaults


def value_problems(spec: Component, known: Component) -> list[str]:
    """Return what is wrong with each value of a spec; [] if nothing is.

    A value must have the type that the same field has in `known`, a spec of the same class, and be within the limits
    above.
    """
    values = ((f.name, getattr(spec, f.name), getattr(known, f.name)) for f in fields(spec))
    return [problem for value in values if (problem := _problem(*value))]


def check_consistent(path: Path, spec: ModelSpec) -> None:
    """Check that the configs of a model's components agree. Raises ModelNotFoundError, which names `path`."""
    transformer, vae, text = spec.transformer, spec.vae, spec.text_encoder
    rules = {
        "transformer: patch_size must be [1, n, n]": transformer.patch_size
        == (1, transformer.patch_size[-1], transformer.patch_size[-1]),
        "transformer: attention_head_dim must be even, at least 6": transformer.attention_head_dim % 2 == 0
        and transformer.attention_head_dim >= 6,
        "transformer: in_channels and out_channels must be the vae's z_dim": transformer.in_channels
        == transformer.out_channels
        == vae.z_dim,
        "transformer: text_dim must be the text encoder's d_model": transformer.text_dim == text.d_model,
        "vae: temperal_downsample needs one entry less than dim_mult": len(vae.temperal_downsample)
        == len(vae.dim_mult) - 1,
        "vae: latents_mean and latents_std need one entry for each of z_dim": len(vae.latents_mean)
        == len(vae.latents_std)
        == vae.z_dim,
        "vae: latents_std must be above 0": all(std > 0 for std in vae.latents_std),
    }
    if broken := [rule for rule, is_met in rules.items() if not is_met]:
        raise ModelNotFoundError(f"The configs of {path} do not fit together: {'; '.join(broken)}.", hint=SUPPORTED)


def _pick(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Keep the entries of `config` that are fields of dataclass `cls`; lists become tuples."""
    names = {f.name for f in fields(cls)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}


def _require(component: str, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ModelNotFoundError if a config names an architecture that this project does not implement."""
    for key, value in expected.items():
        given = config.get(key, value)
        if given != value:
            raise ModelNotFoundError(
                f"{component}/config.json: {key}={given!r} is not supported (only {value!r}).", hint=SUPPORTED
            )


def _problem(name: str, value: object, known: object) -> str | None:
    """Return the problem of a config's value, by the type of `known` and the limits above; None if there is none."""
    if isinstance(known, tuple):
        kind = type(known[0]) if known else float
        if not isinstance(value, tuple) or (known and not value) or {type(v) for v in value} - _allowed(kind):
            return f"{name} must be a list of {kind.__name__}"
        if len(value) > (MOST_FLOATS if kind is float else MOST_ENTRIES):
            return f"{name} has too many entries: {len(value)}"
        numbers = [] if kind is bool else list(value)
        lowest = None if kind is float else 1
    elif isinstance(known, bool) or not isinstance(known, int | float):
        if type(value) is not type(known):
            return f"{name} must be of type {type(known).__name__}"
        return f"{name} is too long" if isinstance(value, str) and len(value) > MOST_CHARACTERS else None
    else:
        if type(value) not in _allowed(type(known)):
            return f"{name} must be a number, not {cut(repr(value))}"
        numbers, lowest = [value], 0 if isinstance(known, float) else 1
    most = MOST.get(name, LARGEST)
    if any(not -most <= n <= most or (lowest is not None and n < lowest) for n in numbers):
        return f"{name}={cut(repr(value))} is out of range"
    return None


def _allowed(kind: type) -> set[type]:
    return {int, float} if kind is float else {kind}
