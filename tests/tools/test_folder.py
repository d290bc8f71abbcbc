"""The folder that training writes is a model that the engine opens."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from tools.miniature import folder as files
from tools.miniature.sample import encoder_of, read_model
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.hub import open_model


def test_a_written_folder_has_the_miniatures_shapes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bundled = open_model("miniature").spec
    transformer = WanTransformer(files.TRANSFORMER_SPEC)
    files.write_static(tmp_path)
    files.write_vae(tmp_path, WanVAE(files.VAE_SPEC), list(bundled.vae.latents_mean), list(bundled.vae.latents_std))
    files.write_transformer(tmp_path, transformer)
    files.write_text_encoder(tmp_path, encoder_of(None, "cpu"))
    assert ModelFolder(tmp_path, "miniature").spec == bundled
    again = read_model(tmp_path, "cpu").transformer
    assert again is not None
    torch.testing.assert_close(again.proj_out.weight, transformer.proj_out.weight, atol=0, rtol=2**-8)  # bfloat16
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer" / "tokenizer.json"))
    assert tokenizer.encode("a red circle").tokens == ["Ġa", "Ġred", "Ġcircle", "</s>"]
