"""`WanPipeline`'s calls for LoRA: where files are looked for, what is refused, and that the base comes back."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

import wanduet
from wanduet.doors.python.parts import PipelineBusyError
from wanduet.errors import ModelNotFoundError, WeightsError
from wanduet.weights.hub import open_model

CALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "output_type": "latent"}


def tensors(width: int = 0, seed: int = 1) -> dict[str, Tensor]:
    width = width or open_model("miniature").spec.transformer.dim
    generator = torch.Generator().manual_seed(seed)
    name = "transformer.blocks.0.attn1.to_q"
    return {
        f"{name}.lora_A.weight": torch.randn(4, width, generator=generator),
        f"{name}.lora_B.weight": torch.randn(width, 4, generator=generator) * 0.1,
    }


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> "wanduet.WanPipeline":
    data = tmp_path_factory.mktemp("data")
    return wanduet.WanPipeline.from_pretrained("miniature", data_dir=data, devices="cpu")


@pytest.fixture
def pipe(loaded) -> "wanduet.WanPipeline":
    loaded.set_progress_bar_config(disable=True)
    loaded.unload_lora_weights()
    return loaded


def latents(pipe: Any, **call: Any) -> Tensor:
    return pipe("a red circle", generator=torch.Generator().manual_seed(1), **(CALL | call)).frames


def test_the_base_comes_back_bit_for_bit(pipe, tmp_path) -> None:
    base = latents(pipe)
    path = tmp_path / "style.safetensors"
    save_file(tensors(), path)
    pipe.load_lora_weights(path, adapter_name="style")
    path.unlink()  # it is in memory, as in diffusers
    with_style = latents(pipe)
    assert not with_style.equal(base)
    pipe.set_adapters("style", 0.5)
    half = latents(pipe)
    pipe.set_adapters("style")
    assert latents(pipe, attention_kwargs={"scale": 0.5}).equal(half)
    assert latents(pipe, attention_kwargs={"scale": 0}).equal(base)
    assert latents(pipe).equal(with_style)
    pipe.fuse_lora()
    assert latents(pipe).equal(with_style)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert latents(pipe).equal(base)


def test_all_pipelines_of_a_transformer_have_its_loras(pipe) -> None:
    video = np.zeros((5, 32, 32, 3), dtype=np.float32)
    other = wanduet.WanVideoToVideoPipeline.from_pipe(pipe, torch_dtype=torch.float32)
    other.set_progress_bar_config(disable=True)

    def run() -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return other(
            video, "a", height=32, width=32, num_inference_steps=2, generator=generator, output_type="latent"
        ).frames

    base, plan = run(), pipe.plan(32, 32, 5)
    other.load_lora_weights(tensors())
    assert pipe.get_active_adapters() == ["default_0"]
    assert not run().equal(base)
    assert plan.loras is None
    assert pipe.plan(32, 32, 5).loras is not None


def test_another_transformer_has_no_loras(pipe, tmp_path) -> None:
    from diffusers import WanTransformer3DModel

    transformer = WanTransformer3DModel.from_pretrained(open_model("miniature").path, subfolder="transformer")
    base = latents(pipe)
    pipe.load_lora_weights(tensors())
    with_lora = latents(pipe)
    given = wanduet.WanPipeline.from_pipe(pipe, transformer=transformer)
    given.set_progress_bar_config(disable=True)
    assert given.get_list_adapters() == {}
    assert given.dtype == pipe.dtype
    assert latents(given).equal(base)
    given.load_lora_weights(tensors())
    assert latents(given).equal(with_lora)
    assert latents(pipe).equal(with_lora)


def test_where_files_are_found(pipe, tmp_path) -> None:
    for name in ("b.safetensors", "a.safetensors", "optimizer.safetensors", "more/c.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_file(tensors(), tmp_path / name)
    for number, (given, keywords, expected) in enumerate(
        [
            (tmp_path, {}, "a"), (tmp_path, {"weight_name": "b.safetensors"}, "b"),
            (str(tmp_path), {"subfolder": "more"}, "c"), (tmp_path / "b.safetensors", {"low_cpu_mem_usage": True}, "b"),
        ]
    ):  # fmt: skip
        pipe.load_lora_weights(given, **keywords)
        assert pipe.get_active_adapters() == [f"default_{number}"]
        assert pipe._parts.loras.loaded[f"default_{number}"].adapter.name == expected


def test_what_is_fetched(pipe, tmp_path, monkeypatch) -> None:
    save_file(tensors(), tmp_path / "adapter_model.safetensors")
    asked: list[Any] = []

    def fetch(repository: str, name: str, **keywords: Any) -> str:
        asked.append((repository, name, keywords))
        if not (tmp_path / name).exists():
            raise EntryNotFoundError("404")
        return str(tmp_path / name)

    files = [SimpleNamespace(rfilename=name) for name in ("adapter_model.safetensors", "more/a.safetensors", "x.json")]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    pipe.load_lora_weights("some/body", token="t", revision="v")
    keywords = {"subfolder": None, "token": "t", "revision": "v"}
    names = ("adapter_model.safetensors", "adapter_config.json")
    assert asked == [("some/body", name, keywords) for name in names]
    with pytest.raises(ModelNotFoundError, match=r"nobody/x is neither a file nor a folder.+404"):
        pipe.load_lora_weights("nobody/x", weight_name="b.safetensors")


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda pipe: pipe.load_lora_weights("not/there", local_files_only=True), ValueError, "weight_name="),
        (lambda pipe: pipe.load_lora_weights("/", weight_name="no.safetensors"), ModelNotFoundError, "no.safetensors"),
        (lambda pipe: pipe.load_lora_weights(tensors(width=1536)), WeightsError, "1536"),
        (lambda pipe: pipe.load_lora_weights({"a.lora_A.weight": 5}), ValueError, "tensors"),
        (lambda pipe: pipe.load_lora_weights({}), ValueError, "empty"),
        (lambda pipe: pipe.load_lora_weights(tensors(), load_into_transformer_2=True), ValueError, r"Wan2\.2"),
        (lambda pipe: pipe.load_lora_weights(tensors(), proxies={"http": "x"}), ValueError, "HTTPS_PROXY"),
        (lambda pipe: pipe.load_lora_weights(tensors(), weigth_name="x"), TypeError, "weight_name"),
        (lambda pipe: pipe.load_lora_weights(tensors(), adapter_name="style"), ValueError, "in use"),
        (lambda pipe: pipe.load_lora_weights(tensors(), hotswap=True), ValueError, "hotswap=True"),
        (lambda pipe: pipe.set_adapters("stile"), ValueError, "'stile' is loaded.+: style"),
        (lambda pipe: pipe.set_adapters(["style"], [0.5, 0.5]), ValueError, "2 values for 1"),
        (lambda pipe: pipe.set_adapters("style", {"unet": 0.5}), ValueError, "unet"),
        (lambda pipe: pipe.set_adapters("style", {"transformer": {"blocks.0": 0.5}}), ValueError, "each layer"),
        (lambda pipe: pipe.set_adapters("style", "much"), ValueError, "number"),
        (lambda pipe: pipe.fuse_lora(["text_encoder"]), ValueError, "transformer"),
        (lambda pipe: pipe.fuse_lora(adapter_names=["stile"]), ValueError, "stile"),
        (lambda pipe: pipe.unfuse_lora([]), ValueError, "transformer"),
        (lambda pipe: pipe.delete_adapters("stile"), ValueError, "stile"),
        (lambda pipe: latents(pipe, attention_kwargs={"scale": 0.5, "mask": 1}), ValueError, "mask"),
        (lambda pipe: latents(pipe, attention_kwargs={"scale": None}), ValueError, "scale"),
        (lambda pipe: latents(pipe, attention_kwargs={"scale": 11}), ValueError, "at most 10"),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(pipe, call, error, says) -> None:
    pipe.load_lora_weights(tensors(), adapter_name="style")
    with pytest.raises(error, match=says):
        call(pipe)
    assert (pipe.get_active_adapters(), pipe.get_list_adapters()) == (["style"], {"transformer": ["style"]})
    assert pipe.num_fused_loras == 0


def test_what_fused_loras_would_hide_is_refused(pipe) -> None:
    for name in ("a", "b"):
        pipe.load_lora_weights(tensors(), adapter_name=name)
    pipe.set_adapters(["a", "b"])
    pipe.fuse_lora(adapter_names=["a"])
    with pytest.raises(ValueError, match="'b' is active but not fused"):
        latents(pipe)
    for refused in (
        lambda: pipe.delete_adapters("a"),
        lambda: pipe.load_lora_weights(tensors(), adapter_name="a", hotswap=True),
    ):
        with pytest.raises(ValueError, match="fused"):
            refused()
    pipe.unfuse_lora()
    latents(pipe)


def test_a_callback_cannot_change_loras(pipe) -> None:
    pipe.load_lora_weights(tensors(), adapter_name="style")
    expected = latents(pipe)

    def callback(pipe, _step, _timestep, _tensors) -> dict[str, Any]:
        for change in (lambda: pipe.set_adapters("style", 0.5), pipe.unload_lora_weights, pipe.disable_lora):
            with pytest.raises(PipelineBusyError):
                change()
        return {}

    assert latents(pipe, callback_on_step_end=callback).equal(expected)


def test_a_few_step_lora_does_not_change_how_a_call_samples(pipe, tmp_path) -> None:
    pipe.load_lora_weights(tensors())
    expected = latents(pipe)
    save_file(tensors(), tmp_path / "wan_causvid.safetensors")
    pipe.load_lora_weights(tmp_path / "wan_causvid.safetensors", adapter_name="fast")
    assert pipe._parts.loras.loaded["fast"].adapter.few_step is not None
    assert latents(pipe).equal(expected)
