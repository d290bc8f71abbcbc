"""LoRA merged into the weights of a loaded transformer, in place, and taken out again.

A pass over an unchanged transformer. It writes through the targets that the loader fills (`accelerate.formats.load_targets`),
so that packed, offloaded and 8-bit weights are all treated alike: the pristine weight is read again, the updates are added
in float32, and the sum is rounded once, to the weight's format. A matrix in 8 bits is quantized anew from the sum, with
scales of its own: its error is that of the base in 8 bits, and products take no longer. A weight that no update changes any
more is written as the loader wrote it, so that the base is restored bit for bit.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from wanduet.accelerate.formats import load_targets
from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.offload import BlockStream
from wanduet.accelerate.packing import packed_buffer
from wanduet.kernels.dit.weight import Weight
from wanduet.kernels.precision import EXACT, PRODUCTS
from wanduet.models.dit.block import Block
from wanduet.models.dit.model import WanTransformer
from wanduet.weights.adapters.adapter import Adapter
from wanduet.weights.adapters.updates import Update

ReadPristine = Callable[[Collection[str]], Iterator[tuple[str, Tensor]]]
"""Yields `(name, weight)` of the named parameters as they are before a loader rounds them; a weight is valid until the
next."""
Progress = Callable[[int, int], None]
"""Called before each weight with the number of those that are done, and of all; an error that it raises stops the merge."""


_Parts = tuple[tuple[Update, float], ...]  # updates of one parameter with their strengths, in order
_Content = tuple[tuple[str, float], ...]  # the same by the hashes of their files


class MergedLoras:
    """The updates that are merged into a transformer's weights. One thread at a time may use it, and no forward may run."""

    def __init__(self, transformer: WanTransformer, memory: HostMemory, read_pristine: ReadPristine) -> None:
        """`memory`: that of the transformer's offloaded blocks."""
        self._transformer, self._memory, self._read_pristine = transformer, memory, read_pristine
        # What each parameter contains besides its base, in order. None: not known, as its last write failed.
        self._contents: dict[str, _Content | None] = {}

    @torch.no_grad()
    def merge(self, adapters: Sequence[tuple[Adapter, float]], progress: Progress = lambda done, total: None) -> bool:
        """Make the weights those of the base with these adapters, each with its strength. Return False if they are already.

        Writes only the parameters whose updates differ. After an error the next call writes what this one has not. Raises
        the errors of `read_pristine` and `progress`.
        """
        wanted = _contents(adapters)
        names = [name for name in {**self._contents, **wanted} if self._contents.get(name, ()) != wanted.get(name, ())]
        if not names:
            return False
        stream = self._transformer.fetch_blocks
        if isinstance(stream, BlockStream):
            stream.forget_copies()  # before parameters are looked up: during a pass, they may be in its buffers
        targets = load_targets(self._transformer)
        copies = self._take_copies(names)
        done = 0
        try:
            for name, base in self._read_pristine(names):
                progress(done, len(names))
                self._contents[name] = None
                _write(
                    targets[name], base, tuple((a.updates[name], by) for a, by in adapters if by and name in a.updates)
                )
                self._contents[name] = wanted.get(name, ())
                done += 1
        finally:
            self._return_copies(copies)
        if done < len(names):
            raise RuntimeError(f"{len(names) - done} of {len(names)} weights were not read.")
        return True

    def _take_copies(self, names: Collection[str]) -> dict[int, Tensor]:
        """Remove the retained host copies of the blocks of these parameters, which are about to change."""
        blocks = {int(name.split(".")[1]) for name in names if name.startswith("blocks.")}
        return {index: self._memory.copies.pop(index) for index in blocks if index in self._memory.copies}

    def _return_copies(self, copies: Mapping[int, Tensor]) -> None:
        for index, copy in copies.items():
            block = packed_buffer(cast(Block, self._transformer.blocks[index]))
            if block is None:
                self._memory.release(copy)
                continue
            copy.copy_(block)
            self._memory.copies[index] = copy


def _contents(adapters: Sequence[tuple[Adapter, float]]) -> dict[str, _Content]:
    """Return what each parameter that the adapters update is to contain besides its base."""
    found: dict[str, _Content] = {}
    for adapter, strength in adapters:
        for name in adapter.updates if strength else ():
            found[name] = (*found.get(name, ()), (adapter.sha256, strength))
    return found


def _write(target: Tensor | Weight, base: Tensor, parts: _Parts) -> None:
    if not parts:
        target.copy_(base)
        return
    device = target.device if isinstance(target, Tensor) else target.data.device
    try:
        target.copy_(_sum(base, parts, device))
        return
    except torch.OutOfMemoryError:
        pass
    # Outside the except block: the traceback there keeps the tensors alive.
    value = _sum(base, parts, torch.device("cpu"))
    target.copy_(value.to(target.dtype) if isinstance(target, Tensor) else value)


@PRODUCTS.at(EXACT)
def _sum(base: Tensor, parts: _Parts, device: torch.device) -> Tensor:
    """The weight with its updates, float32 on `device`."""
    value = base.to(device, torch.float32)
    for update, strength in parts:
        value = update.applied(value, strength)
    return value
