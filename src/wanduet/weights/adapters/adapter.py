"""What a LoRA file holds, as the engine uses it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wanduet.family.distilled import FewStep
from wanduet.weights.adapters.updates import Update


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter:
    """The updates of a transformer's parameters that one LoRA file makes, in host memory.

    `name`: the file's name without its ending. `sha256`: of the file; of both files' hashes for a PEFT folder, whose
    adapter_config.json changes the updates too. `updates`: by parameter name of the Diffusers checkpoint
    (`blocks.0.attn1.to_q.weight`). `ignored`: number of tensors that were left out, by the reason. `num_bytes`: of all
    tensors of `updates`, as stored. `few_step`: how a known few-step LoRA is sampled; None for other LoRAs.
    """

    path: Path
    name: str
    sha256: str
    updates: Mapping[str, Update] = field(repr=False)
    ignored: Mapping[str, int]
    num_bytes: int
    few_step: FewStep | None
