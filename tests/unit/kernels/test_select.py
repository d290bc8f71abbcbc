import dataclasses
import functools
import sys
import types
from collections.abc import Iterator

import pytest
import torch

from wanduet.errors import KernelFailedError
from wanduet.kernels import check as kernel_checks
from wanduet.kernels import select, verdicts
from wanduet.kernels.dit import quack
from wanduet.kernels.dit.plain import TORCH_KERNELS
from wanduet.kernels.dit.weight import Weight

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def new_process(monkeypatch) -> Iterator[None]:
    verdicts.forget()
    yield
    verdicts.forget()


def offered(monkeypatch: pytest.MonkeyPatch, kernel_set: object) -> None:
    """Let `kernel_set` stand where Triton's kernels are imported from."""
    module = types.SimpleNamespace(TRITON_KERNELS=kernel_set)
    monkeypatch.setitem(sys.modules, "wanduet.kernels.dit.gpu", module)
    check = select.largest_error
    cpu = torch.device("cpu")
    monkeypatch.setattr(select, "largest_error", lambda k, device, *rest, **more: check(k, cpu, *rest, **more))


def test_a_cpu_gets_the_plain_forms() -> None:
    assert select.kernels_for(torch.device("cpu"), torch.float32) is TORCH_KERNELS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_kernels_are_taken(monkeypatch, dtype) -> None:
    right = dataclasses.replace(TORCH_KERNELS, name="triton")
    offered(monkeypatch, right)
    assert select.kernels_for(CUDA, dtype) is right


def test_kernels_are_tried_at_the_model_s_width(monkeypatch) -> None:
    widths = set()

    def norm(x: torch.Tensor, *rest: object) -> torch.Tensor:
        widths.add(x.shape[-1])
        return TORCH_KERNELS.norm(x, *rest)

    def project(x: torch.Tensor, weight: Weight, *rest: object) -> torch.Tensor:
        widths.add(x.shape[-1])
        return TORCH_KERNELS.linear(x, weight, *rest)

    offered(monkeypatch, right := dataclasses.replace(TORCH_KERNELS, norm=norm, linear=project))
    assert select.kernels_for(CUDA, torch.float32, heads=4, head_dim=24) is right
    assert widths == {96}


@pytest.mark.parametrize(
    "spoilt", ["norm", "residual_norm", "qk_norm_rope", "qk_norm_rope_pair", "linear", "linear_gelu", "text_attention"]
)
@pytest.mark.parametrize("how", [1.05, float("nan")])
def test_a_wrong_kernel_is_dropped_alone(monkeypatch, caplog, spoilt: str, how: float) -> None:
    def wrong(*args: object) -> object:
        out = getattr(TORCH_KERNELS, spoilt)(*args)
        return tuple(x * how for x in out) if isinstance(out, tuple) else out * how

    mine = {name: functools.partial(getattr(TORCH_KERNELS, name)) for name in kernel_checks.CASES}
    offered(monkeypatch, dataclasses.replace(TORCH_KERNELS, name="triton", **(mine | {spoilt: wrong})))
    found = select.kernels_for(CUDA, torch.bfloat16)
    assert found.name == f"triton without {spoilt}"
    for name, run in mine.items():
        assert getattr(found, name) is (getattr(TORCH_KERNELS, name) if name == spoilt else run)
    assert f"Triton's kernels ({spoilt}) cannot be used here (wrong, error " in caplog.text


def test_a_kernel_of_long_texts_that_does_not_fit_is_found_by_the_check(monkeypatch, caplog) -> None:
    def text_attention(q, weight, eps, keys, *rest):
        if keys.shape[1] > 128:
            raise RuntimeError("out of resource: shared memory, Required: 163840, Hardware limit: 101376")
        return TORCH_KERNELS.text_attention(q, weight, eps, keys, *rest)

    offered(monkeypatch, dataclasses.replace(TORCH_KERNELS, name="triton", text_attention=text_attention))
    assert select.kernels_for(CUDA, torch.bfloat16).text_attention is TORCH_KERNELS.text_attention
    assert "out of resource" in caplog.text


