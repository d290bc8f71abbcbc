"""A loaded transformer with its chosen kernels and attention. It can swap its blocks out and free all its memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from wanduet.accelerate.host_memory import HostMemory
from wanduet.accelerate.lora import MergedLoras
from wanduet.accelerate.offload import BlockStream, stream_blocks
from wanduet.distributed.mesh import Mesh
from wanduet.distributed.sequence.sharding import Sharding
from wanduet.family.spec import ModelSpec
from wanduet.kernels.attention.backends import AttentionLseFn, sdpa
from wanduet.kernels.attention.choose import Choice, Shape
from wanduet.kernels.attention.sparse import ListedFn
from wanduet.kernels.attention.sparse_steps import PLAIN, SPARSE, SparseSteps, choose_listed
from wanduet.kernels.attention.trained import listed_blocks
from wanduet.kernels.dit.plain import TORCH_KERNELS, Kernels
from wanduet.kernels.dit.quantized import TORCH_QUANTIZED, EightBits, QuantizedKernels
from wanduet.kernels.select import without
from wanduet.kernels.verdicts import guard, remember_failure
from wanduet.models.dit.model import WanTransformer
from wanduet.runtime.context import RunContext
from wanduet.runtime.release import drop_memory

SWAPPED_OUT = -1  # `resident_blocks` after `swap_out`


@dataclass(slots=True)
class LoadedTransformer:
    """The loaded transformer, and the settings it was loaded with.

    `mesh`: the ranks that share its work, if any. `unguided`: how they share a step of one prompt, if they take a prompt
    each in the other steps.
    """

    spec: ModelSpec
    transformer: WanTransformer
    device: torch.device
    dtype: torch.dtype
    resident_blocks: int
    memory: HostMemory  # for blocks that are not on the device
    mesh: Mesh | None = None
    unguided: Sharding | None = None
    attention: str = ""
    attention_lse: AttentionLseFn | None = None
    trained_by: str = ""  # the kernel of attention that is trained to be sparse
    sparse: SparseSteps | None = None  # of the last job
    chosen: tuple[Shape, Kernels, Choice] | None = None  # for the last job's sequence length
    requested: str = ""  # the attention, by name or "auto", of which that choice is
    quantized: tuple[EightBits, QuantizedKernels] | None = None  # of the last job with products in 8 bits
    loras: MergedLoras | None = None  # in the weights; None for a transformer whose base cannot be read again
    adapt: Callable[[int, RunContext], bool] = lambda step, context: False  # see `TransformerHost.use`
    loaded_at: float = field(default_factory=time.perf_counter)
    fitted_at: float = 0.0  # when `chosen` was set, by time.perf_counter

    def attend_with(self, choice: Choice) -> None:
        """Use this attention from the next forward on, where attention is not sparse."""
        self.attention, self.attention_lse = choice.name, choice.fn_with_lse
        attention = choice.fn
        if self.sparse is not None:
            self.attention = f"{choice.name}+sparse {self.sparse.backend.name}"
            attention = self.sparse.over(attention)
        elif self.trained_by:
            self.attention = f"{choice.name}+{self.spec.transformer.attention} {self.trained_by}"
        self.transformer.runtime = replace(self.transformer.runtime, attention=attention)

    def without_kernel(self, operation: str) -> str:
        """Use an operation's PyTorch implementation from the next forward on, in later jobs too; for sparse attention, the next
        kernel, and all keys after the last. Return what runs instead."""
        runtime = self.transformer.runtime
        if operation.startswith(SPARSE):
            return self._without_listed(operation)
        if hasattr(TORCH_QUANTIZED, operation):
            assert runtime.quantizer is not None
            plainer = without(runtime.quantizer.kernels, operation, self.device)
            self.quantized = (runtime.quantizer.format, plainer)
            self.transformer.runtime = replace(runtime, quantizer=replace(runtime.quantizer, kernels=plainer))
            return f"plain {operation}"
        kernels = without(runtime.kernels, operation, self.device)
        self.transformer.runtime = replace(runtime, kernels=kernels)
        if self.chosen is not None:
            shape, _, choice = self.chosen
            self.chosen = (shape, kernels, choice)
        return f"plain {operation}"

    def _without_listed(self, operation: str) -> str:
        assert self.chosen is not None
        remember_failure(operation, self.device)
        choose_listed.cache_clear()
        before, instead = self.attention, "all keys"
        if self.sparse is not None:
            head_dim = self.spec.transformer.attention_head_dim
            backend = choose_listed(self.device, self.dtype, head_dim, self.sparse.block)
            self.sparse = None if backend is None else replace(self.sparse, backend=backend)
            instead = instead if backend is None else backend.operation
        else:
            runtime = self.transformer.runtime
            trained = replace(runtime.trained, listed=self.listed_of_trained())
            self.transformer.runtime = replace(runtime, trained=trained)
            instead = f"{SPARSE} by {self.trained_by}"
        self.attend_with(self.chosen[2])
        self.attention = f"{before}, then {self.attention}"
        return f"{instead} in place of {operation}"

    def listed_of_trained(self) -> ListedFn:
        """Return the kernel of attention that is trained to be sparse, and note its name: the plain form where others have
        failed in a job. Raises ConfigError if they do not work here."""
        spec = self.spec.transformer
        blocks = listed_blocks(spec.attention)
        backend = choose_listed(self.device, self.dtype, spec.attention_head_dim, blocks) or PLAIN
        self.trained_by = backend.name
        return backend.attend if backend is PLAIN else guard(backend.operation, backend.attend)

    def use_plain_kernels(self) -> bool:
        """Use PyTorch's implementation of every operation, and exact products, until the next job. Return False if all are
        in use already."""
        runtime = self.transformer.runtime
        is_plain = runtime.kernels is TORCH_KERNELS and runtime.attention is sdpa and runtime.quantizer is None
        if is_plain and self.trained_by in ("", PLAIN.name):
            return False
        trained = replace(runtime.trained, listed=PLAIN.attend)
        self.transformer.runtime = replace(
            runtime, kernels=TORCH_KERNELS, attention=sdpa, quantizer=None, trained=trained
        )
        self.attention = f"sdpa+{self.spec.transformer.attention} {PLAIN.name}" if self.trained_by else "sdpa"
        return True

    @property
    def kernels(self) -> str:
        """The names of the kernels in use, those for products in 8 bits after a semicolon."""
        runtime = self.transformer.runtime
        quantizer = runtime.quantizer
        return runtime.kernels.name + ("" if quantizer is None else f"; {quantizer.format}: {quantizer.kernels.name}")

    @property
    def quantized_layers(self) -> int:
        """How many linear layers this job has computed in 8 bits so far."""
        quantizer = self.transformer.runtime.quantizer
        return 0 if quantizer is None else len(quantizer.layers)

    def restream(self, resident_blocks: int) -> None:
        """Keep `resident_blocks` blocks on the device, and stream the others from the host."""
        stream_blocks(self.transformer, self.device, resident_blocks, self.memory)
        self.resident_blocks = resident_blocks

    def swap_out(self) -> None:
        """Move all blocks and the streaming buffers off the device. Call `restream` before the next forward."""
        stream_blocks(self.transformer, self.device, 0, self.memory, num_buffers=0)
        self.resident_blocks = SWAPPED_OUT

    def free(self) -> None:
        """Free all memory, even if references to the transformer remain. It cannot run any more."""
        if isinstance(self.transformer.fetch_blocks, BlockStream):
            self.transformer.fetch_blocks.close()
        drop_memory(self.transformer)
        self.memory.close()
