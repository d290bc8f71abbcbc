"""A LoRA merged from its file, against diffusers' and PEFT's own merge into the same small transformer, in float32."""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from wanduet.family.wan21 import WAN_1_3B
from wanduet.weights.adapters.reader import read_adapter

SMALL = dict(num_attention_heads=2, attention_head_dim=12, ffn_dim=40, num_layers=2, text_dim=20, freq_dim=16)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LINEAR = [*ATTENTION, "ffn.net.0.proj", "ffn.net.2", "proj_out", "linear_1", "linear_2", "time_proj"]


def transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(**SMALL).eval().requires_grad_(False)


def randomised(model: torch.nn.Module) -> None:
    """Replace the initial values of an adapter, half of which are zero."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_", "hada_", "lokr_")):
            with torch.no_grad():
                parameter.normal_(0.5 if "magnitude" in name else 0.0, 0.3)


def merged(path: Path, strength: float = 1.0) -> dict[str, torch.Tensor]:
    base = transformer().state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in base.items()}
    adapter = read_adapter(path, WAN_1_3B.transformer.with_config(transformer().config), shapes)
    return base | {name: update.applied(base[name], strength) for name, update in adapter.updates.items()}


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    base = transformer().state_dict()
    assert any(not torch.equal(tensor, base[name]) for name, tensor in wanted.items())
    for name, tensor in wanted.items():
        assert (got[name] - tensor).abs().max() <= 1e-5 * max(1.0, tensor.abs().max().item()), name


def plain(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a diffusers model whose LoRA layers were merged."""
    return {
        name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }


CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR),
    "own ranks and alphas": LoraConfig(
        r=4, lora_alpha=6, target_modules=LINEAR, rank_pattern={"to_k": 2, "ffn.net.2": 8},
        alpha_pattern={"to_q": 1, r"blocks\.1\.attn2\.to_v": 3, "proj_out": 32},
    ),
    "square root of the rank": LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, use_rslora=True),
    "bias": LoraConfig(r=4, lora_alpha=6, target_modules=ATTENTION, lora_bias=True),
    "convolution": LoraConfig(r=4, lora_alpha=6, target_modules=["patch_embedding", "to_q"]),
    "dora": LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, use_dora=True),
    "dora of the convolution": LoraConfig(r=4, lora_alpha=6, target_modules=["patch_embedding"], use_dora=True),
    "loha": LoHaConfig(r=4, alpha=6, target_modules=LINEAR),
    "lokr": LoKrConfig(r=4, alpha=6, target_modules=LINEAR, decompose_factor=3),
    "lokr, both factored": LoKrConfig(r=1, alpha=3, target_modules=ATTENTION, decompose_both=True, decompose_factor=6),
    "lokr, both whole": LoKrConfig(r=64, alpha=16, target_modules=ATTENTION),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes the biases of `lora_bias` for matrices
@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_of_peft_merges_as_in_peft(case: str, tmp_path: Path) -> None:
    model = get_peft_model(transformer(), CONFIGS[case])
    randomised(model)
    model.save_pretrained(tmp_path)
    assert_equal(merged(tmp_path), model.merge_and_unload().state_dict())


@pytest.mark.parametrize("strength", [1.0, -0.6])
def test_a_file_of_diffusers_merges_as_in_diffusers(strength: float, tmp_path: Path) -> None:
    trained = transformer()
    trained.add_adapter(CONFIGS["own ranks and alphas"], adapter_name="mine")
    randomised(trained)
    WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(trained, adapter_name="mine"),
        transformer_lora_adapter_metadata=trained.peft_config["mine"].to_dict(),
    )
    path = tmp_path / "pytorch_lora_weights.safetensors"
    state, metadata = WanPipeline.lora_state_dict(str(path), return_lora_metadata=True)
    model = transformer()
    model.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    model.fuse_lora(strength)
    assert_equal(merged(path, strength), plain(model))


# The forms that diffusers converts: with alpha, with changes of biases, under each of its prefixes.
FORMS = {
    "official": "diffusion_model.blocks.{block}.{attention}.{part}.lora_A.weight",
    "official, down and up": "diffusion_model.blocks.{block}.{attention}.{part}.lora_down.weight",
    "musubi": "lora_unet_blocks_{block}_{attention}_{part}.lora_down.weight",
}


@pytest.mark.parametrize("form", FORMS)
def test_an_official_name_merges_as_in_diffusers(form: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    for block in range(2):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                name = FORMS[form].format(block=block, attention=attention, part=part)
                tensors[name] = torch.randn(4, 24)
                tensors[name.replace("lora_A", "lora_B").replace("down", "up")] = torch.randn(24, 4)
                if "official" not in form or "down" in form:
                    tensors[name.replace("lora_down.weight", "alpha")] = torch.tensor(1.5)
        for index, (columns, rows) in ((0, (24, 40)), (2, (40, 24))):
            name = FORMS[form].format(block=block, attention="ffn", part=index)
            tensors[name] = torch.randn(4, columns)
            tensors[name.replace("lora_A", "lora_B").replace("down", "up")] = torch.randn(rows, 4)
            if "official" not in form or "down" in form:
                tensors[name.replace("lora_down.weight", "alpha")] = torch.tensor(6.0)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    model = transformer()
    model.load_lora_adapter(WanPipeline.lora_state_dict(str(path)), prefix="transformer")
    model.fuse_lora()
    assert_equal(merged(path), plain(model))
