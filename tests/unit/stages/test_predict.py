"""Which sharding of the transformer a step uses."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from wanduet.distributed.mesh import Layout
from wanduet.distributed.sequence.sharding import NoSharding
from wanduet.family.wan21 import WAN_1_3B
from wanduet.kernels.attention.call import Step
from wanduet.models.dit.model import WanTransformer
from wanduet.request import GenerationRequest
from wanduet.stages.predict import make_predictor

SMALL = replace(
    WAN_1_3B,
    transformer=replace(
        WAN_1_3B.transformer, num_attention_heads=2, attention_head_dim=24, ffn_dim=32, num_layers=2, text_dim=16
    ),
)
SHAPE = (1, 16, 2, 4, 4)


class Counted(NoSharding):
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.sharded = self.attended = 0

    def shard_sequence(self, x: Tensor, dim: int) -> Tensor:
        self.sharded += 1
        return x

    def attend(self, *given: Any) -> Tensor:
        self.attended += 1
        return super().attend(*given)


def test_ranks_that_take_a_prompt_each_share_a_step_of_one_prompt() -> None:
    made = WanTransformer(SMALL.transformer).eval().requires_grad_(False)
    usual, after = Counted(), Counted()
    made.runtime = replace(made.runtime, sharding=usual)
    denoiser: Any = SimpleNamespace(
        transformer=made, spec=SMALL, device=torch.device("cpu"),
        mesh=SimpleNamespace(layout=Layout(cfg=2), cfg=None), unguided=after,
    )  # fmt: skip
    request = GenerationRequest(prompt="x", seed=0, guidance_gate=0.5).resolve(SMALL)
    predictor = make_predictor(denoiser, SHAPE, lambda forward: forward(), request)
    assert after.sharded > 0, "its rotary embeddings are those of its part of the sequence"
    before = usual.sharded
    text = made.prepare_text(torch.randn(1, 4, 16))
    with torch.no_grad():
        (shared,) = predictor(torch.ones(SHAPE), Step(3, 500.0), [text])
    assert (after.attended, usual.attended, usual.sharded) == (1, 0, before)  # of the first block: `attend_first_block`
    assert made.runtime.sharding is usual
    denoiser.unguided = None
    with torch.no_grad():
        (alone,) = make_predictor(denoiser, SHAPE, lambda forward: forward(), request)(
            torch.ones(SHAPE), Step(3, 500.0), [text]
        )
    assert usual.attended == 1
    assert torch.equal(alone, shared)
