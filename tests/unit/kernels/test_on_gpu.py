"""What only a GPU can show. `pytest -m gpu`."""

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from wanduet.kernels import select
from wanduet.kernels.attention import key_lists, sparse_steps
from wanduet.kernels.attention.backends import available_backends, plain_with_lse
from wanduet.kernels.attention.call import AttentionCall
from wanduet.kernels.attention.choose import Shape, choose_attention, measure
from wanduet.kernels.attention.sparse import Blocks, KeyLists, plain_listed
from wanduet.kernels.device import shared_memory
from wanduet.kernels.dit.weight import Weight
from wanduet.kernels.measurements import read_all
from wanduet.kernels.vae import choose, gpu
from wanduet.kernels.vae.plain import Filter, Fused

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore")  # compilers' own
def test_triton_is_taken(dtype, caplog) -> None:
    found = select.kernels_for(DEVICE, dtype)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert found.name == ("triton+quack" if select.has_quack(DEVICE, dtype) else "triton")


@pytest.mark.parametrize("format", ["fp8", "int8"])
@pytest.mark.filterwarnings("ignore")  # compilers' own
def test_products_in_8_bits_are_right_and_the_fastest_is_taken(format, caplog, tmp_path) -> None:
    from wanduet.kernels.choose_product import CHOICES_FILE

    if torch.cuda.get_device_capability(DEVICE) < {"fp8": (8, 9), "int8": (8, 0)}[format]:
        pytest.skip(f"no products in {format}")
    found = select.quantized_kernels_for(DEVICE, torch.bfloat16, format, (12, 128, 8960), tmp_path)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert found.name.startswith("triton, ")
    (table,) = read_all(tmp_path, CHOICES_FILE).values()
    problems = {row["name"]: row["problem"] for row in table if row["problem"]}
    assert not problems


@torch.no_grad()
def test_quack_s_products_are_cublas_s_to_the_last_bit() -> None:
    if not select.has_quack(DEVICE, torch.bfloat16):
        pytest.skip("no quack-kernels, or no Hopper")
    from wanduet.kernels.dit import plain, quack

    for rows, inner, outer in ((4097, 1536, 4608), (37, 1536, 1536), (16380, 8960, 1536)):
        draw = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16)
        x, weight, bias = draw(2, rows, inner), draw(outer, inner) / inner**0.5, draw(outer)
        out = draw(2, rows + 3, outer)[:, :rows]
        assert torch.equal(quack.linear(x, Weight(weight), bias, out), plain.linear(x, Weight(weight), bias))
        got, expected = quack.linear_gelu(x, Weight(weight), bias), plain.linear_gelu(x, Weight(weight), bias)
        assert (got.double() - expected.double()).norm() / expected.double().norm() < 4e-3


