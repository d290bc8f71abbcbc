"""Every form of 8-bit weights with scales gives the tensors of its formula, and every other form is refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wanduet.errors import WeightsError
from wanduet.kernels.dit.weight import Weight
from wanduet.weights import quantised
from wanduet.weights.quantised import dequantised
from wanduet.weights.safetensors import TensorFiles
from wanduet.weights.source import WeightSource

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LAYER = "blocks.0.ffn.0"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS = normal(6, 128), normal(6, seed=1).bfloat16()
ROWS, GROUPS = normal(6, 1, seed=2).abs() + 0.5, normal(6, 2, 1, seed=3).abs() + 0.5
INT8 = (WEIGHT * 30).round().clamp(-127, 127).to(torch.int8)


def source(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> TensorFiles:
    path = folder / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)  # no shared memory
    return TensorFiles("transformer", [path])


def read(found: WeightSource) -> dict[str, Tensor]:
    """All tensors, which have the shapes and dtypes that were known before."""
    tensors = {name: tensor.clone() for name, tensor in found.iterate(list(found.tensors))}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == found.shapes
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "U8": torch.uint8}
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        n: names[i.dtype] for n, i in found.tensors.items()
    }
    return tensors


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("marker", [0, 2])
@pytest.mark.parametrize(
    ("scale", "kind"),
    [
        (torch.tensor(0.37), "a scale a matrix"),
        (torch.tensor([0.37]), "a scale a matrix"),
        (ROWS, "a scale a row"),
        (GROUPS, "a scale for 64 columns"),
    ],
    ids=["number", "one", "rows", "groups"],
)
def test_fp8_scaled_of_the_first_form(tmp_path, prefix: str, dtype, marker: int, scale: Tensor, kind: str) -> None:
    stored = WEIGHT.to(dtype)
    found = dequantised(
        source(
            tmp_path,
            {
                f"{prefix}scaled_fp8": torch.empty(marker, dtype=dtype),
                f"{prefix}{LAYER}.weight": stored,
                f"{prefix}{LAYER}.scale_weight": scale,
                f"{prefix}{LAYER}.scale_input": torch.tensor(3.0),
                f"{prefix}{LAYER}.bias": BIAS,
            },
        )
    )
    got = read(found)
    assert got.keys() == {f"{prefix}{LAYER}.weight", f"{prefix}{LAYER}.bias"}
    whole = scale.repeat_interleave(64, 1)[..., 0] if scale.ndim == 3 else scale
    assert torch.equal(got[f"{prefix}{LAYER}.weight"], stored.float() * whole)
    assert torch.equal(got[f"{prefix}{LAYER}.bias"], BIAS)
    assert found.quantisation == f"fp8 ({'e4m3fn' if dtype == E4M3 else 'e5m2'}), {kind}"


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_plain_fp8(tmp_path: Path, dtype: torch.dtype) -> None:
    found = dequantised(source(tmp_path, {"a.weight": WEIGHT.to(dtype), "a.bias": BIAS.to(dtype), "b": BIAS}))
    got = read(found)
    assert torch.equal(got["a.weight"], WEIGHT.to(dtype).float())
    assert torch.equal(got["a.bias"], BIAS.to(dtype).float())
    assert got["b"].dtype == torch.bfloat16
    assert found.quantisation == f"fp8 ({'e4m3fn' if dtype == E4M3 else 'e5m2'})"


def described(format: str, layer: str, **more: object) -> dict[str, str]:
    layers = {layer: {"format": format, **more}}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def as_tensor(format: str, **more: object) -> Tensor:
    return torch.tensor(list(json.dumps({"format": format, **more}).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("format", "stored", "scale"),
    [
        ("float8_e4m3fn", WEIGHT.to(E4M3), torch.tensor(0.37)),
        ("float8_e5m2", WEIGHT.to(E5M2), torch.tensor([0.37])),
        ("int8_tensorwise", INT8, torch.tensor(0.02)),
        ("int8_tensorwise", INT8, ROWS / 127),
    ],
)
@pytest.mark.parametrize("where", ["metadata", "metadata without prefix", "metadata with prefix", "tensor"])
def test_the_second_form(tmp_path: Path, format: str, stored: Tensor, scale: Tensor, where: str) -> None:
    """A description may be in the metadata or beside each layer, with or without the tensors' prefix."""
    prefix = "model.diffusion_model."
    name = LAYER if where == "metadata with prefix" else prefix + LAYER
    layer = {"metadata": name, "metadata without prefix": LAYER, "metadata with prefix": prefix + LAYER}.get(where)
    tensors = {f"{name}.weight": stored, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.tensor(2.0)}
    if layer is None:
        tensors[f"{name}.comfy_quant"] = as_tensor(format)
    got = read(dequantised(source(tmp_path, tensors, None if layer is None else described(format, layer))))
    assert got.keys() == {f"{name}.weight"}
    assert torch.equal(got[f"{name}.weight"], stored.float() * scale)


