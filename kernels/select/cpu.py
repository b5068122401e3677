"""select in C++: one partial sort per row."""

import torch
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.native import check_memory, library
from rkv_vllm.kernels.select.naive import check_scores


def select_cpu(scores: Tensor, batch: EvictionBatch) -> Tensor:
    """As `select_naive`."""
    check_scores(scores, batch)
    scores = scores.contiguous()
    shape = (batch.num_requests, scores.shape[1], batch.max_budget)
    keep = torch.full(shape, -1, dtype=torch.int32)
    for i, eviction in enumerate(batch.evictions):
        result = library().rkv_select(
            scores[i].data_ptr(),
            scores.stride(1),
            scores.shape[1],
            eviction.prefix_len,
            batch.num_candidates(i),
            eviction.budget - batch.window,
            batch.window,
            keep[i].data_ptr(),
            keep.stride(1),
            batch.non_finite[i].data_ptr(),
        )
        check_memory(result, f"select among {batch.num_candidates(i)} tokens")
    return keep
