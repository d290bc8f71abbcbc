import dataclasses
import sys
import types

import pytest
import torch

from wanduet.ops import kernels, quack_products
from wanduet.ops.fused import TORCH_KERNELS

CUDA = torch.device("cuda", 0)


def offered(monkeypatch: pytest.MonkeyPatch, kernel_set: object) -> None:
    """Let `kernel_set` stand where Triton's kernels are imported from."""
    module = types.SimpleNamespace(TRITON_KERNELS=kernel_set)
    monkeypatch.setitem(sys.modules, "wanduet.ops.triton_kernels", module)
    check = kernels.largest_error
    cpu = torch.device("cpu")
    monkeypatch.setattr(kernels, "largest_error", lambda k, device, *rest, **more: check(k, cpu, *rest, **more))


def test_a_cpu_gets_the_plain_forms() -> None:
    assert kernels.kernels_for(torch.device("cpu"), torch.float32) is TORCH_KERNELS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_kernels_are_taken(monkeypatch, dtype) -> None:
    right = dataclasses.replace(TORCH_KERNELS, name="triton")
    offered(monkeypatch, right)
    assert kernels.kernels_for(CUDA, dtype) is right


def test_kernels_are_tried_at_the_model_s_width(monkeypatch) -> None:
    widths = set()

    def norm(x: torch.Tensor, *rest: object) -> torch.Tensor:
        widths.add(x.shape[-1])
        return TORCH_KERNELS.norm(x, *rest)

    def project(x: torch.Tensor, weight: torch.Tensor, *rest: object) -> torch.Tensor:
        widths.add(x.shape[-1])
        return TORCH_KERNELS.linear(x, weight, *rest)

    offered(monkeypatch, right := dataclasses.replace(TORCH_KERNELS, norm=norm, linear=project))
    assert kernels.kernels_for(CUDA, torch.float32, heads=4, head_dim=24) is right
    assert widths == {96}


@pytest.mark.parametrize(
    "spoilt", ["norm", "residual_norm", "qk_norm_rope", "qk_norm_rope_pair", "linear", "linear_gelu"]
)
@pytest.mark.parametrize("how", [1.05, float("nan")])
def test_wrong_kernels_are_dropped(monkeypatch, caplog, spoilt: str, how: float) -> None:
    def wrong(*args: object) -> object:
        out = getattr(TORCH_KERNELS, spoilt)(*args)
        return tuple(x * how for x in out) if isinstance(out, tuple) else out * how

    offered(monkeypatch, dataclasses.replace(TORCH_KERNELS, **{spoilt: wrong}))
    assert kernels.kernels_for(CUDA, torch.bfloat16) is TORCH_KERNELS
    assert "are wrong here" in caplog.text


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (RuntimeError("no compiler\n!cute.tensor<0x7f12> ...\n" * 40), "RuntimeError: no compiler"),
        (ImportError(), "ImportError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB ..."), "too little memory was free"),
        (ValueError("x" * 4000), "ValueError: xxx"),
    ],
)
def test_kernels_that_fail_are_dropped_with_one_sentence_of_what_that_costs(
    monkeypatch, caplog, recwarn, problem: Exception, said: str
) -> None:
    def broken(*args: object) -> object:
        raise problem

    offered(monkeypatch, dataclasses.replace(TORCH_KERNELS, norm=broken))
    assert kernels.kernels_for(CUDA, torch.bfloat16) is TORCH_KERNELS
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    line = record.getMessage()
    assert said in line
    assert "a fifth longer" in line
    assert "\n" not in line
    assert len(line) < 300
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("device", "gpus_here", "triton_here", "expected"),
    [
        ("cuda:0", True, True, "triton"),
        ("cuda:0", True, False, "torch"),
        ("cuda:0", False, False, "triton"),
        ("cpu", False, True, "torch"),
    ],
)
def test_memory_is_planned_for_the_kernels_that_will_run(monkeypatch, device, gpus_here, triton_here, expected) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus_here)
    monkeypatch.setattr(kernels, "_has_triton", lambda: triton_here)
    assert kernels.planned_vae_kernels(device).name == expected
    compiled = kernels.vae_kernels_to_compile(torch.device(device))
    assert (compiled is not None) == (device != "cpu" and triton_here)


def test_quack_s_products_are_taken_if_they_are_right(monkeypatch, caplog) -> None:
    offered(monkeypatch, right := dataclasses.replace(TORCH_KERNELS, name="triton"))
    monkeypatch.setattr(kernels, "has_quack", lambda device, dtype: True)
    monkeypatch.setattr(
        quack_products, "_product", lambda x, weight, bias, out, activation, plain: plain(x, weight, bias, out)
    )
    found = kernels.kernels_for(CUDA, torch.bfloat16)
    assert found.linear is quack_products.linear
    assert found.norm is right.norm
    monkeypatch.setattr(
        quack_products, "_product", lambda x, weight, bias, out, activation, plain: 1.05 * plain(x, weight, bias, out)
    )
    assert kernels.kernels_for(CUDA, torch.bfloat16) is right
    assert "quack's products are wrong here" in caplog.text
