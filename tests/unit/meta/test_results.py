"""What is told of an operation's result on the meta device is what PyTorch's own kernels give on the CPU."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from wanduet.meta.results import RULES, meta_result
from wanduet.meta.trace import Footprint

aten = torch.ops.aten


def plain(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape).to(dtype)


def last(*shape: int) -> Tensor:
    """With the channels last in memory."""
    layout = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.rand(shape).contiguous(memory_format=layout)


def cut(x: Tensor) -> Tensor:
    """A part of something larger, with gaps in memory."""
    return torch.cat((x, x), dim=2)[:, :, : x.shape[2]]


X = (1, 6, 2, 5, 7)
CASES: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    *((op, (x(*X), 0.5), {}) for op in (aten.clamp_min.default, aten.mul.Tensor, aten.mul.Scalar) for x in (plain, last)),
    *((op, (cut(x(*X)),), {}) for op in (aten.silu.default, aten.exp.default, aten.neg.default) for x in (plain, last)),
    *((op, (x(*X),), {}) for op in (aten.cos.default, aten.sin.default, aten.rsqrt.default) for x in (plain, last)),
    *((op, (cut(plain(*X)),), {}) for op in (aten.gelu.default, aten.round_.default, aten.silu_.default, aten.gelu_.default)),
    (aten.clamp.default, (cut(last(*X)), -1.0, 1.0), {}),
    (aten.clamp_.default, (last(*X), -1.0, 1.0), {}),
    (aten.pow.Tensor_Scalar, (cut(plain(1, 8, 5, 6)), 2), {}),
    (aten.bitwise_and_.Scalar, (torch.arange(6), 3), {}),
    (aten.mul.Tensor, (plain(1, 8, 3, 4).transpose(1, 2), plain(3, 1, 4)), {}),
    (aten.mul.Tensor, (plain(5, 1), plain(7)), {}),
    (aten.mul.Tensor, (plain(7), plain(3, 7)), {}),
    (aten.mul.Tensor, (plain(*X, dtype=torch.bfloat16), plain(6, 1, 1, 1, dtype=torch.bfloat16)), {}),
    (aten.add.Tensor, (last(*X), plain(*X)), {}),
    (aten.add.Tensor, (plain(*X), last(*X)), {"alpha": 2}),
    (aten.sub.Tensor, (plain(2, 4, 6)[..., ::2], plain(2, 4, 3)), {}),
    (aten.div.Tensor, (last(1, 6, 5, 7), plain(1, 1, 5, 7).expand(1, 6, 5, 7)), {}),
    *((op, (plain(2, 4), plain(2, 4)), {}) for op in (aten.add_.Tensor, aten.mul_.Tensor)),
    (aten.addcmul_.default, (plain(2, 4), plain(2, 4), plain(4)), {}),
    *((aten.mean.dim, (cut(x), dims, keep), {}) for x in (plain(*X), last(*X)) for dims in ([1], [-1, 2]) for keep in (True, False)),
    *((aten.linalg_vector_norm.default, (cut(x(*X)), 2.0, [1], True), {}) for x in (plain, last)),
    (aten.native_layer_norm.default, (cut(plain(1, 3, 8, 6)), [6], None, None, 1e-6), {}),
    (aten.native_layer_norm.default, (plain(2, 3, 6), [3, 6], None, None, 1e-6), {}),
    (aten._safe_softmax.default, (plain(1, 2, 5, 7), -1), {}),
    *((aten.cat.default, ([x(*X), cut(x(*X))], dim), {}) for x in (plain, last) for dim in (1, 2, -1)),
    *((aten.stack.default, ([x, cut(x)], dim), {}) for x in (plain(1, 6, 5, 7), plain(9, 8, 3)[..., ::2]) for dim in (0, 2, -1)),
    *((aten.clone.default, (cut(x(*X)),), {}) for x in (plain, last)),
    (aten.clone.default, (last(*X),), {"memory_format": torch.contiguous_format}),
    (aten.clone.default, (plain(*X),), {"memory_format": torch.channels_last_3d}),
    *((aten.empty_like.default, (cut(x(*X)),), {"dtype": torch.float16}) for x in (plain, last)),
    (aten.convolution.default, (cut(plain(*X)), plain(8, 6, 2, 3, 3), plain(8), [1] * 3, [0, 1, 1], [1] * 3, False, [0] * 3, 1), {}),
    (aten.convolution.default, (plain(2, 6, 9, 8), plain(4, 6, 3, 3), None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1), {}),
    *((aten._upsample_nearest_exact2d.default, (x(2, 6, 5, 7), [10, 14], 2.0, 2.0), {}) for x in (plain, last)),
    (aten.arange.default, (5,), {"dtype": torch.float64}),
    (aten.addmm.default, (plain(3), plain(5, 4), plain(3, 4).t()), {}),
    (aten.addmm.out, (plain(3), plain(5, 4), plain(4, 3)), {"out": plain(5, 3)}),
    (aten.bmm.default, (plain(2, 5, 4), plain(2, 4, 3)), {}),
]  # fmt: skip
ASKED: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.stack.default, ([last(1, 6, 5, 7)] * 2, 0), {}),
    (aten.div.Tensor, (plain(1, 1, 5, 7).expand(1, 6, 5, 7), last(1, 6, 5, 7)), {}),
    (aten.cat.default, ([plain(*X), last(*X)], 2), {}),
    (aten.empty_like.default, (plain(5, 1, 7).expand(5, 6, 7),), {}),
    (aten.convolution.default, (plain(2, 6, 9, 8), plain(6, 4, 3, 3), None, [2, 2], [1, 1], [1, 1], True, [0, 0], 1), {}),
    (aten.arange.default, (5,), {}),
]  # fmt: skip


def to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return [to_meta(item) for item in value] if isinstance(value, list) else value


def look(result: Any) -> list[tuple[torch.dtype, list[tuple[int, int]]]]:
    """Dtype, sizes and strides of one or several tensors; where there is one row, its stride says nothing."""
    tensors = result if isinstance(result, tuple) else (result,)
    return [
        (t.dtype, [(size, stride if size > 1 else 0) for size, stride in zip(t.shape, t.stride(), strict=True)])
        for t in tensors
    ]


def told(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    on_meta = {name: to_meta(value) for name, value in kwargs.items()}
    if op is aten.arange.default:
        on_meta["device"] = torch.device("meta")
    return meta_result(op, [to_meta(value) for value in args], on_meta)


@pytest.mark.parametrize(("op", "args", "kwargs"), CASES, ids=lambda value: str(value)[:40] if callable(value) else "")
def test_a_rule_gives_what_the_operation_gives(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    found = told(op, args, kwargs)
    assert found is not NotImplemented
    assert look(found) == look(op(*args, **kwargs))


@pytest.mark.parametrize(("op", "args", "kwargs"), ASKED, ids=lambda value: str(value)[:40] if callable(value) else "")
def test_what_a_rule_is_not_sure_of_is_left_to_pytorch(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert told(op, args, kwargs) is NotImplemented


def test_every_rule_has_a_case() -> None:
    assert {op for op, _, _ in CASES} == set(RULES)


@pytest.mark.parametrize(("x", "weight"), [(last, plain), (plain, last), (last, last)])
def test_a_convolution_keeps_channels_last_as_cudnn_does(
    x: Callable[..., Tensor], weight: Callable[..., Tensor]
) -> None:
    args = (cut(x(*X)), weight(8, 6, 2, 3, 3), None, [1] * 3, [0, 1, 1], [1] * 3, False, [0] * 3, 1)
    found = told(aten.convolution.default, args, {})
    assert found.shape == (1, 8, 1, 5, 7)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)


def test_tensors_with_memory_are_not_touched() -> None:
    assert meta_result(aten.mul.Tensor, (plain(2, 3), plain(2, 3)), {}) is NotImplemented
    with Footprint():
        assert torch.equal(torch.ones(2) * 3, torch.full((2,), 3.0))


@pytest.mark.parametrize("run", [lambda x: x * 2 + x, lambda x: torch.cat((x, x)).clone(), lambda x: x.exp().mean(0)])
def test_a_footprint_is_the_same_with_and_without_rules(
    run: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def held() -> int:
        with Footprint() as footprint:
            run(torch.empty(300, 7, device="meta"))
        return footprint.reserved

    quick = held()
    for op in list(RULES):
        monkeypatch.delitem(RULES, op)
    assert held() == quick > 0


PLAN = """
import sys
from wanduet.config import EngineConfig
from wanduet.runtime.models import Models
from wanduet.planning.hardware import detect, parse_hardware
from wanduet.planning.planner import make_plan
from wanduet.request import GenerationRequest

config = EngineConfig(model="random:1.3b")
models = Models(config)
request = GenerationRequest(prompt="a cat").resolve(models.spec)
for hardware in (parse_hardware("1x24GiB", detect()), detect()):
    make_plan(request, models.memory, config, hardware)
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""


def test_a_plan_needs_nothing_of_the_compiler() -> None:
    """For a GPU, or without one. Its import takes longer than the whole plan."""
    done = subprocess.run([sys.executable, "-c", PLAN], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
