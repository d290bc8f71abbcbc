"""The preview decoder against the published algorithm: all frames at once, block by block, upsampling left out."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad, relu

from wanduet.errors import WeightsError
from wanduet.family.wan21 import WAN_1_3B, WAN_14B
from wanduet.models.vae.preview_decoder import PreviewDecoder
from wanduet.previews.decoders import doublings_for, find_decoder

# The names and shapes in the decoder of a `taew2_1` file, as its author's and others' loaders need them.
STAGES = ((256, 128, 3, 1), (128, 64, 9, 2), (64, 64, 15, 2))  # width, next width, first index, frames of one


def taew_weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / max(1, int(np.prod(shape[1:]))) ** 0.5

    weights = {"decoder.1.weight": random(256, 16, 3, 3), "decoder.1.bias": random(256)}
    for width, following, first, frames in STAGES:
        for block in range(first, first + 3):
            for layer, inputs in ((0, 2 * width), (2, width), (4, width)):
                weights[f"decoder.{block}.conv.{layer}.weight"] = random(width, inputs, 3, 3)
                weights[f"decoder.{block}.conv.{layer}.bias"] = random(width)
        weights[f"decoder.{first + 4}.conv.weight"] = random(width * frames, width, 1, 1)
        weights[f"decoder.{first + 5}.weight"] = random(following, width, 3, 3)
    weights |= {"decoder.22.weight": random(3, 64, 3, 3), "decoder.22.bias": random(3)}
    return {**weights, "encoder.0.weight": random(64, 3, 3, 3)}


def published(weights: dict[str, Tensor], latents: Tensor, doublings: int) -> Tensor:
    """`[T, C, h, w]` to `[T, 3, H, W]`, from the weights by name."""

    def conv(x: Tensor, name: str) -> Tensor:
        return conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding="same")

    x = relu(conv(torch.tanh(latents / 3) * 3, "decoder.1"))
    for stage, (width, _, first, _) in enumerate(STAGES):
        for block in range(first, first + 3):
            past = pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
            y = relu(conv(torch.cat([x, past], 1), f"decoder.{block}.conv.0"))
            y = conv(relu(conv(y, f"decoder.{block}.conv.2")), f"decoder.{block}.conv.4")
            x = relu(y + x)
        if stage < doublings:
            x = interpolate(x, scale_factor=2, mode="nearest")
        x = conv2d(x, weights[f"decoder.{first + 4}.conv.weight"][-width:])
        x = conv(x, f"decoder.{first + 5}")
    return conv(relu(x), "decoder.22").clamp(0, 1)


@pytest.mark.parametrize("doublings", [1, 3])
def test_frame_by_frame_it_is_the_published_decoder(doublings: int) -> None:
    weights = taew_weights()
    decoder = PreviewDecoder()
    found = decoder.load_state_dict(weights, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], ["encoder.0.weight"])
    latents = torch.randn(16, 4, 3, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = torch.stack(list(decoder.pictures(latents, doublings)))
        want = published(weights, latents.transpose(0, 1), doublings)
    assert got.shape == (4, 3, 3 * 2**doublings, 5 * 2**doublings)
    assert float(want.std()) > 0.01
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_file_beside_the_model_is_found_and_used(tmp_path: Path) -> None:
    assert find_decoder(WAN_1_3B, tmp_path, None) is None
    (tmp_path / "vae_approx").mkdir()
    save_file(taew_weights(), tmp_path / "vae_approx" / "taew2_1.safetensors")
    decoder = find_decoder(WAN_14B, None, tmp_path)
    assert decoder is not None
    latents = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(2))
    frames = decoder(latents)
    want = published(taew_weights(), latents.transpose(0, 1), 3).permute(0, 2, 3, 1).numpy() * 255
    assert frames.shape == (3, 32, 48, 3)
    assert np.abs(frames - want).max() <= 1


def test_weights_for_latents_as_the_encoder_gives_them(tmp_path: Path) -> None:
    save_file(taew_weights(), tmp_path / "lighttaew2_1.safetensors")
    decoder = find_decoder(WAN_1_3B, tmp_path)
    assert decoder is not None
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (WAN_1_3B.vae.latents_mean, WAN_1_3B.vae.latents_std)
    )
    latents = torch.randn(16, 2, 4, 4, generator=torch.Generator().manual_seed(3))
    want = published(taew_weights(), latents.transpose(0, 1) * std + mean, 3).permute(0, 2, 3, 1).numpy() * 255
    assert np.abs(decoder(latents) - want).max() <= 1


def test_only_for_models_with_this_vae(tmp_path: Path) -> None:
    save_file(taew_weights(), tmp_path / "taew2_1.safetensors")
    assert find_decoder(WAN_1_3B, tmp_path) is not None
    assert find_decoder(replace(WAN_1_3B, vae=replace(WAN_1_3B.vae, base_dim=24)), tmp_path) is None


def test_a_file_of_another_kind_raises(tmp_path: Path) -> None:
    save_file({"decoder.1.weight": torch.zeros(256, 48, 3, 3)}, tmp_path / "taew2_1.safetensors")
    decoder = find_decoder(WAN_1_3B, tmp_path)
    assert decoder is not None
    with pytest.raises(WeightsError):
        decoder(torch.zeros(16, 1, 2, 2))


def test_pictures_are_large_enough_and_not_larger() -> None:
    assert [doublings_for(longest) for longest in (240, 160, 104, 80, 40, 12)] == [1, 1, 1, 2, 3, 3]
