"""The transformer against diffusers' on seeded random small models, float32 on the CPU."""

import pytest
import torch
from diffusers import WanTransformer3DModel

from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.dit.model import WanTransformer

SMALL = dict(num_attention_heads=4, attention_head_dim=32, ffn_dim=192, num_layers=3, text_dim=48, freq_dim=64)


def oracle(seed: int = 0, **changes: object) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**(SMALL | changes))
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # their defaults (1 and 0) would hide mistakes
            parameter.data = parameter.data + 0.2 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def ours(reference: WanTransformer3DModel) -> WanTransformer:
    model = WanTransformer(WAN_1_3B.transformer.with_config(reference.config))
    model.load_state_dict(reference.state_dict(), strict=True)
    return model.eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def inputs(batch: int, frames: int, rows: int, columns: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return dict(
        hidden_states=torch.randn(batch, 16, frames, rows, columns),
        timestep=torch.tensor([731, 12][:batch]),
        encoder_hidden_states=torch.randn(batch, 11, SMALL["text_dim"]),
    )


@pytest.mark.parametrize("shape", [(1, 3, 8, 12), (2, 1, 6, 4), (1, 5, 10, 6)])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_forward_equals_diffusers(shape: tuple[int, int, int, int], grad: bool) -> None:
    reference = oracle()
    given = inputs(*shape)
    expected = reference(**given, return_dict=False)[0]
    with torch.set_grad_enabled(grad):
        got = ours(reference)(*given.values())
    assert relative(got.detach(), expected) < 1e-5


def test_other_architectures_equal_diffusers() -> None:
    reference = oracle(
        seed=3, num_attention_heads=2, attention_head_dim=24, num_layers=2, in_channels=8, out_channels=8
    )
    given = inputs(1, 2, 4, 4)
    given["hidden_states"] = given["hidden_states"][:, :8]
    with torch.no_grad():
        assert relative(ours(reference)(*given.values()), reference(**given, return_dict=False)[0]) < 1e-5


def test_training_gradients_equal_diffusers() -> None:
    reference = oracle().requires_grad_(True)
    model = ours(reference)
    given = inputs(1, 2, 4, 6)
    reference(**given, return_dict=False)[0].square().mean().backward()
    model(*given.values()).square().mean().backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, expected[name].grad) < 1e-4, name
