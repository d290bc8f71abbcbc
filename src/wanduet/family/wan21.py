"""The members of Wan2.1, text to video: their shapes, as in the checkpoints' configs, and their defaults."""

from dataclasses import replace

from wanduet.family.spec import GenerationDefaults, Member, ModelSpec, TextEncoderSpec, TransformerSpec, VAESpec

# https://github.com/Wan-Video/Wan2.1, wan/configs/shared_config.py (sample_neg_prompt): the negative prompt that Wan2.1
# was tuned with; used if the request's is None.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
VAE = VAESpec(
    base_dim=96, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2, temperal_downsample=(False, True, True),
    latents_mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    latents_std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)  # fmt: skip
TEXT_ENCODER = TextEncoderSpec(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
    relative_attention_num_buckets=32, relative_attention_max_distance=128,
)  # fmt: skip
WAN_1_3B = ModelSpec(
    "Wan2.1-T2V-1.3B",
    TransformerSpec(
        num_attention_heads=12, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=4096, freq_dim=256,
        ffn_dim=8960, num_layers=30, patch_size=(1, 2, 2), eps=1e-6, rope_max_seq_len=1024,
    ),
    VAE,
    TEXT_ENCODER,
    GenerationDefaults(
        height=480, width=832, num_frames=81, fps=16, num_inference_steps=50,
        # The authors' recommendation for the 1.3B model (README of Wan-Video/Wan2.1): CFG 6, shift 8 to 12.
        guidance_scale=6.0, flow_shift=8.0, negative_prompt=NEGATIVE_PROMPT, sampler="unipc", timesteps=(),
    ),
    text_len=512,
)  # fmt: skip
WAN_14B = replace(
    WAN_1_3B,
    name="Wan2.1-T2V-14B",
    transformer=replace(WAN_1_3B.transformer, num_attention_heads=40, ffn_dim=13824, num_layers=40),
    # Official CLI of Wan-Video/Wan2.1 for 14B: CFG 5, shift 5.
    defaults=replace(WAN_1_3B.defaults, guidance_scale=5.0, flow_shift=5.0),
)
MEMBERS = (
    Member(WAN_1_3B, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "random:1.3b"),
    Member(WAN_14B, "Wan-AI/Wan2.1-T2V-14B-Diffusers", "random:14b"),
)