@pytest.mark.parametrize("stored", [INT8, WEIGHT.to(E4M3)])
def test_rows_without_a_description(tmp_path: Path, stored: Tensor) -> None:
    found = dequantised(source(tmp_path, {f"{LAYER}.weight": stored, f"{LAYER}.weight_scale": ROWS}))
    assert torch.equal(read(found)[f"{LAYER}.weight"], stored.float() * ROWS)
    assert (found.quantisation or "").endswith(", a scale a row")


@pytest.mark.parametrize("scale", [None, torch.tensor(0.37), ROWS, GROUPS])
def test_single_rows(tmp_path: Path, scale: Tensor | None) -> None:
    tensors = {"a.weight": WEIGHT.to(E4M3), "b.weight": WEIGHT}
    found = dequantised(source(tmp_path, tensors if scale is None else tensors | {"a.scale_weight": scale}))
    for name in ("a.weight", "b.weight"):
        assert torch.equal(found.read_rows(name, [4, 0, 4], torch.float32), read(found)[name][[4, 0, 4]])
        with pytest.raises(WeightsError, match="6 rows"):
            found.read_rows(name, [6], torch.float32)


def test_what_is_not_quantised_is_the_source_itself(tmp_path: Path) -> None:
    files = source(tmp_path, {"a.weight": WEIGHT, "spiece_model": torch.zeros(9, dtype=torch.uint8)})
    assert dequantised(files) is files


def test_the_fingerprint_is_not_that_of_the_stored_bytes(tmp_path: Path) -> None:
    files = source(tmp_path, {"a.weight": INT8, "a.weight_scale": ROWS})
    first = dequantised(files).fingerprint()
    assert first == dequantised(files).fingerprint() != files.fingerprint()
    other = source(tmp_path, {"a.weight": INT8, "a.weight_scale": ROWS * 2})
    assert dequantised(other).fingerprint() != first


