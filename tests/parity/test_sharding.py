"""The transformer over two and four gloo ranks against the transformer on one device, float32 on the CPU."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from tests.forked import forked_ranks
from wanduet.distributed.launch import run_on_ranks
from wanduet.distributed.mesh import Layout
from wanduet.distributed.rank import Rank
from wanduet.distributed.sequence.cfg import CfgSharding
from wanduet.distributed.sequence.hybrid import SequenceSharding
from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.attention.backends import plain_with_lse, sdpa
from wanduet.kernels.attention.call import AttentionCall, Step
from wanduet.models.dit.block import Runtime
from wanduet.models.dit.model import WanTransformer
from wanduet.sampling.guidance import Combination, PairedPredictor, SequentialGuidance

SPEC = replace(
    WAN_1_3B.transformer,
    num_attention_heads=4,
    attention_head_dim=24,
    ffn_dim=128,
    num_layers=3,
    text_dim=32,
    freq_dim=32,
)
STEP = Step(3, 731.0)
Case = tuple[Layout, tuple[int, int, int, int], tuple[float, ...] | None]

# Latents' batch, frames, rows, columns; tokens are frames x rows/2 x columns/2.
EVEN, ODD, BATCH, FEW = (1, 3, 8, 8), (1, 3, 6, 10), (2, 1, 6, 10), (1, 1, 2, 6)
TWO: list[Case] = [
    (Layout(ulysses=2), EVEN, None),
    (Layout(ulysses=2), ODD, None),
    (Layout(ulysses=2), BATCH, None),
    (Layout(ulysses=2), ODD, (3.0, 1.0)),
    (Layout(ring=2), EVEN, None),
    (Layout(ring=2), ODD, None),
    (Layout(ring=2), BATCH, (1.0, 2.5)),
]
FOUR: list[Case] = [
    (Layout(ring=2, ulysses=2), EVEN, None),
    (Layout(ring=2, ulysses=2), ODD, None),
    (Layout(ring=2, ulysses=2), BATCH, (1.0, 2.0, 3.0, 4.0)),
    (Layout(ring=2, ulysses=2), FEW, None),
    (Layout(ring=4), ODD, None),
    (Layout(ring=4), FEW, None),
    (Layout(ulysses=4), ODD, None),
    (Layout(ulysses=4), FEW, None),
    (Layout(cfg=2, ulysses=2), ODD, None),
]
CASES = {2: TWO, 4: FOUR}


def model() -> WanTransformer:
    torch.manual_seed(0)
    made = WanTransformer(SPEC).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "norm" in name or "bias" in name:  # their defaults (1 and 0) would hide mistakes
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def inputs(shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    batch, frames, rows, columns = shape
    torch.manual_seed(1)
    latents = torch.randn(batch, 16, frames, rows, columns)
    return latents, torch.tensor([731.0, 12.0][:batch]), torch.randn(batch, 7, SPEC.text_dim)


class Recorder:
    """An attention backend that keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[AttentionCall, tuple[Tensor, Tensor, Tensor]]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        self.calls.append((call, (q.clone(), k.clone(), v.clone())))
        return sdpa(q, k, v)

    def attend_with_lse(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
        self.calls.append((call, (q.clone(), k.clone(), v.clone())))
        return plain_with_lse(q, k, v)

    def check(self, whole: "Recorder") -> None:
        """That the calls name what they get of the q, k and v of one device."""
        blocks = [qkv for _, qkv in whole.calls]
        for call, (q, k, v) in self.calls:
            assert (call.grid, call.step) == (whole.calls[0][0].grid, STEP)
            heads = slice(call.first_head, call.first_head + q.shape[2])
            starts = (call.first_query, call.first_key, call.first_key)
            for x, of_block, first in zip((q, k, v), blocks[call.block], starts, strict=True):
                torch.testing.assert_close(x, of_block[:, first : first + x.shape[1], heads], rtol=1e-4, atol=1e-4)
        if self.calls:  # a rank of a ring may have no tokens
            assert {call.block for call, _ in self.calls} == set(range(SPEC.num_layers))


class FilePeerMemory:
    """A `PeerMemory` of ranks on the CPU: buffers are files that all of them map, signals are messages."""

    def __init__(self, folder: Path, group: dist.ProcessGroup, number: int) -> None:
        self.group, self.ranks, self.tag = group, dist.get_process_group_ranks(group), 16 * number
        self.files = [folder / f"{len(self.ranks)}-{rank}" for rank in self.ranks]
        self.signals: list[dist.Work | None] = []
        self.used = False

    def reserve(self, size: int) -> bool:
        new, self.used = not self.used, True
        return new

    def buffer(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        whole = torch.from_file(str(self.files[rank]), shared=True, size=2**16, dtype=dtype)
        return whole[offset : offset + torch.Size(shape).numel()].view(shape)

    def copy_wait_compute(self) -> None:
        pass

    def copy(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def signal(self, rank: int, channel: int) -> None:
        self.signals.append(dist.isend(torch.zeros(1), self.ranks[rank], tag=self.tag + channel))

    def wait(self, rank: int, channel: int) -> None:
        dist.recv(torch.empty(1), self.ranks[rank], tag=self.tag + channel)

    copy_wait = wait

    def wait_copies(self) -> None:
        pass


def forward_sharded(rank: Rank, cases: list[Case], folder: Path | None = None) -> list[Tensor]:
    """Of every case, with heads exchanged by collectives, or in memory that is shared in `folder`."""
    made, outputs = model().to(rank.device), []
    meshes = {layout: rank.mesh(layout) for layout, _, _ in cases}
    if folder is not None:
        meshes = {
            layout: replace(mesh, peer_memory=FilePeerMemory(folder, mesh.ulysses, 1 + number))
            for number, (layout, mesh) in enumerate(meshes.items())
        }
    for layout, shape, shares in cases:
        here, whole = Recorder(), Recorder()
        given = [x.to(rank.device) for x in inputs(shape)]
        with torch.no_grad():
            made.runtime = Runtime(attention=whole.attend)
            made(*given, step=STEP)
            sharding = SequenceSharding(meshes[layout], here.attend_with_lse, shares)
            made.runtime = Runtime(attention=here.attend, sharding=sharding)
            outputs.append(made(*given, step=STEP).cpu())
        here.check(whole)
    if folder is not None:
        assert all(mesh.peer_memory.used == (layout.ulysses > 1) for layout, mesh in meshes.items())
    return outputs


def guided(rank: Rank) -> tuple[Tensor, Tensor]:
    made = model()
    latents, _, positive = inputs(ODD)
    negative = torch.randn_like(positive)

    def predict(latents: Tensor, step: Step, texts: Sequence[Tensor]) -> list[Tensor]:
        return [made(latents, torch.tensor([step.timestep]), text) for text in texts]

    mesh = rank.mesh(Layout(cfg=2, ulysses=rank.world_size // 2))
    made.runtime = Runtime(sharding=SequenceSharding(mesh))
    with torch.no_grad():
        own = [text if rank_of_it == mesh.cfg_rank else None for rank_of_it, text in enumerate((positive, negative))]
        parallel = SequentialGuidance(PairedPredictor(predict, mesh.cfg), *own, Combination(5.0))(
            latents, Step(0, 500.0)
        )
        return parallel, SequentialGuidance(predict, positive, negative, Combination(5.0))(latents, Step(0, 500.0))


def shared_first(rank: Rank) -> list[tuple[Tensor, Tensor, list[int]]]:
    """For some shapes: this rank's prompt with the first self-attention shared, alone, and how many heads it did."""
    results = []
    for shape in (EVEN, BATCH, FEW):
        made, (latents, steps, text) = model(), inputs(shape)
        text = text.roll(rank.index, 1)  # a prompt of its own
        whole, here = Recorder(), Recorder()
        made.runtime = Runtime(attention=whole.attend)
        with torch.no_grad():
            alone = made(latents, steps, text, step=STEP)
        sharding = CfgSharding.from_group(rank.mesh(Layout(cfg=rank.world_size)).cfg)
        made.runtime = Runtime(attention=here.attend, sharding=sharding)
        with torch.no_grad():
            results.append((made(latents, steps, text, step=STEP), alone, [q.shape[2] for _, (q, _, _) in here.calls]))
        here.check(whole)
    return results


def on_ranks(monkeypatch: pytest.MonkeyPatch, work: object, devices: list[str], *args: object) -> list[object]:
    # Workers import this file by its name from the repository's root.
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    with forked_ranks():
        return run_on_ranks(work, devices, *args, timeout_s=30.0)


@pytest.fixture(scope="module")
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield monkeypatch


@pytest.fixture(scope="module")
def outputs(patched: pytest.MonkeyPatch) -> Callable[[int], list[list[Tensor]]]:
    """Every rank's results of all cases of a number of ranks, from one start of the processes."""
    return cache(lambda ranks: on_ranks(patched, forward_sharded, ["cpu"] * ranks, CASES[ranks]))


@pytest.mark.parametrize(("ranks", "index"), [(ranks, i) for ranks, cases in CASES.items() for i in range(len(cases))])
def test_sharded_forward_equals_unsharded(outputs: Callable[[int], list[list[Tensor]]], ranks: int, index: int) -> None:
    _, shape, _ = CASES[ranks][index]
    with torch.no_grad():
        expected = model()(*inputs(shape))
    got = [of_rank[index] for of_rank in outputs(ranks)]
    assert ((got[0] - expected).abs().max() / expected.abs().max()).item() < 1e-5
    assert all(torch.equal(other, got[0]) for other in got)


@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_that_are_copied_give_what_collectives_give(
    patched: pytest.MonkeyPatch, outputs: Callable[[int], list[list[Tensor]]], tmp_path: Path, ranks: int
) -> None:
    copied = on_ranks(patched, forward_sharded, ["cpu"] * ranks, CASES[ranks], tmp_path)
    for index, case in enumerate(CASES[ranks]):
        expected = outputs(ranks)[0][index]
        for of_rank in copied:
            # Three products in place of one may round otherwise.
            assert ((of_rank[index] - expected).abs().max() / expected.abs().max()).item() < 1e-6, case


@pytest.mark.parametrize("ranks", [2, 4])
def test_parallel_guidance_equals_sequential_bit_for_bit(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    for parallel, sequential in on_ranks(monkeypatch, guided, ["cpu"] * ranks):
        assert torch.equal(parallel, sequential)


def test_ranks_of_two_prompts_share_the_first_self_attention_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    half, all_heads = SPEC.num_attention_heads // 2, SPEC.num_attention_heads
    for of_rank in on_ranks(monkeypatch, shared_first, ["cpu", "cpu"]):
        for shared, alone, heads in of_rank:
            assert torch.equal(shared, alone)
            assert heads == [half] + [all_heads] * (SPEC.num_layers - 1)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_sharded_forward_over_nccl_equals_unsharded(monkeypatch: pytest.MonkeyPatch) -> None:
    of_ranks = on_ranks(monkeypatch, forward_sharded, ["cuda:0", "cuda:1"], TWO)
    for index, (_, shape, _) in enumerate(TWO):
        with torch.no_grad():
            expected = model().cuda()(*(x.cuda() for x in inputs(shape))).cpu()
        for of_rank in of_ranks:
            assert ((of_rank[index] - expected).abs().max() / expected.abs().max()).item() < 1e-4
