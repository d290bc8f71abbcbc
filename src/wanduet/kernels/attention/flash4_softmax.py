"""A softmax for flash-attn-4's forward kernel on Hopper that computes each query's largest score only once.

Softmax does not depend on what is subtracted from a row's scores before the exponentials; subtracting the largest score
keeps them within float32's range. A kernel that processes the keys in tiles knows the largest score only at the end, so
it keeps the largest so far and rescales its sums whenever a tile has a larger one (Milakov, arXiv 1805.02867). That
takes three in ten of the instructions between two matrix products. This softmax subtracts the first tile's largest
score in all tiles. Float32 and bfloat16 have the same relative precision for large numbers as for small ones, so the
result is correct as long as a row's sum stays below `LARGEST_SUM`: until a score exceeds the first tile's largest by 66
(in units of the natural logarithm). A row with such a score gets an infinite log-sum-exp and must be recomputed:
`wanduet.kernels.attention.flash4_redo`.

Imported lazily, only if flash-attn-4 is installed.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-subclassing-any, disable-error-code="untyped-decorator"

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from flash_attn.cute import utils
from flash_attn.cute.softmax import Softmax
from quack import layout_utils

THREADS_OF_A_ROW = 4  # threads that share a row's scores
# Limit of a row's sum of exponentials: multiplied by values of up to 2**31, it stays within float32's range.
LARGEST_SUM = 2.0**96


@dataclass
class SteadySoftmax(Softmax):
    """Softmax state of the rows of scores of a thread; replaces flash-attn-4's `Softmax` in its kernel."""

    @staticmethod
    def create(scale_log2, num_rows, arch=80, softmax_scale=None):
        """Return the state of `num_rows` rows. `scale_log2`: factor of the scores, whose exponentials have base 2."""
        row_max, row_sum = (cute.make_rmem_tensor(num_rows, Float32) for _ in range(2))
        return SteadySoftmax(scale_log2, num_rows, row_max, row_sum, arch, softmax_scale)

    def online_softmax(self, acc_S, is_first=False, check_inf=True):
        """Replace a tile's scores by their exponentials. Returns no factor: earlier sums are not rescaled."""
        scores = layout_utils.reshape_acc_to_mn(acc_S)
        for row in range(cute.size(self.row_max)):
            values = scores[row, None].load()
            if is_first:
                largest = utils.fmax_reduce(values, init_val=None, arch=self.arch)
                self.row_max[row] = cute.arch.warp_reduction_max(largest, threads_in_group=THREADS_OF_A_ROW)
            shift = self.row_max[row] * self.scale_log2
            values = cute.math.exp2(values * self.scale_log2 - shift, fastmath=True)
            before = None if is_first else self.row_sum[row]
            self.row_sum[row] = utils.fadd_reduce(values, init_val=before, arch=self.arch)
            scores[row, None].store(values)

    def rescale_O(self, acc_O, row_scale):  # noqa: N802 (the kernel calls it so)
        """Rescale the output, only at the end, when there is a factor."""
        if row_scale is not None:
            Softmax.rescale_O(self, acc_O, row_scale)

    @cute.jit
    def finalize(self, final_scale: Float32 = 1.0, sink_val=None) -> cute.Tensor:
        """Return the factors of the output's rows; replace sums by log-sum-exps, infinite for a too large sum or
        NaN."""
        for row in cutlass.range(cute.size(self.row_sum), unroll_full=True):
            self.row_sum[row] = self.row_sum[row] if self.row_sum[row] < LARGEST_SUM else Float32.inf
        return Softmax.finalize(self, final_scale, sink_val)
