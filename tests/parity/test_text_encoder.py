"""The text path against transformers' whole UMT5 encoder and diffusers' own prompt encoding, float32 on the CPU."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import UMT5Config, UMT5EncoderModel

from wanduet.models.text.tokenizer import clean_text
from wanduet.models.text.umt5 import EMBEDDING, EMBEDDING_COPY, TextEncoder, pad_embeddings
from wanduet.weights.safetensors import TensorFiles

CONFIG = {
    "vocab_size": 97, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "dropout_rate": 0.1, "is_encoder_decoder": False, "model_type": "umt5",
}  # fmt: skip
PROMPTS = [[5, 9, 33, 1], [7, 1], [*list(range(2, 60)), 1]]


@pytest.fixture(scope="module")
def oracle() -> UMT5EncoderModel:
    torch.manual_seed(0)
    model = UMT5EncoderModel(UMT5Config(**CONFIG)).eval()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name or "layer_norm" in name:  # defaults would hide mistakes
            parameter.data = parameter.data + 0.5 * torch.randn_like(parameter)
    return model


@pytest.fixture(params=["shared", "copy"], scope="module")
def files(request, oracle, tmp_path_factory) -> TensorFiles:
    folder = tmp_path_factory.mktemp("text")
    tensors = {n: t.clone() for n, t in oracle.state_dict().items() if n not in (EMBEDDING, EMBEDDING_COPY)}
    tensors[EMBEDDING if request.param == "shared" else EMBEDDING_COPY] = oracle.shared.weight.detach().clone()
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, folder / "a.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, folder / "b.safetensors")
    return TensorFiles("text encoder", sorted(folder.iterdir()))


@pytest.mark.parametrize("residency", ["resident", "streamed"])
@torch.no_grad()
def test_true_tokens_give_what_the_padded_encoder_gives(oracle, files, residency) -> None:
    encoder = TextEncoder(CONFIG, files, torch.float32, residency)
    for _ in range(2):  # the second time from what is held
        for ids, embeds in zip(PROMPTS, encoder.encode(PROMPTS), strict=True):
            padded = torch.zeros(1, 64, dtype=torch.long)
            padded[0, : len(ids)] = torch.tensor(ids)
            mask = (torch.arange(64) < len(ids)).long()[None]
            expected = oracle(input_ids=padded, attention_mask=mask).last_hidden_state[0, : len(ids)]
            assert (embeds - expected).abs().max() <= 1e-5 * expected.abs().max()
            assert torch.equal(pad_embeddings(embeds, 64)[0, len(ids) :], torch.zeros(64 - len(ids), 24))


@pytest.mark.parametrize(
    "text",
    ["  a  red\n circle ", "&amp;quot;hi&amp;quot;", "schÃ¶n", "ﬁre “quotes”", "emoji 🚀 and 中文，标点"],
)
def test_cleaning_equals_diffusers(text) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert clean_text(text) == prompt_clean(text)
