"""Small random Wans in the Diffusers layout, written by diffusers and transformers themselves."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from wanduet.weights.hub import open_model


def write_random_model(
    folder: Path, encoder: Any = None, transformer: Any = None, vae: Any = None, **save: Any
) -> Path:
    """A model with seeded weights; the mappings replace entries of the configs."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    shutil.copytree(open_model("miniature").path / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    shape = {"vocab_size": 640, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    text_encoder = UMT5EncoderModel(
        UMT5Config(**(shape | (encoder or {})), feed_forward_proj="gated-gelu", is_encoder_decoder=False)
    )
    for parameter in text_encoder.parameters():  # their initial values would make every prompt alike
        parameter.data.normal_(0.0, 0.3)
    shape = {"num_attention_heads": 2, "attention_head_dim": 24, "text_dim": 32, "freq_dim": 32, "ffn_dim": 96}
    denoiser = WanTransformer3DModel(**(shape | {"num_layers": 2} | (transformer or {})))
    denoiser.proj_out.weight.data.normal_(0.0, 0.2)
    decoder = AutoencoderKLWan(**({"base_dim": 8, "z_dim": 16, "num_res_blocks": 1} | (vae or {})))
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(tokenizer, text_encoder, decoder, scheduler, denoiser).save_pretrained(folder, **save)
    return folder


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("random-wan"))


@pytest.fixture(scope="session")
def write_model() -> Callable[..., Path]:
    """`write_random_model`, for a test that needs a model of its own."""
    return write_random_model


@pytest.fixture(scope="module")
def loaded(random_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Our pipeline of the random model."""
    import wanduet

    return wanduet.WanPipeline.from_pretrained(random_model, data_dir=tmp_path_factory.mktemp("data"))


@pytest.fixture
def pipe(loaded: Any) -> Any:
    """Ours, which shares what is loaded; a test that gives modules makes one of its own."""
    pipe = type(loaded).from_pipe(loaded, scheduler=copy.deepcopy(loaded.scheduler))
    pipe.set_progress_bar_config(disable=True)
    return pipe
