"""A program for diffusers that loads LoRA, run by both pipelines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

CALL = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}


def tensors(seed: int, *parts: str) -> dict[str, Tensor]:
    """A LoRA of rank 3 of these linear layers of both blocks."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for block in range(2):
        for part in parts:
            name = f"transformer.blocks.{block}.{part}"
            found[f"{name}.lora_A.weight"] = torch.randn(3, 48, generator=generator)
            found[f"{name}.lora_B.weight"] = torch.randn(48, 3, generator=generator) * 0.1
    return found


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("loras") / "style.safetensors"
    save_file(tensors(1, "attn1.to_q", "attn1.to_v", "attn2.to_k"), path)
    return path


@pytest.fixture
def oracle(random_model) -> diffusers.WanPipeline:
    pipe = diffusers.WanPipeline.from_pretrained(random_model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, **call: Any) -> Tensor:
    return pipe("a red circle", generator=torch.Generator().manual_seed(7), **(CALL | call)).frames


def with_strengths(pipe: Any, lora: Path) -> list[Any]:
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="style")
    found = [latents(pipe), pipe.get_active_adapters()]
    pipe.load_lora_weights(tensors(2, "attn1.to_q", "attn1.to_out.0"))
    found += [latents(pipe), pipe.get_active_adapters(), pipe.get_list_adapters()]
    pipe.set_adapters(["style", "default_1"], [0.7, -0.4])
    found += [latents(pipe), latents(pipe, attention_kwargs={"scale": 0.5}), pipe.get_active_adapters()]
    pipe.disable_lora()
    found.append(latents(pipe))
    pipe.enable_lora()
    pipe.set_adapters("style", {"transformer": 0.3})
    found += [latents(pipe), pipe.get_active_adapters()]
    pipe.delete_adapters("style")
    found += [latents(pipe), pipe.get_active_adapters(), pipe.get_list_adapters()]
    pipe.load_lora_weights(tensors(3, "attn1.to_q", "attn1.to_out.0"), adapter_name="default_1", hotswap=True)
    found.append(latents(pipe))
    pipe.unload_lora_weights()
    return [*found, latents(pipe), pipe.get_active_adapters(), pipe.get_list_adapters()]


def fused(pipe: Any, lora: Path) -> list[Any]:
    pipe.load_lora_weights(lora, adapter_name="style")
    pipe.set_adapters("style", 0.8)
    pipe.fuse_lora(lora_scale=0.5)
    found = [latents(pipe), latents(pipe, attention_kwargs={"scale": 0.1}), pipe.num_fused_loras, pipe.fused_loras]
    pipe.unfuse_lora()
    found += [latents(pipe), pipe.num_fused_loras]  # the scale stays
    pipe.load_lora_weights(tensors(2, "attn1.to_q", "attn1.to_v", "attn2.to_k"), adapter_name="other")
    pipe.set_adapters(["style", "other"], [1.0, 0.5])
    pipe.fuse_lora(adapter_names=["style", "other"])
    found += [latents(pipe), pipe.fused_loras]
    pipe.unload_lora_weights()
    found += [latents(pipe), pipe.get_list_adapters()]
    pipe.load_lora_weights(tensors(3, "attn1.to_q"))
    return [*found, latents(pipe), pipe.get_active_adapters()]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("program", [with_strengths, fused])
def test_a_program_that_loads_lora(oracle, pipe, lora, program: Callable[[Any, Path], list[Any]]) -> None:
    expected, got = program(oracle, lora), program(pipe, lora)
    base = latents(pipe)
    assert len(expected) == len(got)
    for number, (theirs, ours) in enumerate(zip(expected, got, strict=True)):
        if isinstance(theirs, Tensor):
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), number
        else:
            assert ours == theirs, number
    assert sum(not ours.equal(base) for ours in got if isinstance(ours, Tensor)) >= 4
