"""select in C++: one partial sort per row."""

import torch
from torch import Tensor

from rkv_vllm.kernels.eviction import EvictionBatch
from rkv_vllm.kernels.native import library


def select_cpu(scores: Tensor, batch: EvictionBatch) -> Tensor:
    """As `select_naive`."""
    batch.check_scores(scores)
    scores = scores.contiguous()
    shape = (batch.num_requests, scores.shape[1], batch.max_budget)
    keep = torch.full(shape, -1, dtype=torch.int32)
    for i, eviction in enumerate(batch.evictions):
        library().rkv_select(
            scores[i].data_ptr(),
            scores.stride(1),
            scores.shape[1],
            eviction.settled_len - batch.window,
            eviction.budget - batch.window,
            batch.window,
            keep[i].data_ptr(),
            keep.stride(1),
        )
    return keep
