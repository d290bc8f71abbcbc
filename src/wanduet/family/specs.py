"""The models' shapes as frozen dataclasses, read from the config files of a Diffusers checkpoint. Does not import
torch.

A spec contains all that memory planning and initialisation on the meta device need of a model. `WAN_1_3B` and `WAN_14B`
are the published Wan2.1 text-to-video models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from wanduet.errors import ModelNotFoundError

# Channel means and standard deviations of Wan2.1's latents (vae/config.json of the checkpoint).
# The decoder's input is z * std + mean; without it, colours are wrong.
WAN_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# https://github.com/Wan-Video/Wan2.1, wan/configs/shared_config.py (sample_neg_prompt): the
# negative prompt that Wan2.1 was tuned with; used if the request's is None.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


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
                f"{component}/config.json: {key}={given!r} is not supported (only {value!r}).",
                hint="wanduet runs Wan2.1 text-to-video checkpoints in the Diffusers layout.",
            )


@dataclass(frozen=True, slots=True)
class TransformerSpec:
    """Shapes of the transformer (transformer/config.json)."""

    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_max_seq_len: int = 1024

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a Diffusers `WanTransformer3DModel` config. Raises ModelNotFoundError for image-conditioned variants."""
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
        return cls(**_pick(cls, config))


@dataclass(frozen=True, slots=True)
class VAESpec:
    """Shapes of the causal video VAE (vae/config.json). Strides: 8 in space, 4 in time."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)  # spelled as in the checkpoints
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN_LATENTS_STD

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent row or column."""
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_stride(self) -> int:
        """Frames per latent frame (the first latent frame gives only one frame)."""
        return int(2 ** sum(self.temperal_downsample))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a Diffusers `AutoencoderKLWan` config. Raises ModelNotFoundError for Wan2.2's residual variant."""
        _require(
            "vae",
            config,
            {"is_residual": False, "attn_scales": [], "dropout": 0.0, "in_channels": 3, "out_channels": 3,
             "patch_size": None, "decoder_base_dim": None},
        )  # fmt: skip
        return cls(**_pick(cls, config))


@dataclass(frozen=True, slots=True)
class TextEncoderSpec:
    """Shapes of the UMT5 encoder (text_encoder/config.json)."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a transformers `UMT5EncoderModel` config."""
        return cls(**_pick(cls, config))


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The values for fields of a request that are None. Sizes in pixels."""

    height: int = 480
    width: int = 832
    num_frames: int = 81
    fps: int = 16
    num_inference_steps: int = 50
    # The authors' recommendation for the 1.3B model (README of Wan-Video/Wan2.1): CFG 6, shift 8 to 12.
    guidance_scale: float = 6.0
    flow_shift: float = 8.0
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    sampler: str = "unipc"
    timesteps: tuple[float, ...] = ()  # of weights that are distilled for these steps only

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read `generation_defaults.json`, an optional file of wanduet's at the root of a model folder."""
        return cls(**_pick(cls, config))


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """The shapes and defaults of one text-to-video model."""

    name: str
    transformer: TransformerSpec = field(default_factory=TransformerSpec)
    vae: VAESpec = field(default_factory=VAESpec)
    text_encoder: TextEncoderSpec = field(default_factory=TextEncoderSpec)
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    text_len: int = 512  # tokens in cross-attention; shorter prompts are zero-padded to it

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


WAN_1_3B = ModelSpec("Wan2.1-T2V-1.3B")
WAN_14B = ModelSpec(
    "Wan2.1-T2V-14B",
    transformer=TransformerSpec(num_attention_heads=40, ffn_dim=13824, num_layers=40),
    # Official CLI of Wan-Video/Wan2.1 for 14B: CFG 5, shift 5.
    defaults=GenerationDefaults(guidance_scale=5.0, flow_shift=5.0),
)
RANDOM_SPECS = {"random:1.3b": WAN_1_3B, "random:14b": WAN_14B}
DEFAULT_MODEL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
