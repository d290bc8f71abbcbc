"""LoRA merged into every kind of weights, and taken out again: the base is there bit for bit."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.lora import MergedLoras
from wanduet.accelerate.offload import stream_blocks
from wanduet.accelerate.passes import LoadContext, run_passes
from wanduet.family.spec import TransformerSpec
from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.dit.weight import format_of
from wanduet.meta.init import meta_init
from wanduet.models.dit.model import WanTransformer

SPEC: TransformerSpec = replace(
    WAN_1_3B.transformer,
    num_attention_heads=2,
    attention_head_dim=24,
    ffn_dim=96,
    num_layers=3,
    text_dim=32,
    freq_dim=32,
)
CPU = torch.device("cpu")
# (format, dtype, resident blocks): as products take them, offloaded, in 16 bits for products in 32, in 8 bits.
KINDS = {
    "resident": ("auto", torch.bfloat16, 3),
    "offloaded": ("auto", torch.bfloat16, 1),
    "16 bits": ("bf16", torch.float32, 3),
    "8 bits": ("q8", torch.bfloat16, 3),
    "8 bits offloaded": ("q8", torch.bfloat16, 0),
}


@dataclass(frozen=True)
class Added:
    delta: Tensor

    def applied(self, base: Tensor, strength: float) -> Tensor:
        assert base.dtype == torch.float32
        return base + strength * self.delta


@dataclass(frozen=True)
class File:
    sha256: str
    updates: dict[str, Added] = field(repr=False)


class Loaded:
    """A transformer as an engine loads it, with what reads its base again."""

    def __init__(self, kind: str) -> None:
        format, dtype, resident = KINDS[kind]
        torch.manual_seed(0)
        self.base = WanTransformer(SPEC).state_dict()
        self.read: list[str] = []
        with meta_init():
            self.model = WanTransformer(SPEC).eval().requires_grad_(False)
        self.memory = HostMemory("plain")
        context = LoadContext(CPU, dtype, resident, self.memory, self.fill, format_of(format, dtype))
        run_passes(self.model, context)
        self.loras = MergedLoras(self.model, self.memory, self.iterate)

    def fill(self, targets: dict) -> None:
        for name, value in self.iterate(targets):
            targets[name].copy_(value)

    def iterate(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.base.items():
            if name in names:
                self.read.append(name)
                yield name, value

    def bits(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def output(self) -> Tensor:
        torch.manual_seed(1)
        return self.model(torch.randn(1, 16, 3, 6, 8), torch.tensor([400]), torch.randn(1, 9, 32))


def adapter(seed: int, *parts: str) -> File:
    torch.manual_seed(seed)
    with meta_init():
        shapes = {name: p.shape for name, p in WanTransformer(SPEC).named_parameters()}
    return File(
        f"{seed:064x}",
        {n: Added(torch.randn(s) * 0.1) for n, s in shapes.items() if any(part in n for part in parts)},
    )


STYLE = adapter(1, "to_q.weight", "to_v.weight", "ffn", "norm_k", "scale_shift_table", "proj_out", "text_embedder")
OTHER = adapter(2, "to_q.weight", "to_k.bias", "time_proj", "patch_embedding")


@pytest.fixture(params=KINDS)
def loaded(request) -> Loaded:
    return Loaded(request.param)


def merged_from_file(kind: str, *adapters: tuple[File, float]) -> Loaded:
    """The same weights by another way: a checkpoint whose tensors contain the updates."""
    found = Loaded(kind)
    for file, strength in adapters:
        for name, update in file.updates.items():
            found.base[name] = found.base[name] + strength * update.delta
    from wanduet.accelerate.formats import load_targets

    found.fill(load_targets(found.model))
    return found


def test_a_b_none_gives_the_base(loaded: Loaded) -> None:
    before, output = loaded.bits(), loaded.output()
    for adapters in ([(STYLE, 1.0)], [(OTHER, 0.5)], [(STYLE, -2.0), (OTHER, 1.5)]):
        assert loaded.loras.merge(adapters)
        assert not torch.equal(loaded.output(), output)
    assert loaded.loras.merge([])
    assert loaded.output().equal(output)
    assert all(value.equal(before[name]) for name, value in loaded.bits().items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_a_file_that_contains_the_updates(kind: str) -> None:
    """Also after a forward, when blocks of the next one are in device buffers already."""
    loaded, adapters = Loaded(kind), [(STYLE, 0.75), (OTHER, -0.5)]
    loaded.output()
    loaded.loras.merge([(OTHER, 2.0)])
    loaded.output()
    loaded.loras.merge(adapters)
    expected = merged_from_file(kind, *adapters)
    assert all(value.equal(expected.bits()[name]) for name, value in loaded.bits().items())
    assert loaded.output().equal(expected.output())


def test_in_8_bits_an_update_that_is_smaller_than_a_step_of_them_is_not_lost() -> None:
    """Rounding errors of the base and of the sum are alike: neither hides a change in one direction."""
    loaded, exact = Loaded("8 bits"), Loaded("resident")
    name = "blocks.0.attn1.to_q.weight"
    torch.manual_seed(3)
    update = (
        torch.outer(torch.randn(48), torch.randn(48)) * exact.base[name].std() * 0.004
    )  # a step is about 0.03 of it
    linear = loaded.model.get_submodule(name.removesuffix(".weight"))
    before = linear.stored.dense(torch.float32).clone()
    loaded.loras.merge([(File("a" * 64, {name: Added(update)}), 1.0)])
    change = linear.stored.dense(torch.float32) - before
    assert 0.7 < float((change * update).sum() / update.square().sum()) < 1.3


def test_strength_0_and_the_same_set_read_and_change_nothing(loaded: Loaded) -> None:
    loaded.read.clear()
    assert not loaded.loras.merge([(STYLE, 0.0)])
    assert not loaded.read
    assert loaded.loras.merge([(STYLE, 1.0), (OTHER, 0.0)])
    loaded.read.clear()
    assert not loaded.loras.merge([(STYLE, 1.0)])
    assert not loaded.read


def test_only_weights_whose_updates_differ_are_read(loaded: Loaded) -> None:
    loaded.loras.merge([(STYLE, 1.0)])
    loaded.read.clear()
    loaded.loras.merge([(STYLE, 1.0), (OTHER, 1.0)])
    assert set(loaded.read) == OTHER.updates.keys()


class StoppedError(Exception):
    """A cancelled job, or a file that cannot be read."""


def stop_at(limit: int):
    def progress(done: int, total: int) -> None:
        if done == limit:
            raise StoppedError

    return progress


@pytest.mark.parametrize("next_set", [[], [(STYLE, 1.0)], [(OTHER, 1.0)]], ids=["none", "the same", "another"])
@pytest.mark.parametrize("before", [[], [(OTHER, 0.5)]], ids=["from none", "from another"])
def test_after_a_merge_that_was_stopped_the_next_one_is_whole(loaded: Loaded, before: list, next_set: list) -> None:
    loaded.loras.merge(before)
    with pytest.raises(StoppedError):
        loaded.loras.merge([(STYLE, 1.0)], stop_at(7))
    loaded.loras.merge(next_set)
    found = loaded.bits()
    loaded.loras.merge([])
    base = loaded.bits()
    loaded.loras.merge(next_set)
    assert all(value.equal(found[name]) for name, value in loaded.bits().items())
    fresh = Loaded("resident")
    if found.keys() == fresh.bits().keys() and all(v.dtype == fresh.bits()[n].dtype for n, v in found.items()):
        assert all(value.equal(fresh.bits()[name]) for name, value in base.items())


def test_an_update_that_fails_is_repaired(loaded: Loaded) -> None:
    class Fails(Added):
        def applied(self, base: Tensor, strength: float) -> Tensor:
            raise MemoryError

    before = loaded.bits()
    broken = File("c" * 64, {**STYLE.updates, "blocks.1.ffn.net.2.weight": Fails(torch.zeros(1))})
    with pytest.raises(MemoryError):
        loaded.loras.merge([(broken, 1.0)])
    loaded.loras.merge([])
    assert all(value.equal(before[name]) for name, value in loaded.bits().items())


def test_out_of_memory_on_the_device_adds_on_the_host(loaded: Loaded) -> None:
    class NoRoomOnce(Added):
        failures: list[int] = []  # noqa: RUF012 - shared by all tests' updates, emptied below

        def applied(self, base: Tensor, strength: float) -> Tensor:
            if not self.failures:
                self.failures.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().applied(base, strength)

    NoRoomOnce.failures.clear()
    small = File("d" * 64, {name: NoRoomOnce(update.delta) for name, update in STYLE.updates.items()})
    loaded.loras.merge([(small, 1.0)])
    assert NoRoomOnce.failures
    found = loaded.bits()
    loaded.loras.merge([(STYLE, 1.0)])
    assert all(value.equal(found[name]) for name, value in loaded.bits().items())


def test_blocks_that_move_take_their_updates_along() -> None:
    """To the host, where their retained copies had the weights before, and back."""
    loaded = Loaded("resident")
    base = loaded.output()
    stream_blocks(loaded.model, CPU, 3, loaded.memory)
    loaded.memory.retain_copies(True)
    for index, block in enumerate(loaded.model.blocks):
        from wanduet.accelerate.packing import packed_buffer

        flat = packed_buffer(block)
        assert flat is not None
        loaded.memory.copies[index] = flat.clone()  # as of blocks that came from the host
    loaded.loras.merge([(STYLE, 1.0)])
    merged = loaded.output()
    for index, block in enumerate(loaded.model.blocks):
        flat = packed_buffer(block)
        assert flat is not None
        assert loaded.memory.copies[index].equal(flat)
    stream_blocks(loaded.model, CPU, 1, loaded.memory)
    assert loaded.output().equal(merged)
    loaded.loras.merge([])
    assert loaded.output().equal(base)


def test_a_weight_that_cannot_be_read_again_is_an_error() -> None:
    loaded = Loaded("resident")
    del loaded.base["proj_out.weight"]
    with pytest.raises(RuntimeError, match="1 of"):
        loaded.loras.merge([(STYLE, 1.0)])