def test_scales_are_read_in_portions_with_the_same_result(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {f"{i}.weight": WEIGHT.to(E4M3) for i in range(5)} | {f"{i}.scale_weight": ROWS * i for i in range(5)}
    found = dequantised(source(tmp_path, tensors))
    expected, asked = read(found), []
    monkeypatch.setattr(quantised, "SCALE_BYTES", 2 * ROWS.nbytes)
    monkeypatch.setattr(
        found.source,
        "read",
        lambda names, dtype: asked.append(len(names)) or WeightSource.read(found.source, names, dtype),
    )  # type: ignore[attr-defined]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read(found).items())
    assert asked == [2, 2, 1]


@pytest.mark.parametrize(
    "scale",
    [torch.ones(5, 1), torch.ones(6, 3, 1), torch.ones(2), torch.ones(6, 128), torch.ones(1, 1, 1), torch.ones(0)],
    ids=lambda scale: str(tuple(scale.shape)),
)
def test_a_scale_of_a_wrong_shape_is_named(tmp_path: Path, scale: Tensor) -> None:
    with pytest.raises(WeightsError, match=rf"scale of the transformer's {LAYER}\.weight"):
        dequantised(source(tmp_path, {f"{LAYER}.weight": WEIGHT.to(E4M3), f"{LAYER}.scale_weight": scale}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_no_number_is_named(tmp_path: Path, value: float) -> None:
    found = dequantised(source(tmp_path, {"a.weight": INT8, "a.weight_scale": torch.tensor(value)}))
    with pytest.raises(WeightsError, match=r"a\.weight is not a finite number"):
        read(found)


BYTES = torch.zeros(6, 64, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("format", "tensors"),
    [
        ("quanto", {"a.weight._data": INT8, "a.weight._scale": ROWS}),
        ("nunchaku", {"a.qweight": INT8, "a.wscales": ROWS, "a.proj_down": WEIGHT}),
        ("bitsandbytes", {"a.weight": BYTES, "a.weight.absmax": ROWS, "a.weight.quant_map": ROWS}),
        ("bitsandbytes", {"a.weight": BYTES, "a.weight.quant_state.bitsandbytes__nf4": BYTES}),
        ("bitsandbytes", {"a.weight": INT8, "a.SCB": ROWS}),
        ("torchao", {"a.weight:qdata": INT8, "a.weight:scale": ROWS}),
        ("GPTQ or AWQ", {"a.qweight": INT8, "a.qzeros": INT8}),
        ("nvfp4", {"a.weight": BYTES, "a.weight_scale": ROWS.to(E4M3), "a.weight_scale_2": torch.ones(())}),
        ("4 bits", {"a.weight": BYTES, "a.weight_scale": ROWS}),
        ("mxfp8", {"a.weight": WEIGHT.to(E4M3), "a.weight_scale": torch.zeros(6, 4, dtype=torch.uint8)}),
        ("int8 without scales", {"a.weight": INT8}),
        ("pre_quant_scale", {"a.weight": INT8, "a.weight_scale": ROWS, "a.pre_quant_scale": torch.ones(128)}),
        ("F8_E4M3FNUZ", {"a.weight": WEIGHT.to(torch.float8_e4m3fnuz)}),
    ],
)
def test_other_formats_are_refused_by_name_with_what_to_take(tmp_path: Path, format: str, tensors) -> None:
    with pytest.raises(WeightsError, match=format) as refused:
        dequantised(source(tmp_path, tensors))
    assert "GGUF" in (refused.value.hint or "")


@pytest.mark.parametrize(
    ("format", "more", "words"),
    [
        ("mxfp8", {}, "mxfp8"),
        ("nvfp4", {}, "nvfp4"),
        ("convrot_w4a4", {}, "convrot_w4a4"),
        ("asym_w4a8_int8", {}, "asym_w4a8_int8"),
        ("int8_tensorwise", {"convrot": True, "convrot_groupsize": 64}, "convrot"),
    ],
)
@pytest.mark.parametrize("in_tensor", [True, False])
def test_described_formats_are_refused_by_name(tmp_path, format: str, more: dict, words: str, in_tensor: bool) -> None:
    tensors = {f"{LAYER}.weight": INT8, f"{LAYER}.weight_scale": ROWS}
    if in_tensor:
        files = source(tmp_path, tensors | {f"{LAYER}.comfy_quant": as_tensor(format, **more)})
    else:
        files = source(tmp_path, tensors, described(format, LAYER, **more))
    with pytest.raises(WeightsError, match=words) as refused:
        dequantised(files)
    assert LAYER in refused.value.message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"layers": 5}',
        '{"layers": ["a"]}',
        '{"layers": {"a": []}}',
        '{"layers": {"a": {}}}',
        "[" * 9999,
    ],
)
def test_a_description_that_is_none_is_an_error(tmp_path: Path, text: str) -> None:
    files = source(tmp_path, {"a.weight": INT8, "a.weight_scale": ROWS}, {"_quantization_metadata": text})
    with pytest.raises(WeightsError, match="not understood"):
        dequantised(files)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(9000, dtype=torch.uint8), torch.zeros(4), torch.zeros(4, dtype=torch.uint8)]
)
def test_a_description_in_a_tensor_is_bounded(tmp_path: Path, tensor: Tensor) -> None:
    files = source(tmp_path, {"a.weight": INT8, "a.weight_scale": ROWS, "a.comfy_quant": tensor})
    with pytest.raises(WeightsError, match="not understood"):
        dequantised(files)


def test_a_description_that_contradicts_the_dtype_is_an_error(tmp_path: Path) -> None:
    files = source(tmp_path, {"a.weight": INT8, "a.weight_scale": ROWS}, described("float8_e4m3fn", "a"))
    with pytest.raises(WeightsError, match="described as fp8"):
        dequantised(files)


def test_two_scales_are_an_error(tmp_path: Path) -> None:
    tensors = {"a.weight": INT8, "a.weight_scale": ROWS, "a.scale_weight": ROWS}
    with pytest.raises(WeightsError, match="two scales"):
        dequantised(source(tmp_path, tensors))


@pytest.mark.parametrize("scale", [None, torch.tensor(0.0037), ROWS / 448], ids=["none", "number", "rows"])
def test_kept_in_fp8_the_stored_numbers_are_not_rounded_again(tmp_path: Path, scale: Tensor | None) -> None:
    tensors = {"a.weight": (WEIGHT * 50).to(E4M3)} | ({} if scale is None else {"a.scale_weight": scale})
    found = dequantised(source(tmp_path, tensors))
    target = Weight(torch.empty(6, 128, dtype=E4M3), torch.empty(6, 1))
    found.load_into({"a.weight": target})
    assert torch.equal(target.dense(torch.bfloat16), read(found)["a.weight"].bfloat16())
