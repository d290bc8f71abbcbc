"""A softmax for flash-attn-4's forward kernel on Hopper that looks for each query's largest score only once.

Softmax is the same whatever is subtracted from a row's scores before they become exponentials; the largest is taken so
that none leaves float32's range. A kernel that sees the keys in tiles knows the largest only at the end: it keeps the
largest so far, and shrinks its sums whenever a tile has a larger one (Milakov, arXiv 1805.02867). That is three in ten of
the instructions between two matrix products. Here the first tile's largest score serves for all tiles. Float32 and
bfloat16 are as exact for large numbers as for small ones, so the result is right as long as a row's sum stays below
`LARGEST_SUM`: until a score is larger than the first tile's by 66 (in units of the natural logarithm). A row where one is
has an infinite log-sum-exp, and must be computed again: `wanduet.kernels.attention.flash4_redo`.

Imported lazily, only where flash-attn-4 is there.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-subclassing-any, disable-error-code="untyped-decorator"

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32
from flash_attn.cute import utils
from flash_attn.cute.softmax import Softmax
from quack import layout_utils

THREADS_OF_A_ROW = 4  # hold its scores among them
# Of exponentials: values of up to 2**31 may still be weighed by them before float32 ends.
LARGEST_SUM = 2.0**96


@dataclass
class SteadySoftmax(Softmax):
    """Of the rows of scores that a thread holds parts of; what flash-attn-4's `Softmax` is to its kernel."""

    @staticmethod
    def create(scale_log2, num_rows, arch=80, softmax_scale=None):
        """`num_rows` rows of scores, which `scale_log2` turns into powers of two."""
        row_max, row_sum = (cute.make_rmem_tensor(num_rows, Float32) for _ in range(2))
        return SteadySoftmax(scale_log2, num_rows, row_max, row_sum, arch, softmax_scale)

    def online_softmax(self, acc_S, is_first=False, check_inf=True):
        """Exponentials of a tile's scores in their place. Earlier sums stay as they are: there is no factor for them."""
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
        """Only at the end, when there is a factor."""
        if row_scale is not None:
            Softmax.rescale_O(self, acc_O, row_scale)

    @cute.jit
    def finalize(self, final_scale: Float32 = 1.0, sink_val=None) -> cute.Tensor:
        """Factors for the output's rows, and in the place of their sums the log-sum-exps: infinite where one was too large
        or no number."""
        for row in cutlass.range(cute.size(self.row_sum), unroll_full=True):
            self.row_sum[row] = self.row_sum[row] if self.row_sum[row] < LARGEST_SUM else Float32.inf
        return Softmax.finalize(self, final_scale, sink_val)
