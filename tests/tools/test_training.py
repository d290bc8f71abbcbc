"""The training's faster forms compute what the engine's modules compute."""

from dataclasses import replace

import pytest
import torch

from tools.miniature import whole_clip
from tools.miniature.sample import encoder_of
from tools.miniature.training import Trainer, orthogonal
from tools.miniature.velocity import TEXT_TOKENS, embed_text, run_block, velocity
from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 2e-5) -> bool:
    return bool((a - b).abs().max() <= limit * b.abs().max())


def test_whole_clips_equal_steps() -> None:
    torch.manual_seed(0)
    vae = WanVAE(replace(WAN_1_3B.vae, base_dim=8, num_res_blocks=1)).requires_grad_(False)
    video = torch.rand(2, 3, 9, 32, 32) * 2 - 1
    assert close(whole_clip.encode_moments(vae, video), vae.encode_moments(video))
    z = torch.randn(2, 16, 3, 4, 4)
    assert close(whole_clip.decode(vae, z), vae.decode(z))


@pytest.mark.parametrize("count", [1, 7, TEXT_TOKENS])
def test_few_text_positions_equal_all(count) -> None:
    torch.manual_seed(1)
    spec = replace(
        WAN_1_3B.transformer,
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=16,
        freq_dim=32,
        ffn_dim=64,
        num_layers=2,
    )
    model = WanTransformer(spec).requires_grad_(False)
    latents, times = torch.randn(2, 16, 2, 4, 6), torch.tensor([900.0, 30.0])
    embeds = torch.randn(2, TEXT_TOKENS, 16)
    embeds[:, count:] = 0
    padded = torch.nn.functional.pad(embeds, (0, 0, 0, 512 - TEXT_TOKENS))
    rope = model.prepare_rope(latents.shape, latents.device)
    got = velocity(model, latents, times, embeds, rope, run_block, torch.float32)
    assert close(got, model(latents, times, padded, rope))


def test_text_in_training_is_text_in_the_engine() -> None:
    encoder = encoder_of(None, "cpu").eval()
    ids = torch.tensor([[5, 9, 1, 0, 0], [4, 1, 0, 0, 0]])
    with torch.no_grad():
        got = embed_text(encoder, ids)
        alone = encoder(input_ids=torch.tensor([[5, 9, 1]])).last_hidden_state
    assert close(got[:1, :3], alone)
    assert not got[0, 3:].any()


def test_orthogonal_update_has_singular_values_near_one() -> None:
    matrices = torch.randn(3, 24, 60, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_trainer_learns() -> None:
    torch.manual_seed(3)
    layer = torch.nn.Linear(32, 32)
    target, x = torch.randn(32, 32) / 6, torch.randn(64, 32)
    trainer = Trainer(
        [layer], lambda: (layer(x) - x @ target).square().mean(), lr=0.02, seconds=1e9, decay=0.9,
        matrices=[layer.weight], warmup=5,
    )  # fmt: skip
    trainer.step()
    before = trainer.loss_value()
    for _ in range(80):
        trainer.step()
    assert trainer.loss_value() < 0.05 * before
