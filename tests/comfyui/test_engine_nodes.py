"""The nodes that run the engine in ComfyUI's process, with the miniature."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.comfyui.stand_ins import Host, InterruptProcessingException, NodeOutput
from tests.weight_files import tensors_of
from wanduet.family.speeds import BY_NAME
from wanduet.schedule import SAMPLERS
from wanduet.weights.hub import open_model

Run = Callable[..., NodeOutput]
SMALL = {"width": 32, "height": 32, "length": 5, "steps": 3, "guidance": 1.0, "seed": 7}
PROMPT = "a red circle moving left on a black background"


@pytest.fixture(scope="module", autouse=True)
def _own_data(tmp_path_factory: pytest.TempPathFactory, pack: ModuleType) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDUET_DATA_DIR", str(tmp_path_factory.mktemp("data")))
        yield
        sys.modules[f"{pack.__name__}.engine"].close()


@pytest.fixture
def model(run: Run) -> Any:
    return run("WanduetModel", model="miniature").args[0]


@pytest.fixture
def stages(pack: ModuleType, model: Any) -> Any:
    return pack.engine_nodes.stages_of(model)


@pytest.fixture
def positive(run: Run, model: Any) -> Any:
    return run("WanduetTextEncode", model=model, text=PROMPT).args[0]


@pytest.fixture
def latent(run: Run, model: Any, positive: Any) -> Any:
    return run("WanduetSampler", model=model, positive=positive, **SMALL).args[0]


def test_a_latent_is_decoded_as_the_engine_does(run: Run, host: Host, model: Any, stages: Any, positive: Any) -> None:
    host.shown.clear()
    latent = run("WanduetSampler", model=model, positive=positive, **SMALL).args[0]
    assert host.shown[-1] == (3, 3)
    assert host.previews
    assert host.unloaded
    assert latent["samples"].shape == (1, 16, 2, 4, 4)
    from wanduet import GenerationRequest

    names = {"length": "num_frames", "steps": "num_inference_steps", "guidance": "guidance_scale"}
    request = GenerationRequest(prompt=PROMPT, **{names.get(name, name): value for name, value in SMALL.items()})
    expected = stages.denoise(request, stages.encode_prompt(PROMPT))
    # ComfyUI's convention: in the scale of the VAE's output.
    mean, std = (
        torch.tensor(values).view(1, 16, 1, 1, 1)
        for values in (stages.spec.vae.latents_mean, stages.spec.vae.latents_std)
    )
    assert torch.allclose(latent["samples"], expected[None] * std + mean, atol=1e-5)
    images = run("WanduetDecode", model=model, latent=latent).args[0]
    assert torch.equal((images * 255).round().to(torch.uint8), torch.from_numpy(stages.decode(expected)))


def test_images_are_encoded_and_a_video_is_made_from_them(run: Run, model: Any, positive: Any, latent: Any) -> None:
    images = run("WanduetDecode", model=model, latent=latent).args[0]
    beyond = torch.cat([images, images[:2]])  # 7 frames, of which 5 are used
    encoded = run("WanduetEncode", model=model, images=beyond).args[0]
    assert torch.equal(encoded["samples"], run("WanduetEncode", model=model, images=images).args[0]["samples"])
    given = {"model": model, "positive": positive, "latent": encoded, "steps": 3, "guidance": 1.0}
    kept = run("WanduetSampler", **given, strength=0.0).args[0]  # size and length are the latent's
    assert torch.allclose(kept["samples"], encoded["samples"], atol=1e-4)
    changed = run("WanduetSampler", **given, strength=0.7).args[0]
    assert not torch.allclose(changed["samples"], encoded["samples"], atol=0.1)


def test_an_interrupt_ends_the_sampler_which_goes_on_when_it_is_queued_again(
    run: Run, host: Host, model: Any, positive: Any
) -> None:
    given = {"model": model, "positive": positive, **SMALL, "seed": 11, "steps": 6}
    host.interrupt_at = 0.5
    with pytest.raises(InterruptProcessingException):
        run("WanduetSampler", **given)
    assert not host.interrupted.is_set()  # the next prompt is not interrupted
    assert max(done for done, _ in host.shown) < 6
    host.reset()
    latent = run("WanduetSampler", **given).args[0]
    assert min(done for done, _ in host.shown) >= 3
    assert torch.equal(latent["samples"], run("WanduetSampler", **given).args[0]["samples"])


def test_conditioning_is_padded_as_comfyui_pads_it_and_read_back(
    run: Run, pack: ModuleType, stages: Any, model: Any, positive: Any
) -> None:
    (embeds, _), *_ = positive
    assert embeds.shape == (1, stages.spec.text_len, stages.spec.transformer.text_dim)
    assert torch.equal(pack.engine_nodes.embeds_of(stages, positive), stages.encode_prompt(PROMPT))
    with pytest.raises(ValueError, match="another encoder"):
        run("WanduetSampler", model=model, positive=[[embeds[..., :8], {}]], **SMALL)
    with pytest.raises(ValueError, match="one prompt"):
        run("WanduetSampler", model=model, positive=[*positive, *positive], **SMALL)


def test_guidance_takes_the_negative_prompt(run: Run, model: Any, positive: Any) -> None:
    guided = {**SMALL, "guidance": 4.0}
    negative = run("WanduetTextEncode", model=model, text="a blue square").args[0]
    with_it = run("WanduetSampler", model=model, positive=positive, negative=negative, **guided).args[0]
    without = run("WanduetSampler", model=model, positive=positive, **guided).args[0]
    assert not torch.allclose(with_it["samples"], without["samples"], atol=1e-2)


def test_a_lora_changes_the_video(run: Run, host: Host, model: Any, positive: Any, latent: Any, tmp_path: Path) -> None:
    name = "diffusion_model.blocks.0.self_attn.q"
    width = open_model("miniature").spec.transformer.dim
    down, up = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in ((4, width), (width, 4)))
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "style.safetensors")
    host.folders["loras"] = tmp_path
    loras = run("WanduetLora", lora="style.safetensors", strength=1.0).args[0]
    changed = run("WanduetSampler", model=model, positive=positive, loras=loras, **SMALL).args[0]
    assert not torch.allclose(changed["samples"], latent["samples"], atol=1e-3)
    stack = run("WanduetServerLora", name="other.safetensors", loras=loras).args[0]
    assert [one["name"] for one in stack] == ["style.safetensors", "other.safetensors"]
    with pytest.raises(ValueError, match=r"other\.safetensors is a LoRA on a server"):
        run("WanduetSampler", model=model, positive=positive, loras=stack, **SMALL)


def test_a_plan_says_memory_and_time(run: Run, model: Any) -> None:
    output = run("WanduetPlan", model=model, width=32, height=32, length=5)
    assert output.args[0].startswith("It fits, and takes about ")
    assert output.ui.value == output.args[0]
    assert "host: " in output.args[0]


def test_files_of_comfyuis_folders_take_the_place_of_the_models(
    run: Run, host: Host, pack: ModuleType, latent: Any, model: Any, tmp_path: Path
) -> None:
    frames = run("WanduetDecode", model=model, latent=latent).args[0]
    state = tensors_of(open_model("miniature"), "vae")
    state["decoder.head.2.bias"] += 0.3  # brighter
    save_file(state, tmp_path / "bright.safetensors")
    host.folders["vae"] = tmp_path
    bright = run("WanduetModel", model="miniature", vae="bright.safetensors").args[0]
    brighter = run("WanduetDecode", model=bright, latent=latent, keep_loaded=False).args[0]
    assert brighter.mean() > frames.mean() + 0.05


def test_errors_are_sentences(run: Run, model: Any, positive: Any, latent: Any) -> None:
    with pytest.raises(Exception, match="no-such-folder"):
        run("WanduetModel", model="./no-such-folder")
    with pytest.raises(Exception, match="num_frames=6 is not allowed"):
        run("WanduetSampler", model=model, positive=positive, **{**SMALL, "length": 6})
    with pytest.raises(ValueError, match=r"one video \[1, 16, T, h, w\]"):
        run("WanduetDecode", model=model, latent={"samples": torch.zeros(1, 4, 8, 8)})


def test_the_choices_are_the_engines(pack: ModuleType) -> None:
    assert set(pack.engine_nodes.SAMPLERS) == set(SAMPLERS)
    options = pack.engine_nodes.sampling_inputs()[-1].given["options"]
    assert options == list(BY_NAME)
