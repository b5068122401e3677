"""score in C++: reads the paged keys in place, memory O(num_tokens) per thread."""

import math
from ctypes import byref

import torch
from torch import Tensor

from rkv_vllm.kernels.eviction import EvictionBatch
from rkv_vllm.kernels.native import DTYPES, library, paged
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.methods.base import NonFiniteScoreError

_NO_MEMORY = -2


def score_cpu(
    keys: PagedStates,
    batch: EvictionBatch,
    observation_queries: Tensor,
    *,
    lam: float = 0.1,
    pool: int = 7,
    threshold: float = 0.5,
) -> Tensor:
    """As `score_naive`; one call per request, whose heads the threads share."""
    batch.check_rows(keys)
    group = batch.check_observations(observation_queries, keys)
    num_heads = keys.num_layers * keys.num_heads
    scores = torch.full((batch.num_requests, num_heads, batch.max_candidates), -math.inf)
    described = paged(keys)
    for i, eviction in enumerate(batch.evictions):
        queries = batch.window_queries(i, observation_queries).to(keys.dtype).contiguous()
        bad_head = library().rkv_score(
            byref(described),
            batch.old_block_table[i].data_ptr(),
            queries.data_ptr(),
            DTYPES[keys.dtype],
            eviction.settled_len,
            group,
            batch.window,
            lam,
            pool,
            threshold,
            scores[i].data_ptr(),
            scores.stride(1),
        )
        if bad_head == _NO_MEMORY:
            raise MemoryError(
                f"no memory to score {eviction.settled_len} tokens of {num_heads} heads"
            )
        if bad_head >= 0:
            raise NonFiniteScoreError(bad_head, request=i)
    return scores
