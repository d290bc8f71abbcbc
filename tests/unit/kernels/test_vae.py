"""The VAE's GPU forms against their plain ones, in Triton's interpreter on the CPU."""

import importlib
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from wanduet.family.wan21 import WAN_1_3B
from wanduet.footprint.vae import decode_bytes
from wanduet.kernels.vae import conv_tiles, gpu, plain
from wanduet.kernels.vae.gpu import VAE_TRITON_KERNELS
from wanduet.kernels.vae.plain import VAE_TORCH_KERNELS, Epilogue, Filter, Fused
from wanduet.meta.trace import Footprint
from wanduet.models.vae.arena_size import DecodeShape, compile_decode
from wanduet.models.vae.halo_offload import HostTransfer
from wanduet.models.vae.model import WanVAE
from wanduet.models.vae.rows import Tiling
from wanduet.models.vae.stream import decode_stream

pytest.importorskip("triton")


@pytest.fixture(scope="module", autouse=True)
def convolutions(interpreted) -> ModuleType:
    """Triton's modules as they are when it interprets; `vae_gpu` takes what is imported when it launches."""
    interpreted("wanduet.kernels.vae.norm")
    interpreted("wanduet.kernels.vae.attention")
    return interpreted("wanduet.kernels.vae.conv")


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def clip(channels: int, frames: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(1, channels, frames, rows, columns).to(dtype)
    return x.to(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("channels", [3, 16, 24])
def test_a_norm_equals_the_plain_form(convolutions, channels) -> None:
    from wanduet.kernels.vae.norm import norm_silu

    torch.manual_seed(0)
    x, gamma = clip(channels, 3, 9, 7)[:, :, 1:, 2:7], torch.randn(channels, 1, 1, 1)
    expected = plain.norm_silu(x, gamma)
    out = torch.empty_like(x, memory_format=torch.channels_last_3d)
    norm_silu(x, gamma, out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    norm_silu(out.copy_(x), gamma, out)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_a_pixel_of_zeros_stays_zero() -> None:
    x, (weight, bias), gamma = clip(8, 1, 2, 2) * 0, convolution(8, 16, (3, 3, 3)), torch.ones(16, 1, 1, 1)
    with torch.no_grad():
        got, _ = gpu.causal_conv(x, None, Filter(weight, bias * 0, (1, 1)), Fused(gamma[:8], out_gamma=gamma))
    assert not got.any()


def test_other_layouts_are_brought_into_this_one() -> None:
    x, gamma, (weight, bias) = torch.randn(1, 8, 1, 3, 4), torch.randn(8, 1, 1, 1), convolution(8, 16, (3, 3, 3))
    with torch.no_grad():
        got, _ = gpu.causal_conv(x, None, Filter(weight, bias, (1, 1)), Fused(gamma))
        assert got.stride(1) == 1
        expected, _ = plain.causal_conv(x, None, Filter(weight, bias, (1, 1)), Fused(gamma))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def convolution(inputs: int, outputs: int, size: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randn(outputs, inputs, *size) / (inputs * 9) ** 0.5
    return weight.to(memory_format=torch.channels_last_3d), torch.randn(outputs)


PADS = ((0, 0), (1, 0), (0, 1), (1, 1))
CHANNELS = {(24, 40): PADS, (16, 3): PADS[1:3], (8, 96): PADS[::3]}  # rows and channels do not depend on each other


@pytest.mark.parametrize(
    ("inputs", "outputs", "pads"),
    [
        pytest.param(*channels, pads, marks=[pytest.mark.slow] * (pads not in quick))
        for channels, quick in CHANNELS.items()
        for pads in PADS
    ],
)
@pytest.mark.parametrize(("has_past", "has_norm", "has_residual"), [(1, 1, 1), (0, 1, 0), (1, 0, 1), (0, 0, 0)])
def test_a_convolution_equals_the_plain_form(inputs, outputs, pads, has_past, has_norm, has_residual) -> None:
    torch.manual_seed(0)
    x, (weight, bias) = clip(inputs, 2, 4, 3), convolution(inputs, outputs, (3, 3, 3))
    past = clip(inputs, 2, 4, 3) if has_past else None
    gamma = torch.randn(inputs, 1, 1, 1) if has_norm else None
    residual = clip(outputs, 2, 4 + sum(pads) - 2, 3) if has_residual else None
    filter = Filter(weight, bias, pads)
    with torch.no_grad():
        got, left = gpu.causal_conv(x.clone(), past, filter, Fused(gamma, residual, consume=True))
        padded = None
        if past is not None:  # the plain form writes border rows where the convolution does not pad
            padded = past if pads[0] == pads[1] else torch.nn.functional.pad(past, (0, 0, *pads))
        expected, _ = plain.causal_conv(x, padded, filter, Fused(gamma, residual))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        kept = x if gamma is None else plain.norm_silu(x, gamma)
        torch.testing.assert_close(left, kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outputs", [40, 96, 384])  # one part of channels, two, more than a program has
@pytest.mark.parametrize("has_residual", [True, False])
def test_a_norm_of_the_result_equals_the_plain_form(outputs, has_residual) -> None:
    torch.manual_seed(0)
    x, (weight, bias), gamma = clip(8, 2, 4, 3), convolution(8, outputs, (3, 3, 3)), torch.randn(outputs, 1, 1, 1)
    residual = clip(outputs, 2, 4, 3) if has_residual else None
    filter, fused = Filter(weight, bias, (1, 1)), Fused(residual=residual, out_gamma=gamma)
    with torch.no_grad():
        got, _ = gpu.causal_conv(x, None, filter, fused)
        expected, _ = plain.causal_conv(x, None, filter, fused)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("part_bytes", [2**20, 4 * 2 * 35 * 11])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_attention_in_products_equals_the_plain_form(monkeypatch, convolutions, part_bytes, dtype, bound) -> None:
    monkeypatch.setattr(plain, "SCORES_BYTES", part_bytes)
    torch.manual_seed(0)
    qkv = torch.randn(2, 35, 3 * 48).to(dtype)
    before = qkv.clone()
    with torch.no_grad():
        got = gpu.attend(*qkv.chunk(3, dim=-1))
        expected = plain.attend(*qkv.float().chunk(3, dim=-1))
    assert got.dtype == dtype
    assert (got.float() - expected).norm() < bound * expected.norm()
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("inputs", [130, 1000])
def test_a_product_in_parts_is_the_same(convolutions, monkeypatch, inputs) -> None:
    attention_triton = importlib.import_module("wanduet.kernels.vae.attention")
    monkeypatch.setattr(attention_triton, "LEAST_DEPTH", 128)
    torch.manual_seed(0)
    x, weight, out = torch.randn(140, inputs), torch.randn(9, inputs), torch.empty(140, 9)
    attention_triton.product(x, weight, out)
    torch.testing.assert_close(out, x @ weight.t(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("width", [5, 48, 61])
def test_softmax_equals_pytorchs(convolutions, width) -> None:
    attention_triton = importlib.import_module("wanduet.kernels.vae.attention")
    torch.manual_seed(0)
    scores = 20 * torch.randn(7, width)
    expected = scores.softmax(dim=-1)
    other = torch.empty(7, width, dtype=torch.bfloat16)
    attention_triton.softmax(scores, other)
    attention_triton.softmax(scores, scores)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(other, expected.bfloat16(), rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("outputs", [40, 96])
def test_channels_as_rows_of_the_product_give_the_same(convolutions, outputs) -> None:
    torch.manual_seed(0)
    x, (weight, bias), gamma = clip(16, 1, 4, 5), convolution(16, outputs, (3, 3, 3)), torch.randn(outputs, 1, 1, 1)
    results = []
    for swap in (False, True):
        out = clip(outputs, 1, 4, 5)
        first, second = (64, 32) if outputs == 96 else (64, 0)
        tile = conv_tiles.Tile(16, first, second, 16, 4, 2, swap)
        assert convolutions.convolve(x, None, Filter(weight, bias, (1, 1)), Epilogue(out, None, gamma), tile)
        results.append(out)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_past", [True, False])
def test_tiles_of_several_rows_give_the_same(convolutions, has_past) -> None:
    torch.manual_seed(0)
    x, (weight, bias) = clip(16, 2, 5, 7), convolution(16, 40, (3, 3, 3))
    past, residual, gamma = clip(16, 2, 5, 7) if has_past else None, clip(40, 2, 5, 7), torch.randn(40, 1, 1, 1)
    results = []
    for number, square in ((1, False), (1, True), (2, False), (4, False)):
        out = clip(40, 2, 5, 7)
        tile = conv_tiles.Tile(16, 64, 0, 16, 4, 2, rows=number, square=square)
        assert convolutions.convolve(x, past, Filter(weight, bias, (1, 1)), Epilogue(out, residual, gamma), tile)
        results.append(out)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tf32", [True, False])
def test_norms_round_to_nearest_where_convolutions_use_tf32(monkeypatch, convolutions, tf32) -> None:
    from wanduet.kernels.vae.norm import norm_silu

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    x, gamma = clip(16, 1, 5, 4), torch.randn(16, 1, 1, 1)
    exact, out = plain.norm_silu(x.double(), gamma.double()), torch.empty_like(x)
    norm_silu(x, gamma, out)
    error = ((out.double() - exact) / exact).abs().max().item()
    assert (2**-13 < error <= 2**-11) if tf32 else error < 1e-5
    kept = out.contiguous().view(torch.int32) & 0x1FFF
    assert kept.any().item() != tf32


def test_a_step_of_one_frame_keeps_a_frame_of_the_past() -> None:
    torch.manual_seed(0)
    x, past, (weight, bias) = clip(8, 1, 3, 2), clip(8, 2, 3, 2), convolution(8, 16, (3, 1, 1))
    with torch.no_grad():
        got, left = gpu.causal_conv(x, past, Filter(weight, bias, (0, 0)))
        expected, _ = plain.causal_conv(x, past, Filter(weight, bias, (0, 0)))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(left, torch.cat((past[:, :, 1:], x), dim=2))


@pytest.mark.parametrize("pads", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_a_doubling_equals_the_plain_form(pads) -> None:
    torch.manual_seed(0)
    x, (weight, bias) = clip(24, 2, 3, 2)[:, 8:], convolution(16, 8, (1, 3, 3))
    flat = weight[:, :, 0].contiguous(memory_format=torch.channels_last)
    got, expected = (clip(8, 4, 6 + sum(pads) - 2, 4) for _ in range(2))
    untouched = got.clone()
    with torch.no_grad():
        gpu.double_conv(x, gpu.double_weight(flat), bias, pads, got[:, :, ::2])
        plain.double_conv(x, flat, bias, pads, expected[:, :, ::2])
    torch.testing.assert_close(got[:, :, ::2], expected[:, :, ::2], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[:, :, 1::2], untouched[:, :, 1::2])


@pytest.mark.parametrize("tf32", [True, False])
def test_the_kernel_of_a_doubling_is_rounded_where_convolutions_use_tf32(monkeypatch, tf32) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", tf32)
    weight = torch.randn(8, 16, 3, 3)
    plain.round_to_tf32(weight)
    again = weight.clone()
    plain.round_to_tf32(again)
    assert torch.equal(again, weight)
    four = gpu.double_weight(weight)
    assert (four.contiguous().view(torch.int32) & 0x1FFF).any().item() != tf32
    sums = four.sum(dim=(3, 4))
    torch.testing.assert_close(sums, weight.sum(dim=(2, 3)).expand_as(sums), rtol=2e-3, atol=2e-3)


def test_a_pixel_does_not_depend_on_how_the_frame_is_cut() -> None:
    torch.manual_seed(0)
    x, past, (weight, bias) = clip(8, 2, 9, 5), clip(8, 2, 9, 5), convolution(8, 16, (3, 3, 3))
    with torch.no_grad():
        whole, _ = gpu.causal_conv(x, past, Filter(weight, bias, (1, 1)))
        part, _ = gpu.causal_conv(x[..., 2:7, :], past[..., 2:7, :], Filter(weight, bias, (0, 0)))
    # To the last bit on a GPU (tests marked gpu); the interpreter's matrix products round by a row's place.
    torch.testing.assert_close(part, whole[..., 3:6, :], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("inputs", "outputs"), [(96, 96), (192, 192), (384, 384), (384, 768), (16, 384), (96, 3)])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shared_memory", [227 * 1024, 99 * 1024, 64 * 1024])
def test_tiles_fit_every_card(convolutions, inputs, outputs, itemsize, shared_memory) -> None:
    for tile in conv_tiles.tiles_for(inputs, outputs, itemsize, shared_memory):
        assert tile.shared_memory(itemsize, shared_memory) <= shared_memory
        assert min(tile.pixels, tile.depth) >= 16
        assert tile.stages >= 2
        assert tile.depth * itemsize <= 128
        assert outputs < 96 or outputs % tile.channels == 0 or tile.channels >= outputs


def test_runs_of_pixels_are_taken_where_they_spare_a_gpu_a_wave(convolutions, monkeypatch) -> None:
    monkeypatch.setattr(convolutions, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(convolutions, "shared_memory", lambda device: 227 * 1024)
    tiles = conv_tiles.tiles_for(384, 384, 4, 227 * 1024)
    rows_of_tile = {}
    for rows in (56, 60, 64, 120):  # 3 waves; 4 in squares, 3 in runs; 4; 6
        out = torch.empty(1, 384, 2, rows, 208, device="meta")
        rows_of_tile[rows] = convolutions._fastest(tiles, out, out.device).rows
    assert rows_of_tile == {56: 8, 60: 1, 64: 8, 120: 8}


def test_all_tiles_of_a_width_add_up_in_the_same_order(convolutions) -> None:
    for tiles in conv_tiles.TILES.values():
        assert len({(t.channels, t.depth, t.swap, t.near(3, 3)) for t in tiles}) == 1


def test_every_tile_that_may_be_taken_is_compiled_beforehand(convolutions, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(convolutions, "launch", lambda *args, **options: compiled.append(options["ROWS"]))
    x, out = (torch.empty(1, 384, 1, 60, 104, device="meta").to(memory_format=torch.channels_last_3d) for _ in range(2))
    weight, bias = torch.empty(384, 384, 3, 3, 3, device="meta"), torch.empty(384, device="meta")
    convolutions.convolve(x, None, Filter(weight, bias, (1, 1)), Epilogue(out), compile_for=torch.device("cpu"))
    assert compiled == [8, 1]


def test_other_layouts_are_refused_where_they_would_be_misread(convolutions) -> None:
    x, weight = clip(16, 1, 4, 4), clip(16, 1, 1, 1).expand(16, -1, -1, -1, -1)
    other = torch.empty(1, 16, 1, 4, 4)
    with pytest.raises(ValueError, match="side by side"):
        convolutions.convolve(x, None, Filter(weight, torch.zeros(16), (0, 0)), Epilogue(other))


def test_a_copy_on_the_host_keeps_its_layout() -> None:
    x = clip(16, 2, 4, 5)
    (copying,) = HostTransfer(torch.device("cpu")).to_host([x])
    copy = copying.wait()
    assert torch.equal(copy, x)
    assert copy.stride() == x.stride()
    assert copy.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_few_parts_of_the_queries_show_what_all_need(monkeypatch, dtype) -> None:
    def held() -> int:
        with Footprint() as footprint:
            q, k, v = (torch.empty(1, 30000, 384, dtype=dtype, device="meta") for _ in range(3))
            gpu.attend(q, k, v)
        return footprint.reserved

    few = held()
    monkeypatch.setattr(gpu, "query_parts", lambda q: q.split(plain.SCORES_BYTES // (4 * q.shape[1]), dim=1))
    assert held() == few


def test_memory_is_predicted_where_there_is_no_triton(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    peaks = [
        decode_bytes(DecodeShape(WAN_1_3B.vae, 480, 832, 9, kernels=kernels))
        for kernels in (VAE_TORCH_KERNELS, VAE_TRITON_KERNELS)
    ]
    assert peaks[0] > peaks[1] > 2**30


def test_the_check_before_use_sees_a_wrong_kernel() -> None:
    from wanduet.kernels.select import largest_vae_error

    def wrong(*inputs, **options):
        out, past = VAE_TORCH_KERNELS.causal_conv(*inputs, **options)
        return out * 1.01, past

    cpu = torch.device("cpu")
    assert largest_vae_error(replace(VAE_TORCH_KERNELS, causal_conv=wrong), cpu, torch.float32, 8) > 5e-3
    assert largest_vae_error(replace(VAE_TORCH_KERNELS, attend=lambda q, k, v: v), cpu, torch.float32, 8) > 5e-3


@pytest.fixture
def launched(monkeypatch, convolutions) -> dict[bool, set[tuple[object, ...]]]:
    """What is launched (False) and only compiled (True): kernels with dtypes and constants."""
    import wanduet.kernels.vae.attention as attention
    import wanduet.kernels.vae.norm as norms

    seen: dict[bool, set[tuple[object, ...]]] = {False: set(), True: set()}
    run = norms.launch

    def record(kernel, grid, device, compile_for, *args, **options) -> None:
        dtypes = tuple(str(arg.dtype) for arg in args if isinstance(arg, torch.Tensor))
        seen[compile_for is not None].add((kernel.__name__, dtypes, *sorted(options.items())))
        if compile_for is None:
            run(kernel, grid, device, None, *args, **options)

    for module in (norms, convolutions, attention):
        monkeypatch.setattr(module, "launch", record)
    return seen


@pytest.mark.parametrize("plan", [pytest.param(Tiling(), marks=pytest.mark.slow), Tiling("strip", 3)])
def test_a_whole_decode_gives_the_same_frames_by_kernels_that_can_be_compiled_beforehand(launched, plan) -> None:
    """Beforehand: by a run on the meta device, of other sizes, as a kernel depends on neither rows nor columns."""
    torch.manual_seed(2)
    spec = replace(WAN_1_3B.vae, base_dim=8, num_res_blocks=1, dim_mult=(1, 2), temperal_downsample=(True,))
    vae = WanVAE(spec).eval().requires_grad_(False)
    latents = torch.randn(16, 3, 4, 3)
    expected = [chunk.copy() for chunk in decode_stream(vae, latents, plan)]
    vae.channels_last()
    vae.use_kernels(VAE_TRITON_KERNELS)
    for got, want in zip(decode_stream(vae, latents, plan), expected, strict=True):
        assert abs(got.astype(int) - want.astype(int)).max() <= 1
    kernels = gpu.compiling_for(torch.device("cpu"))
    compile_decode(spec, 64, 80, plan, torch.float32, kernels)
    assert launched[False]
    assert launched[False] <= launched[True]


def test_the_check_before_use_compiles_nothing_that_the_decode_does_not_need(launched) -> None:
    from wanduet.kernels.select import largest_vae_error

    base_dim = 8
    assert largest_vae_error(VAE_TRITON_KERNELS, torch.device("cpu"), torch.float32, base_dim) < 1e-5
    kernels = gpu.compiling_for(torch.device("cpu"))
    compile_decode(replace(WAN_1_3B.vae, base_dim=base_dim), 64, 80, Tiling(), torch.float32, kernels)
    assert len(launched[False]) > 5
    assert launched[False] <= launched[True]


def test_few_kernels_are_compiled_for_a_decode(monkeypatch, convolutions) -> None:
    """The first frame, whose past is zeros, takes those of all others: Triton compiles anew where a distance is 1 or no
    multiple of 16."""
    import wanduet.kernels.vae.attention as attention
    import wanduet.kernels.vae.norm as norms

    compiled = set()

    def record(kernel, grid, device, compile_for, *args, **options) -> None:
        alike = kernel.kwargs["do_not_specialize"] or ()
        named = zip(kernel.arg_names, args, strict=False)
        numbers = [(n, v == 1, v % 16 == 0) for n, v in named if isinstance(v, int) and n not in alike]
        compiled.add((kernel.__name__, *numbers, *sorted(options.items())))

    for module in (norms, convolutions, attention):
        monkeypatch.setattr(module, "launch", record)
    kernels = gpu.compiling_for(torch.device("cpu"))
    compile_decode(WAN_1_3B.vae, 480, 832, Tiling(), torch.float32, kernels)
    assert 20 < len(compiled) <= 24
