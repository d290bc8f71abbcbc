"""The forms of a model on the hub: what is fetched of each, and that its id is enough afterwards."""

import io
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from tests.weight_files import sentencepiece_model, tensors_of
from wanduet.config import EngineConfig, format_bytes
from wanduet.doors.cli.fetch import run_download
from wanduet.errors import ConfigError, ModelNotFoundError, WeightsError
from wanduet.family.wan21 import WAN_1_3B
from wanduet.models.dit.model import WanTransformer
from wanduet.models.vae.model import WanVAE
from wanduet.weights.compose import MissingPartsError
from wanduet.weights.forms import COMFY, forms_of
from wanduet.weights.hub import download, local_model, open_model, unverified_files, verify_manifest

MODEL, OFFICIAL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B"
FILES = {name: patterns[0] for name, patterns in forms_of(MODEL)["comfy"].files.items()}
PIECES = sentencepiece_model([("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁a", -1.0, 1)])


@pytest.fixture(scope="module")
def states() -> dict[str, dict[str, Tensor]]:
    """The tensors of a model of a megabyte, by the names of Diffusers."""
    text = tensors_of(open_model("miniature"), "text_encoder", official=False)
    transformer = replace(
        WAN_1_3B.transformer, num_attention_heads=1, ffn_dim=8, num_layers=1, text_dim=128, freq_dim=32
    )
    modules: dict[str, nn.Module] = {
        "transformer": WanTransformer(transformer), "vae": WanVAE(replace(WAN_1_3B.vae, base_dim=4)),
    }  # fmt: skip
    found = {name: {k: v.half() for k, v in module.state_dict().items()} for name, module in modules.items()}
    return found | {"text_encoder": text}


@pytest.fixture
def whole_model(hub) -> dict[str, bytes]:
    """A model in the Diffusers layout, which the hub has at first."""
    return dict(hub.files)


@pytest.fixture
def comfy(hub, states, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """ComfyUI's files, alone on the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    pieces = {"spiece_model": torch.tensor(list(PIECES), dtype=torch.uint8)}
    hub.files = {
        FILES[name]: save(state | (pieces if name == "text_encoder" else {})) for name, state in states.items()
    }
    hub.files["split_files/vae/another.safetensors"] = b"not needed"
    return hub.files


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    close_session()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("links", [True, False])
def test_comfys_three_files_are_a_model_by_its_id(hub, comfy, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *_: links)
    done = download(MODEL, form="comfy")
    assert {name for name, count in hub.sent.items() if count} == set(FILES.values())
    assert (done.form.repository, done.num_verified) == (COMFY, 3)
    hub.requests.clear()
    for name in (MODEL, OFFICIAL):
        folder = open_model(name)
        assert (folder.name, folder.revision, folder.path) == (name, None, done.folder.path)
        assert folder.spec.transformer.dim == 128
        assert folder.sentencepiece == PIECES
        assert unverified_files(folder) == []
    assert hub.requests == []
    offline(monkeypatch)
    assert download(MODEL, form="comfy").num_verified == 3
    assert verify_manifest(open_model(MODEL), None) >= 3
    path = done.folder.part("vae").resolve()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match=r"wan_2\.1_vae\.safetensors is damaged"):
        verify_manifest(open_model(MODEL), None, ("vae",))


def test_only_what_files_lack_is_fetched(hub, comfy, states, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "mine.safetensors"
    save_file(states["transformer"], own)
    with pytest.raises(MissingPartsError) as missing:
        local_model(str(own))
    assert missing.value.hint is not None
    assert f"wanduet download --model {shlex.quote(str(own))} (" in missing.value.hint
    assert (missing.value.model, set(missing.value.parts)) == (MODEL, {"transformer"})
    run_download(EngineConfig(model=str(own), data_dir=tmp_path / "data"), form="comfy")
    assert FILES["transformer"] not in hub.sent
    offline(monkeypatch)
    for model, files in ((str(own), {}), (MODEL, {"transformer": own})):
        folder = local_model(model, None, files)
        assert folder is not None
        assert (folder.part("transformer"), folder.part("vae").name) == (own, "wan_2.1_vae.safetensors")
    with pytest.raises(ModelNotFoundError):
        open_model(MODEL)  # without a transformer


def pickled(state: dict[str, Tensor]) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def test_the_official_repository_is_a_model_by_the_id_of_diffusers(
    hub, comfy, states, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files = {
        "config.json": b"{}", "README.md": b"", "Wan2.1_VAE.pth": pickled(states["vae"]),
        "diffusion_pytorch_model.safetensors": save(states["transformer"]),
        "models_t5_umt5-xxl-enc-bf16.pth": pickled(states["text_encoder"]), "google/umt5-xxl/tokenizer.json": b"{}",
    }  # fmt: skip
    done = download(MODEL, form="bf16")
    assert (done.form.repository, done.num_verified) == (OFFICIAL, 5)
    offline(monkeypatch)
    assert open_model(MODEL).path == open_model(OFFICIAL).path == done.folder.path
    assert (open_model(MODEL).revision, open_model(OFFICIAL).revision) == (None, done.folder.path.name)


def test_the_models_own_form_comes_first(hub, whole_model, comfy) -> None:
    download(MODEL, form="comfy")
    hub.files = whole_model
    whole = download(MODEL)
    assert whole.form.name == "full"
    assert open_model(MODEL).path == whole.folder.path


def test_the_sizes_of_all_forms_are_said_first(hub, comfy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = run_download(EngineConfig(model=MODEL, data_dir=tmp_path / "data"), form="comfy")
    total = sum(len(comfy[name]) for name in set(FILES.values()))
    assert (done["form"], done["bytes"], done["files_verified"]) == ("comfy", total, 3)
    said = capsys.readouterr().err
    assert f"Fetching {MODEL}, comfy ({COMFY})" in said
    assert f"--form: comfy {format_bytes(total)}\n" in said  # the only one that this hub has


def test_forms_that_are_not_there(hub, comfy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not known in the form 'comfy'"):
        download("some/model", form="comfy")
    with pytest.raises(ConfigError, match="--form is for a model of the hub"):
        run_download(EngineConfig(model="miniature", data_dir=tmp_path), form="comfy")
    del comfy[FILES["vae"]]
    with pytest.raises(ModelNotFoundError, match=r"has no split_files/vae/wan_2\.1_vae\.safetensors any more"):
        download(MODEL, form="comfy")
    assert hub.sent.total() == 0