@torch.no_grad()
def test_the_gelu_of_the_epilogue_is_the_tanh_form() -> None:
    from wanduet.kernels.dit.gpu import linear_gelu

    x, weight, bias = torch.randn(1, 300, 64), torch.randn(96, 64) / 8, torch.randn(96)
    hidden = F.linear(x.double(), weight.double(), bias.double())
    got = linear_gelu(x.to(DEVICE), Weight(weight.to(DEVICE)), bias.to(DEVICE)).double().cpu()
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


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [128, 64, 16])
@pytest.mark.filterwarnings("ignore")  # compilers' own
def test_sparse_attention_is_right_and_reads_the_keys_that_the_cpu_would(
    dtype: torch.dtype, block: int, caplog
) -> None:
    found = sparse_steps.choose_listed(DEVICE, dtype, 128, block)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    from wanduet.kernels.attention import sparse_gpu

    triton = sparse_steps.ListedBackend("triton", sparse_gpu.attend_listed)
    assert sparse_steps.choose_listed(DEVICE, dtype, 128, block, (triton,)) is triton
    q, k, v = torch.randn(3, 1, 20 * block + 9, 4, 128, device=DEVICE, dtype=dtype)
    lists = key_lists.pooled_lists(q, k, 0.3, block)
    part = key_lists.pooled_lists(q[:, 5 * block :, 1:3], k[:, :, 1:3], 0.3, block, 5 * block)
    assert torch.equal(part.index, lists.index[:, 1:3, 5:])
    on_cpu = key_lists.pooled_lists(q.cpu(), k.cpu(), 0.3, block).index
    assert (on_cpu == lists.index.cpu()).float().mean() > 0.99  # but for scores that are nearly equal
    out, lse = found.attend(q, k, v, lists)
    expected, expected_lse = plain_listed(q.float(), k.float(), v.float(), lists)
    assert (out.float() - expected).norm() < 1e-2 * expected.norm()
    torch.testing.assert_close(lse, expected_lse, rtol=1e-2, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("is_tiled", [False, True])
@pytest.mark.filterwarnings("ignore")  # compilers' own
def test_listed_keys_may_have_the_largest_score_in_any_block(is_tiled: bool) -> None:
    """As below, for lists of blocks of one size, and of tiles of which the first are short."""
    found = sparse_steps.choose_listed(DEVICE, torch.bfloat16, 128, None if is_tiled else 64)
    starts = torch.tensor([0, 5, 37, *range(67, 2051, 64)], dtype=torch.int32, device=DEVICE)
    tokens, tiles = int(starts[-1]), Blocks(starts, 3)
    blocks = len(starts) - 1 if is_tiled else -(-tokens // 64)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, tokens, 3, 128, device=DEVICE, dtype=torch.bfloat16)
    k[:, :700] -= 9
    q[:, ::2] += torch.linspace(0, 9, len(q[0, ::2]), device=DEVICE, dtype=torch.bfloat16)[:, None, None]
    kept = key_lists.highest_blocks(torch.randn(1, 3, blocks, blocks, device=DEVICE), blocks // 3)
    lists = KeyLists(*kept, 64, 64, *((tiles, tiles) if is_tiled else ()))
    out, lse = found.attend(q, k, v, lists)
    expected, expected_lse = plain_listed(q.float(), k.float(), v.float(), lists)
    assert out.isfinite().all()
    assert (out.float() - expected).norm() / expected.norm() < 5e-3
    assert (lse - expected_lse).abs().max() < 2e-3 * expected_lse.abs().max()


@pytest.mark.parametrize("keys", [2048, 2049, 330])
@torch.no_grad()
def test_the_largest_score_may_be_in_any_tile_of_keys(keys: int) -> None:
    """Of half of the queries every later key's score is larger than the first tile's by up to 1000: only those are
    computed again. One query is no number, and stays alone with that."""
    backend = available_backends(DEVICE).get("flash-attn-4-steady")
    if backend is None:
        pytest.skip("no flash-attn-4, or no Hopper")
    torch.manual_seed(0)
    q, *_ = torch.randn(2, 330, 9, 128, device=DEVICE, dtype=torch.bfloat16).split(3, dim=2)
    k, v = (torch.randn(2, keys, 3, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    k[:, -150:] -= 9
    q[:, ::2] += torch.linspace(0, 9, 165, device=DEVICE, dtype=torch.bfloat16)[:, None, None]
    expected, expected_lse = plain_with_lse(q.float(), k.float(), v.float())
    q[0, 7, 1] = float("nan")
    call = AttentionCall((1, 1, keys))
    for out, lse in (backend.attend_with_lse(q, k, v, call), (backend.attend(q, k, v, call), expected_lse)):
        assert out[0, 7, 1].isnan().all()
        out[0, 7, 1], lse[0, 1, 7] = expected[0, 7, 1].to(out.dtype), expected_lse[0, 1, 7]
        assert out.isfinite().all()
        assert (out.float() - expected).norm() / expected.norm() < 5e-3
        assert (lse - expected_lse).abs().max() < 2e-3 * expected_lse.abs().max()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("width", [96, 192, 384])
@torch.no_grad()
def test_a_convolution_is_right_and_does_not_depend_on_the_cut(width: int, dtype: torch.dtype, bound: float) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype).to(memory_format=torch.channels_last_3d)

    x, past, residual = draw(1, width, 2, 40, 52), draw(1, width, 2, 40, 52), draw(1, width, 2, 40, 52)
    weight = draw(width, width, 3, 3, 3) / (27 * width) ** 0.5
    bias = torch.randn(width, device=DEVICE, dtype=dtype)
    whole, _ = gpu.causal_conv(x, past, Filter(weight, bias, (1, 1)), Fused(residual=residual))
    source = torch.cat((past, x), dim=2).double()
    expected = F.conv3d(source, weight.double(), bias.double(), padding=(0, 1, 1)) + residual.double()
    assert (whole.double() - expected).norm() / expected.norm() < bound
    rows = slice(11, 30)
    part, _ = gpu.causal_conv(
        x[..., rows, :],
        past[..., rows, :],
        Filter(weight, bias, (0, 0)),
        Fused(residual=residual[..., 12:29, :]),
    )
    assert torch.equal(part, whole[..., 12:29, :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [96, 192, 384])
def test_every_tile_that_is_offered_gives_the_same_to_the_last_bit(width: int, dtype: torch.dtype) -> None:
    from wanduet.kernels.vae.conv_tiles import offered_tiles

    tiles = {t.name: t for t in reversed(offered_tiles(width, width, dtype.itemsize, shared_memory(DEVICE)))}
    if len(tiles) == 1:
        pytest.skip("only one tile comes into question on a GPU with wgmma")
    table = choose.measure(tuple(tiles.values()), width, dtype, DEVICE)
    assert [row.problem for row in table] == [None] * len(tiles)


@torch.no_grad()
@pytest.mark.parametrize(("channels", "bound"), [(64, 7.2e-3), (128, 1.1e-2)])
def test_8_bit_attention_in_bfloat16(channels: int, bound: float) -> None:
    from wanduet.kernels.attention import int8

    q, k, v = torch.randn(1, 1500, 6, 128, device=DEVICE, dtype=torch.bfloat16).split(2, dim=2)
    expected, expected_lse = plain_with_lse(q.float(), k.float(), v.float())
    out, lse = int8.attend(q, k, v, channels)
    assert (out.float() - expected).norm() / expected.norm() < bound
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-2)
    assert torch.equal(out, int8.attend(q, k, v, channels)[0])
    index = torch.arange(24, device=DEVICE, dtype=torch.int32).flip(0).expand(1, 2, 12, 24)
    listed, _ = int8.attend(q, k, v, channels, int8.Blocks(torch.full_like(index[..., 0], 24), index))
    assert (listed.float() - expected).norm() / expected.norm() < bound
    q, k = torch.full_like(q, 10), torch.linspace(20, -20, 1500, device=DEVICE).bfloat16()[None, :, None, None]
    k = k.expand_as(q).contiguous()  # scores far beyond those of the last keys
    torch.testing.assert_close(
        int8.attend(q, k, v, channels)[0].float(),
        plain_with_lse(q.float(), k.float(), v.float())[0],
        rtol=1e-2,
        atol=1e-2,
    )
