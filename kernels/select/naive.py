"""Reference for select."""

import torch
from torch import Tensor

from rkv_vllm.kernels.eviction import EvictionBatch
from rkv_vllm.methods.rkv import largest


def select_naive(scores: Tensor, batch: EvictionBatch) -> Tensor:
    """Positions that each head keeps: the best scored candidates and the window.

    Args:
        scores: float32 [R, heads, most candidates]; of request r the first
            `settled_len - window` of each row are finite and count.
        batch: the requests.

    Returns:
        int32 [R, heads, largest budget], ascending; of equal scores the lower index stays. -1
        behind a smaller budget.

    Raises:
        ValueError: `scores` is not of this batch.
    """
    batch.check_scores(scores)
    shape = (batch.num_requests, scores.shape[1], batch.max_budget)
    keep = torch.full(shape, -1, dtype=torch.int32, device=scores.device)
    for i, eviction in enumerate(batch.evictions):
        num_candidates = eviction.settled_len - batch.window
        count = eviction.budget - batch.window
        keep[i, :, :count] = largest(scores[i, :, :num_candidates], count)
        window = torch.arange(num_candidates, eviction.settled_len, device=scores.device)
        keep[i, :, count : eviction.budget] = window
    return keep
