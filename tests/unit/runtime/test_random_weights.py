"""Random weights: the same values whenever they are made, also of a matrix for which only some values are drawn."""

import torch

from wanduet.kernels.dit.weight import Weight
from wanduet.runtime.random_weights import DRAWN, RandomSource, randomise


def test_large_matrices_have_values_of_their_own_and_no_equal_rows() -> None:
    def targets() -> dict[str, torch.Tensor | Weight]:
        eight_bits = Weight(torch.empty(2048, 1024, dtype=torch.int8), torch.empty(2048, 1))
        return {
            "a.weight": torch.empty(2048, 1024, dtype=torch.bfloat16), "b.weight": torch.empty(2048, 1024),
            "c.weight": eight_bits, "d.bias": torch.empty(8), "e.weight": torch.empty(8), "f.weight": torch.empty(4, 4),
        }  # fmt: skip

    first, second = targets(), targets()
    randomise(first)
    randomise(second)
    read = dict(RandomSource(first).iterate(list(first)))
    for name, target in first.items():
        other, dense = second[name], target
        if isinstance(target, Weight) and isinstance(other, Weight):
            assert torch.equal(target.data, other.data)
            dense, again = target.dense(torch.float32), Weight(torch.empty_like(target.data), torch.empty(2048, 1))
            again.copy_(read[name])
            assert torch.equal(again.data, target.data)
        else:
            assert torch.equal(target, other)
            assert torch.equal(target, read[name])
        if name in ("a.weight", "b.weight"):
            assert dense.numel() > DRAWN
            assert abs(float(dense.float().std()) * 32 - 1) < 0.01
            assert len(torch.unique(dense, dim=0)) == len(dense)
    assert not torch.equal(first["a.weight"].float(), first["b.weight"].bfloat16().float())
