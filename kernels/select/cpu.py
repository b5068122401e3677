"""select in C++: one partial sort per row."""

import torch
from torch import Tensor

from rkv_vllm.kernels.native import library


def select_cpu(scores: Tensor, count: int) -> Tensor:
    """As `select_naive`.

    Raises:
        ValueError: `scores` is no float32 matrix, or `count` does not fit its rows.
    """
    if scores.dtype != torch.float32 or scores.dim() != 2 or not 0 <= count <= scores.shape[1]:
        raise ValueError(
            f"scores: expected float32 [num_rows, >= {count}], got {scores.dtype} "
            f"{list(scores.shape)}"
        )
    scores = scores.contiguous()
    kept = torch.empty(scores.shape[0], count, dtype=torch.int64)
    library().rkv_select(scores.data_ptr(), *scores.shape, count, kept.data_ptr())
    return kept
