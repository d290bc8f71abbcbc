"""Attention with 8-bit scores beside attention in float64, in Triton's interpreter.

(bfloat16 is compiled in tests/compiled and computed by tests marked gpu: the interpreter multiplies it as integers.)
"""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from wanduet.kernels.attention.backends import BACKENDS, available_backends, coded_channels

pytest.importorskip("triton")
SMALL = (32, 32, 4, 2)  # a tile: the interpreter takes as long for a large one, and lengths would have to be longer


@pytest.fixture(scope="module")
def int8(interpreted) -> ModuleType:
    return interpreted("wanduet.kernels.attention.int8")


def packed(
    queries: int, keys: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """q, k and v as the model has them: strided slices of one buffer; keys have a mean."""
    qkv = torch.randn(1, max(queries, keys), 3 * heads * head_dim)
    q, k, v = (part.unflatten(-1, (heads, head_dim)) for part in qkv.chunk(3, dim=-1))
    k += 2 * torch.randn(heads, head_dim)
    q, k, v = (part.unflatten(-1, (heads, head_dim)) for part in qkv.to(dtype).chunk(3, dim=-1))
    return q[:, :queries], k[:, :keys], v[:, :keys]


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | bool = True) -> tuple[Tensor, Tensor]:
    """Attention by its definition in float64, and its log-sum-exp; `mask` `[B, H, L, S]`: keys of each query."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(~torch.as_tensor(mask), -torch.inf)
    lse = scores.logsumexp(-1)
    return ((scores - lse.clamp_min(-1e300)[..., None]).exp() @ v).transpose(1, 2), lse


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "channels", "bound"),
    [(40, 100, 128, 64, 7.2e-3), (33, 70, 128, 128, 1.1e-2), (64, 64, 64, 32, 7.2e-3), (5, 3, 32, 32, 1.1e-2)],
)
def test_the_error_is_that_of_rounding_each_row(int8, dtype, queries, keys, head_dim, channels, bound) -> None:
    torch.manual_seed(0)
    q, k, v = packed(queries, keys, 2, head_dim, dtype)
    before = [x.clone() for x in (q, k, v)]
    out, lse = int8.attend(q, k, v, channels, tile=int8.Tile(*SMALL))
    expected, expected_lse = exact(q, k, v)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert relative(out, expected) < bound
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-2)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


def test_the_whole_tile_of_a_large_card(int8) -> None:
    torch.manual_seed(0)
    q, k, v = packed(130, 140, 1, 128, torch.float16)
    out, _ = int8.attend(q, k, v, 64)
    assert relative(out, exact(q, k, v)[0]) < 7.2e-3


def test_a_channel_with_large_values_does_not_coarsen_the_others(int8) -> None:
    torch.manual_seed(0)
    q, k, v = packed(32, 64, 1, 64)
    q[..., 3] *= 12
    k[..., 3] /= 12
    out, _ = int8.attend(q, k, v, 64, tile=int8.Tile(*SMALL))
    expected, _ = exact(q, k, v)
    step = q.abs().amax(-1, keepdim=True) / 127
    rounded, _ = exact((q / step).round() * step, k, v)  # with exact keys even
    assert relative(out, expected) < 0.7 * relative(rounded, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which is written in numpy
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_far_beyond_those_of_the_last_keys(int8, dtype) -> None:
    """Their exponentials are out of float32's range with what the last tile subtracts."""
    q = torch.full((1, 5, 1, 32), 10.0, dtype=dtype)
    k = torch.linspace(20, -20, 100, dtype=dtype)[None, :, None, None].expand(1, 100, 1, 32).contiguous()
    v = torch.arange(100, dtype=dtype)[None, :, None, None].expand(1, 100, 1, 32).contiguous()
    out, lse = int8.attend(q, k, v, 32, tile=int8.Tile(*SMALL))
    expected, expected_lse = exact(q, k, v)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-2)


def test_values_beyond_float16(int8) -> None:
    torch.manual_seed(0)
    q, k, v = packed(32, 40, 1, 32)
    out, _ = int8.attend(q, k, 1e6 * v, 32, tile=int8.Tile(*SMALL))
    assert relative(out, exact(q, k, 1e6 * v)[0]) < 1.1e-2


@pytest.mark.parametrize("spoilt", ["q", "k", "v"])
@pytest.mark.parametrize("channel", [0, 60])  # a coded one, one that is not
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, which is written in numpy
def test_nan_is_not_lost(int8, spoilt: str, channel: int) -> None:
    """A job whose latents become NaN starts again with PyTorch's attention; finite nonsense would stay."""
    torch.manual_seed(0)
    inputs = dict(zip("qkv", (x.clone() for x in packed(40, 40, 1, 64)), strict=True))
    inputs[spoilt][0, 33, 0, channel] = float("nan")
    out, _ = int8.attend(*inputs.values(), 32, tile=int8.Tile(*SMALL))
    expected, _ = exact(*inputs.values())
    assert out.isnan().equal(expected.isnan())


