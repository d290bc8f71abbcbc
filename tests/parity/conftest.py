"""A small random Wan in the Diffusers layout, written by diffusers and transformers themselves."""

from pathlib import Path

import pytest
import torch

from wanduet.miniature.folder import write_tokenizer


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("random-wan")
    write_tokenizer(folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=640, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )  # fmt: skip
    for parameter in encoder.parameters():  # their initial values would make every prompt alike
        parameter.data.normal_(0.0, 0.3)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=32, freq_dim=32, ffn_dim=96, num_layers=2
    )
    transformer.proj_out.weight.data.normal_(0.0, 0.2)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(tokenizer, encoder, vae, scheduler, transformer).save_pretrained(folder)
    return folder
