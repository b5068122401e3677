"""Reference for select."""

from torch import Tensor

from rkv_vllm.methods.rkv import largest


def select_naive(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores per row.

    Args:
        scores: float32 [num_rows, m], finite.
        count: how many, 0 to m.

    Returns:
        int64 [num_rows, count], ascending; of equal scores the lower index stays.
    """
    return largest(scores, count)
