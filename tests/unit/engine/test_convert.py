"""Folders that `convert` writes: the same videos as of the source in bfloat16, whole or not there at all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.weight_files import prefixed, sentencepiece_model, tensors_of, write_official
from wanduet.config import EngineConfig
from wanduet.engine.job import OutputOptions
from wanduet.engine.pipeline import Engine
from wanduet.errors import OutputError, WeightsError
from wanduet.media.read import frame_hashes
from wanduet.models.text.tokenizer import Tokenizer
from wanduet.request import GenerationRequest
from wanduet.runtime import convert as converting
from wanduet.runtime.convert import convert
from wanduet.weights import writer
from wanduet.weights.diffusers import COMPONENTS, ModelFolder
from wanduet.weights.hub import open_model, verify_manifest

SMALL = {"prompt": "a red circle", "height": 32, "width": 32, "num_frames": 5, "seed": 3, "num_inference_steps": 2}


def exact_values(model: ModelFolder) -> dict[str, dict[str, torch.Tensor]]:
    """The miniature's tensors with values that neither bfloat16 nor float16 has."""
    return {
        name: {k: v.float() * (1 + 2**-13) for k, v in tensors_of(model, name, official=False).items()}
        for name in COMPONENTS
    }


@pytest.fixture
def source(tmp_path: Path) -> ModelFolder:
    """A model of float32 files, the transformer under a prefix."""
    model = open_model("miniature")
    files = {name: tmp_path / f"{name}.safetensors" for name in COMPONENTS}
    for name, state in exact_values(model).items():
        save_file(prefixed("model.diffusion_model." if name == "transformer" else "", state), files[name])
    return open_model("miniature", files=files)


def frames(config: EngineConfig, path: Path) -> object:
    with Engine(config) as engine:
        engine.submit(GenerationRequest(**SMALL), OutputOptions(path, "ffv1")).result(120)
    return frame_hashes(path)


def test_a_converted_model_makes_the_same_video(config: EngineConfig, source: ModelFolder, tmp_path: Path) -> None:
    made = convert(source, tmp_path / "new" / "wan").folder
    assert verify_manifest(made, None) == len([path for path in made.path.rglob("*") if path.is_file()]) - 1
    dtypes = {name: {info.dtype for info in getattr(made, name).tensors.values()} for name in COMPONENTS}
    assert dtypes == {"transformer": {"BF16", "F32"}, "vae": {"F32"}, "text_encoder": {"BF16"}}
    rounded = replace(config, transformer_dtype="bfloat16", text_encoder_dtype="bfloat16")
    files = {name: source.part(name) for name in COMPONENTS}
    before = frames(replace(rounded, **files), tmp_path / "before.mkv")
    assert frames(replace(rounded, model=str(made.path)), tmp_path / "after.mkv") == before


def test_an_official_folder_in_shards(source: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 4 * 2**20)
    model = open_model(str(write_official(tmp_path / "official", open_model("miniature"))))
    made = convert(model, tmp_path / "wan").folder
    shards = sorted(path.name for path in (made.path / "transformer").glob("*.safetensors"))
    assert shards == [f"diffusion_pytorch_model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
    for component in COMPONENTS:
        ours, theirs = getattr(made, component), getattr(model, component)
        assert ours.shapes == theirs.shapes
        read = theirs.read(list(theirs.tensors), torch.float32)
        for name, tensor in ours.iterate(list(ours.tensors)):
            torch.testing.assert_close(tensor.float(), read[name], rtol=0, atol=0)
    index = json.loads((made.path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    written = [load_file(made.path / "transformer" / shard) for shard in shards]
    assert index["metadata"]["total_size"] == sum(t.nbytes for state in written for t in state.values())


def test_weights_in_8_bits_become_the_dequantised_ones(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    files = {"transformer": tmp_path / "t.gguf", "text_encoder": tmp_path / "fp8.safetensors"}
    model, scaled = open_model("miniature"), {}
    writer = gguf.GGUFWriter(files["transformer"], "wan")
    for name, tensor in tensors_of(model, "transformer").items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 and name.startswith("blocks.") else None
        data = tensor.float().numpy()
        writer.add_tensor(name, data if kind is None else gguf.quants.quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name, tensor in tensors_of(model, "text_encoder", official=False).items():
        scaled[name] = tensor
        if ".SelfAttention.q" in name:
            scaled[name] = (tensor.float() * 100).to(torch.float8_e4m3fn)
            scaled[name.removesuffix("weight") + "scale_weight"] = torch.tensor(0.01)
    save_file(scaled, files["text_encoder"])
    source = open_model("miniature", files=files)
    made = convert(source, tmp_path / "wan").folder
    assert source.transformer.quantisation
    assert made.transformer.quantisation is None
    for component in files:
        ours, theirs = getattr(made, component), getattr(source, component)
        read = theirs.read(list(theirs.tensors), torch.float32)
        for name, tensor in ours.iterate(list(ours.tensors)):
            torch.testing.assert_close(tensor, read[name].to(tensor.dtype), rtol=0, atol=0)


def test_diffusers_reads_it(source: ModelFolder, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    made = convert(source, tmp_path / "wan").folder
    kinds = {"transformer": WanTransformer3DModel, "vae": AutoencoderKLWan, "text_encoder": UMT5EncoderModel}
    for name, kind in kinds.items():
        model = kind.from_pretrained(made.part(name), torch_dtype=torch.float32, local_files_only=True)
        read, tensors = getattr(made, name).read(list(getattr(made, name).tensors), torch.float32), model.state_dict()
        for tensor in read:
            torch.testing.assert_close(tensors[tensor], read[tensor], rtol=0, atol=0)


def test_a_tokenizer_in_the_text_encoders_file_becomes_a_folder(source: ModelFolder, tmp_path: Path) -> None:
    data = sentencepiece_model(
        [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁a", -1.0, 1), ("▁red", -2.0, 1)]
    )
    state = load_file(source.part("text_encoder")) | {"spiece_model": torch.tensor(list(data), dtype=torch.uint8)}
    path = tmp_path / "umt5.safetensors"
    save_file(state, path)
    model = open_model("miniature", files={"text_encoder": path})
    made = convert(model, tmp_path / "wan").folder
    ids = Tokenizer(made.tokenizer)("a red  a zebra").ids
    assert ids == Tokenizer(path, data)("a red  a zebra").ids
    assert ids[:2] == (3, 4)
    assert (made.tokenizer / "spiece.model").read_bytes() == data


def test_nothing_is_overwritten_and_nothing_half_is_left(
    source: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.iterdir())
    target = tmp_path / "wan"

    def stop(done: int, total: int) -> None:
        if done > total // 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, stop)
    assert sorted(tmp_path.iterdir()) == before
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1))
        with pytest.raises(OutputError, match=r"needs .* MiB"):
            convert(source, target)
        patch.undo()
        patch.setattr(converting, "write_weights", lambda *_: {"model.safetensors": "0" * 64})
        with pytest.raises(WeightsError, match="cannot be read as written"):
            convert(source, target)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / ".wan.partial" / "transformer").mkdir(parents=True)  # of a process that was killed
    convert(source, target)
    assert sorted(tmp_path.iterdir()) == sorted([*before, target])
    with pytest.raises(OutputError, match="exists; nothing is overwritten"):
        convert(source, target)