def test_what_did_not_work_is_planned_for_by_this_process_and_by_the_next(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some Card")
    monkeypatch.setattr(select, "triton_problem", lambda: None)
    assert select.plans_triton(select.TRITON, "cuda:0")

    def wrong(*args: object) -> torch.Tensor:
        return 2 * TORCH_KERNELS.norm(*args)

    offered(monkeypatch, dataclasses.replace(TORCH_KERNELS, name="triton", norm=wrong))
    select.kernels_for(CUDA, torch.bfloat16)
    assert not select.plans_triton(select.TRITON, "cuda:0")
    assert select.planned_vae_kernels("cuda:0").name == "triton"
    verdicts.write_verdicts(tmp_path)

    verdicts.forget()
    verdicts.read_verdicts(tmp_path)
    assert not select.plans_triton(select.TRITON, "cuda:0")
    verdicts.forget()
    monkeypatch.setattr(verdicts, "machine_state", lambda: "another driver")
    verdicts.read_verdicts(tmp_path)
    assert select.plans_triton(select.TRITON, "cuda:0")

    offered(monkeypatch, dataclasses.replace(TORCH_KERNELS, name="triton"))
    select.kernels_for(CUDA, torch.bfloat16)
    assert select.plans_triton(select.TRITON, "cuda:0")


def test_a_gpu_that_is_not_here_is_planned_for_beside_one_that_is(monkeypatch) -> None:
    """As by `plan --hardware 2x3090` on a machine with one GPU."""

    def name_of(device: torch.device) -> str:
        if device.index:
            raise AssertionError("Invalid device id")  # as PyTorch does
        return "Some Card"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", name_of)
    monkeypatch.setattr(select, "triton_problem", lambda: None)
    verdicts.remember_failure("norm", torch.device("cpu"))
    assert select.plans_triton(select.TRITON, "cuda:0")
    verdicts.remember_failure("norm", torch.device("cuda:0"))
    assert not select.plans_triton(select.TRITON, "cuda:0")
    assert select.plans_triton(select.TRITON, "cuda:1")
    assert select.planned_vae_kernels("cuda:1").name == "triton"


def test_short_memory_says_nothing_about_a_kernel(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some Card")
    monkeypatch.setattr(select, "triton_problem", lambda: None)

    def short(*args: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    offered(monkeypatch, dataclasses.replace(TORCH_KERNELS, name="triton", norm=short))
    assert select.kernels_for(CUDA, torch.bfloat16).norm is TORCH_KERNELS.norm
    assert select.plans_triton(select.TRITON, "cuda:0")


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 1}', '{"x": {"state": "y"}}', '{"x": {"plain": 3}}'])
def test_a_damaged_file_of_verdicts_says_nothing(tmp_path, content: str) -> None:
    (tmp_path / verdicts.VERDICTS_FILE).write_text(content)
    verdicts.read_verdicts(tmp_path)
    assert verdicts.plain_operations(select.TRITON, CUDA) is None


def test_what_triton_lacks_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CC", "")
    monkeypatch.setattr(verdicts.shutil, "which", lambda name: None)
    assert "C compiler" in verdicts.triton_problem()
    monkeypatch.setattr(verdicts.shutil, "which", lambda name: "/usr/bin/gcc")
    monkeypatch.setattr(verdicts.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "header" in verdicts.triton_problem()
    (tmp_path / "Python.h").touch()
    assert verdicts.triton_problem() is None


def test_a_guarded_kernel_names_itself_when_it_fails() -> None:
    def broken(*args: object) -> object:
        raise RuntimeError("out of resource: shared memory\nmore")

    def short(*args: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    guarded = select.guarded(dataclasses.replace(TORCH_KERNELS, text_attention=broken, norm=short))
    assert guarded.linear is TORCH_KERNELS.linear
    with pytest.raises(KernelFailedError) as failed:
        guarded.text_attention()
    assert (failed.value.operation, failed.value.reason) == (
        "text_attention",
        "RuntimeError: out of resource: shared memory",
    )
    with pytest.raises(torch.OutOfMemoryError):
        guarded.norm()


def test_a_kernel_that_failed_in_a_job_is_not_tried_again(monkeypatch) -> None:
    def mine(*args: object) -> torch.Tensor:
        return TORCH_KERNELS.norm(*args)

    offered(monkeypatch, right := dataclasses.replace(TORCH_KERNELS, name="triton", norm=mine))
    assert select.kernels_for(CUDA, torch.bfloat16) is right
    left = select.without(right, "norm", CUDA)
    assert left.norm is TORCH_KERNELS.norm
    assert select.kernels_for(CUDA, torch.bfloat16).norm is TORCH_KERNELS.norm


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
    assert select.kernels_for(CUDA, torch.bfloat16) is TORCH_KERNELS
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
    monkeypatch.setattr(select, "has_triton", lambda: triton_here)
    monkeypatch.setattr(select, "triton_problem", lambda: None if triton_here else "Triton is not installed")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Some Card")
    assert select.planned_vae_kernels(device).name == expected
    compiled = select.vae_kernels_to_compile(torch.device(device))
    assert (compiled is not None) == (device != "cpu" and triton_here)


def test_quack_s_products_are_taken_if_they_are_right(monkeypatch, caplog) -> None:
    offered(monkeypatch, right := dataclasses.replace(TORCH_KERNELS, name="triton"))
    monkeypatch.setattr(select, "has_quack", lambda device, dtype: True)
    monkeypatch.setattr(quack, "_product", lambda x, weight, bias, out, activation, plain: plain(x, weight, bias, out))
    found = select.kernels_for(CUDA, torch.bfloat16)
    assert found.linear is quack.linear
    assert found.norm is right.norm
    monkeypatch.setattr(
        quack, "_product", lambda x, weight, bias, out, activation, plain: 1.05 * plain(x, weight, bias, out)
    )
    assert select.kernels_for(CUDA, torch.bfloat16) is right
    assert "quack's products cannot be used here (wrong, error" in caplog.text
