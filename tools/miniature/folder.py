"""The miniature's shapes, and how its parts are written in the Diffusers layout."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tools.miniature.prompts import corpus
from wanduet.family.wan21 import WAN_1_3B

FOLDER = Path(__file__).parents[2] / "src" / "wanduet" / "miniature" / "model"
FAST_FOLDER = FOLDER.with_name("fast")  # few-step weights; what it lacks is that of FOLDER
NUM_FRAMES, SIZE = 33, 96

VAE_SPEC = replace(WAN_1_3B.vae, base_dim=16, num_res_blocks=1, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)
TRANSFORMER_SPEC = replace(
    WAN_1_3B.transformer,
    num_attention_heads=8,
    attention_head_dim=32,
    text_dim=128,
    freq_dim=128,
    ffn_dim=896,
    num_layers=6,
)
TEXT_ENCODER_SPEC = replace(
    WAN_1_3B.text_encoder, vocab_size=640, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4
)
DEFAULTS = replace(
    WAN_1_3B.defaults, height=SIZE, width=SIZE, num_frames=NUM_FRAMES, num_inference_steps=20,
    guidance_scale=3.0, flow_shift=3.0, negative_prompt="",
)  # fmt: skip

MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def write_static(folder: Path) -> None:
    """Everything that training does not change: index, tokenizer, scheduler and the defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "model_index.json", MODEL_INDEX)
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "_diffusers_version": "0.42.1",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": DEFAULTS.flow_shift,
        "num_train_timesteps": 1000,
        "solver_order": 2,
        "solver_type": "bh2",
        "predict_x0": True,
        "final_sigmas_type": "zero",
    }
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    write_json(folder / "generation_defaults.json", asdict(DEFAULTS))
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        write_tokenizer(folder / "tokenizer")


def write_fast_static(folder: Path) -> None:
    """What belongs to the few-step weights but to no training: defaults, scheduler and the colours of previews.

    The sampler and its timesteps are those of `family.distilled.FAST_MINIATURE`.
    """
    kept = ("height", "width", "num_frames", "fps", "flow_shift", "negative_prompt")
    write_json(folder / "generation_defaults.json", {name: asdict(DEFAULTS)[name] for name in kept})
    scheduler = {  # diffusers' form of Euler steps on these noise levels
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.42.1",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": DEFAULTS.flow_shift,
        "num_train_timesteps": 1000,
        "solver_order": 1,
        "final_sigmas_type": "zero",
    }
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    shutil.copyfile(FOLDER / "preview_colours.json", folder / "preview_colours.json")


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 640 tokens: any text in any language can be read, the world's words are whole."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_ENCODER_SPEC.vocab_size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(20000, seed=0), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", config)


def write_vae(folder: Path, module: nn.Module, mean: list[float], std: list[float]) -> None:
    """The VAE in float16, with the latents' statistics over the world."""
    spec = asdict(VAE_SPEC) | {"latents_mean": mean, "latents_std": std}
    _write_component(folder / "vae", "AutoencoderKLWan", spec, module, torch.float16)


def write_transformer(folder: Path, module: nn.Module) -> None:
    """The transformer in bfloat16."""
    spec = asdict(TRANSFORMER_SPEC) | {"cross_attn_norm": True, "qk_norm": "rms_norm_across_heads"}
    _write_component(folder / "transformer", "WanTransformer3DModel", spec, module, torch.bfloat16)


def write_text_encoder(folder: Path, module: nn.Module) -> None:
    """The UMT5 encoder in bfloat16, as transformers saves it (the embedding once, as `shared.weight`)."""
    folder = folder / "text_encoder"
    write_json(folder / "config.json", text_encoder_config() | {"architectures": ["UMT5EncoderModel"]})
    tensors = {n: t for n, t in module.state_dict().items() if n != "encoder.embed_tokens.weight"}
    _save(folder / "model.safetensors", tensors, torch.bfloat16)


def text_encoder_config() -> dict[str, Any]:
    """The transformers config of the UMT5 encoder."""
    return asdict(TEXT_ENCODER_SPEC) | {
        "model_type": "umt5",
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": False,
        "is_encoder_decoder": False,
    }


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A written component's tensors in float32."""
    from safetensors.torch import load_file

    return {name: tensor.float() for name, tensor in load_file(path).items()}


def write_json(path: Path, value: object) -> None:
    """Pretty-printed JSON; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def _write_component(
    folder: Path, class_name: str, config: dict[str, Any], module: nn.Module, dtype: torch.dtype
) -> None:
    write_json(folder / "config.json", {"_class_name": class_name, "_diffusers_version": "0.42.1"} | config)
    _save(folder / "diffusion_pytorch_model.safetensors", module.state_dict(), dtype)


def _save(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: t.detach().to("cpu", dtype).contiguous() for n, t in tensors.items()}, path, {"format": "pt"})
