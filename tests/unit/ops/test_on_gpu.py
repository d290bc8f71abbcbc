"""What only a GPU can show. `pytest -m gpu`."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from wanduet.ops import kernels
from wanduet.ops.attention import available_backends
from wanduet.ops.attention_choice import Shape, choose_attention, measure

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_is_taken(dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.kernels_for(DEVICE, dtype).name == "triton"


@torch.no_grad()
def test_the_gelu_of_the_epilogue_is_the_tanh_form() -> None:
    from wanduet.ops.triton_kernels import linear_gelu

    x, weight, bias = torch.randn(1, 300, 64), torch.randn(96, 64) / 8, torch.randn(96)
    hidden = F.linear(x.double(), weight.double(), bias.double())
    got = linear_gelu(*(t.to(DEVICE) for t in (x, weight, bias))).double().cpu()
    tanh_error = (got - F.gelu(hidden, approximate="tanh")).abs().max().item()
    erf_error = (got - F.gelu(hidden)).abs().max().item()
    assert tanh_error < 1e-5 < erf_error


@pytest.mark.parametrize("keys", [2048, 512])
def test_every_exact_back_end_that_runs_is_right(keys: int) -> None:
    shape = Shape(2048, keys, 12, 128)
    backends = [b for b in available_backends(DEVICE).values() if b.exact]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = measure(backends, DEVICE, shape, torch.bfloat16)
    for row in table:
        print(row)
    assert {"sdpa", "sdpa_flash", "sdpa_efficient"} <= {row.name for row in table if row.usable}
    assert choose_attention(DEVICE, shape, torch.bfloat16).name == table[0].name or table[0].milliseconds is not None
