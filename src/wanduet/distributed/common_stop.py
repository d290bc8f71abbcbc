"""Lets all ranks of a group stop before the same block of a denoising step.

Ranks exchange tensors in a block, so a rank that stopped alone would leave the others waiting for ever. A collective
before each block could ask all of them, but would make each wait for the slowest. Instead, ranks count their blocks in
shared memory: all of them run on one host.
"""

from multiprocessing.context import BaseContext

# A position is `task * TASK + step * STEP + blocks begun in that step`.
STEP, TASK = 2**20, 2**40


class CommonStop:
    """The positions of all ranks, and the one at which they stop.

    A cancelled rank makes all ranks stop one block after the furthest block that any of them has begun: every rank can
    reach it, because all take part in the exchanges before it, and none waits for an exchange behind it. If the step
    has no more blocks, all ranks reach its end.
    """

    def __init__(self, context: BaseContext, ranks: int) -> None:
        """`context` is the one that starts the ranks; pass this object to each of them as it starts."""
        self._lock = context.Lock()
        self._begun = context.RawArray("q", ranks)
        self._stop = context.RawValue("q", -1)

    def begin_step(self, rank: int, task: int) -> None:
        """Record that a rank begins the next step of a task; all ranks have ended the step before."""
        with self._lock:
            self._begun[rank] = max(task * TASK, (self._begun[rank] // STEP + 1) * STEP)

    def begin_block(self, rank: int, *, cancelled: bool) -> bool:
        """Record that a rank begins its next block; return True, and record nothing, if it must stop before it.

        `cancelled`: whether this rank knows that its task is cancelled.
        """
        with self._lock:
            position, stop = self._begun[rank] + 1, self._stop.value
            if stop // TASK != position // TASK:  # it was an earlier task's
                if not cancelled:
                    self._begun[rank] = position
                    return False
                stop = self._stop.value = max(self._begun) + 1
            if position >= stop:
                return True
            self._begun[rank] = position
            return False