def test_inputs_of_zeros_give_the_mean_of_the_values(int8) -> None:
    q = torch.zeros(1, 3, 1, 32)
    v = torch.randn(1, 40, 1, 32)
    out, _ = int8.attend(q, torch.zeros_like(v), v, 32, tile=int8.Tile(*SMALL))
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand_as(out), rtol=1e-5, atol=1e-5)


def test_parts_of_the_keys_are_joined_by_their_log_sum_exps(int8) -> None:
    """As a ring of devices does it; each part has a mean of its own."""
    torch.manual_seed(0)
    q, k, v = packed(32, 70, 2, 32)
    parts = [
        int8.attend(q, k[:, rows], v[:, rows], 32, tile=int8.Tile(*SMALL)) for rows in (slice(0, 30), slice(30, 70))
    ]
    weights = torch.stack([lse for _, lse in parts]).softmax(0).transpose(2, 3)[..., None]
    joined = sum(out * weight for (out, _), weight in zip(parts, weights, strict=True))
    assert relative(joined, exact(q, k, v)[0]) < 1.1e-2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: the logarithm of an empty sum
@pytest.mark.parametrize(("query_block", "key_block"), [(32, 64), (40, 24)], ids=["whole tiles", "parts of tiles"])
def test_a_block_of_queries_reads_the_keys_of_its_list(int8, query_block: int, key_block: int) -> None:
    torch.manual_seed(0)
    q, k, v = packed(75, 135, 2, 32)
    lists, blocks = -(-75 // query_block), -(-135 // key_block)
    count = torch.randint(1, blocks + 1, (1, 2, lists), dtype=torch.int32)
    count[0, 1, -1] = 0
    index = torch.rand(1, 2, lists, blocks).argsort(-1).int()
    listed = torch.zeros(1, 2, lists, blocks, dtype=torch.bool)
    listed.scatter_(3, index.long(), torch.arange(blocks) < count[..., None])
    mask = listed.repeat_interleave(query_block, 2)[:, :, :75].repeat_interleave(key_block, 3)[..., :135]
    index[torch.arange(blocks) >= count[..., None]] = 2**30  # never read
    out, lse = int8.attend(q, k, v, 32, int8.Blocks(count, index, query_block, key_block), int8.Tile(*SMALL))
    expected, expected_lse = exact(q, k, v, mask)
    assert relative(out, expected) < 1.1e-2
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=2e-2)
    assert (out[0, (lists - 1) * query_block :, 1] == 0).all()


def test_what_it_cannot_compute_is_refused(int8) -> None:
    q, k, v = torch.randn(3, 1, 16, 2, 64)
    with pytest.raises(ValueError, match="side by side"):
        int8.attend(q, k.transpose(1, 3).contiguous().transpose(1, 3), v, 64)
    for head_dim, channels in ((24, 24), (96, 64), (32, 64), (64, 48)):
        with pytest.raises(ValueError, match="32, 64 or 128 channels"):
            int8.attend(*torch.randn(3, 1, 4, 1, head_dim), channels)
    lists = torch.zeros(1, 2, 3, 4, dtype=torch.int32)
    with pytest.raises(ValueError, match="3 lists"):
        int8.attend(q, k, v, 64, int8.Blocks(lists[..., 0], lists))


@pytest.mark.parametrize(
    ("capability", "there"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((12, 0), True)]
)
def test_it_is_there_by_name_where_tensor_cores_multiply_bytes(monkeypatch, capability, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = available_backends(torch.device("cuda"))
    assert {"int8", "int8-fast"} & set(found) == ({"int8", "int8-fast"} if there else set())
    assert not any(backend.exact for name, backend in found.items() if coded_channels(name, 128))


def test_a_call_by_name_codes_half_of_the_channels_or_all(int8) -> None:
    torch.manual_seed(0)
    q, k, v = packed(20, 40, 1, 64)
    errors = []
    for name in ("int8", "int8-fast"):
        (backend,) = (backend for backend in BACKENDS if backend.name == name)
        out, lse = backend.attend_with_lse(q, k, v, None)
        assert torch.equal(out, backend.attend(q, k, v, None))
        assert lse.shape == (1, 1, 20)
        errors.append(relative(out, exact(q, k, v)[0]))
    assert 0 < errors[0] < errors[1] < 1.1e-2
