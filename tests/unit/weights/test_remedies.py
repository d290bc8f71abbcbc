"""What is said of a damaged file names that file, and what brings a whole one."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.unit.weights.lora_files import Q, factors, read, saved
from tests.weight_files import tensors_of, write_shards
from wanduet.errors import WanduetError
from wanduet.weights.describe import describe_weights
from wanduet.weights.diffusers import ModelFolder
from wanduet.weights.hub import open_model

DOWNLOAD = "wanduet download"
LORA = {f"{Q}.lora_A.weight": factors(Q)[0], f"{Q}.lora_B.weight": factors(Q)[1]}


@pytest.fixture(scope="module")
def miniature() -> ModelFolder:
    return open_model("miniature")


def refusal(component: str, path: Path) -> WanduetError:
    with pytest.raises(WanduetError) as caught:
        open_model("miniature", files={component: path}).check_complete()
    assert path.name in caught.value.message
    return caught.value


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("ending", ["safetensors", "pth", "gguf"])
def test_a_single_file(component: str, ending: str, tmp_path: Path, miniature: ModelFolder) -> None:
    path = tmp_path / f"mine.{ending}"
    if ending == "gguf":
        path.write_bytes(b"GGUF\3\0\0\0" + bytes(range(1, 100)))
    else:
        state = tensors_of(miniature, component)
        save_file(state, path) if ending == "safetensors" else torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-5000])
    assert refusal(component, path).hint == (
        f"Fetch mine.{ending} again, and compare its size with that on the page it came from."
    )


def test_a_single_file_that_lacks_tensors(tmp_path: Path, miniature: ModelFolder) -> None:
    state = tensors_of(miniature, "transformer")
    del state["blocks.2.self_attn.norm_q.weight"]
    save_file(state, tmp_path / "mine.safetensors")
    shapes = miniature.transformer.shapes
    with pytest.raises(WanduetError, match=r"mine\.safetensors is no whole transformer.*missing: blocks\.2") as caught:
        open_model("miniature", files={"transformer": tmp_path / "mine.safetensors"}).transformer.check(shapes)
    assert "another file of the same weights" in str(caught.value.hint)


def test_a_file_of_a_models_folder(tmp_path: Path, folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WanduetError, match="is damaged") as caught:
        _ = open_model(str(folder)).vae
    assert DOWNLOAD in str(caught.value.hint)


@pytest.mark.parametrize("place", ["mine", "models--somebody--motion/snapshots/0"])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_lora(place: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / place / f"motion.{ending}"
    path.parent.mkdir(parents=True)
    if ending == "pt":
        torch.save(LORA, path)
    else:
        saved(path, LORA)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(WanduetError, match=r"motion\.") as caught:
        read(path)
    hint = str(caught.value.hint)
    assert DOWNLOAD not in hint
    assert ("motion" in hint or "LoRA" in hint, "again" in hint) == (True, True)


def test_a_tokenizers_folder(tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    error = refusal("tokenizer", tmp_path / "words")
    assert error.hint == "Give a folder with tokenizer.json, or a SentencePiece model."


def test_a_folder_of_one_component(tmp_path: Path, miniature: ModelFolder) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text((miniature.part("vae") / "config.json").read_text())
    assert refusal("vae", tmp_path / "vae").hint == "Give one file with weights as --vae."


def test_few_step_weights_are_named_by_their_own_file(tmp_path: Path, miniature: ModelFolder) -> None:
    path = tmp_path / "TurboWan2.1-T2V-1.3B-480P.safetensors"
    save_file(tensors_of(miniature, "transformer"), path)
    assert DOWNLOAD not in str(refusal("transformer", path).hint)


def test_one_of_several_files(tmp_path: Path, miniature: ModelFolder) -> None:
    index = write_shards(tmp_path, tensors_of(miniature, "transformer"))
    for shard in sorted(tmp_path.glob("*-of-*.safetensors")):
        error = refusal("transformer", shard)
        assert "one of the 3 files" in error.message
        assert index.name in str(error.hint)
        with pytest.raises(WanduetError, match="one of the 3 files"):
            describe_weights(shard)
    with pytest.raises(WanduetError, match=r"no config\.json") as caught:
        _ = open_model("miniature", files={"transformer": tmp_path}).spec
    assert "the index of several" in str(caught.value.hint)
    with pytest.raises(WanduetError, match="no model in the Diffusers layout") as caught:
        open_model(str(tmp_path))
    assert "--transformer, --vae" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["wan2.1_t2v_1.3B_fp16.safetensors", "models/unet/wan2.1-t2v-14b-Q8_0.gguf"])
def test_a_file_that_is_not_there(name: str) -> None:
    with pytest.raises(WanduetError, match="There is no model") as caught:
        open_model(name)
    assert "no such file" in str(caught.value.hint)


def test_comfyuis_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / "diffusion_models").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "models"):
        with pytest.raises(WanduetError) as caught:
            open_model(str(folder))
        assert "diffusion_models, vae and text_encoders" in str(caught.value.hint)
