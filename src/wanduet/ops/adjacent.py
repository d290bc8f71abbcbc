"""Tensors that lie side by side in memory, seen as one."""

from torch import Tensor


def side_by_side(first: Tensor, *others: Tensor) -> Tensor | None:
    """All of them concatenated over dim 0, without a copy; None where they do not lie so in one storage.

    Looked up at each use, because a module's parameters may be moved apart (`.to()`) at any time.
    """
    storage = first.untyped_storage().data_ptr()
    end = first.data_ptr() + first.nbytes
    for x in others:
        same = x.dtype == first.dtype and x.shape[1:] == first.shape[1:] and x.is_contiguous()
        if not same or x.data_ptr() != end or x.untyped_storage().data_ptr() != storage:
            return None
        end += x.nbytes
    if not first.is_contiguous() or storage == 0:  # 0: the meta device
        return None
    length = first.shape[0] + sum(x.shape[0] for x in others)
    return first.detach().as_strided((length, *first.shape[1:]), first.stride())
