"""Reference for score: gathers one request after the other and calls the method."""

import math

import torch
from torch import Tensor

from rkv_vllm.kernels.eviction import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.methods.base import NonFiniteScoreError
from rkv_vllm.methods.rkv import scores


def score_naive(
    keys: PagedStates,
    batch: EvictionBatch,
    observation_queries: Tensor,
    *,
    lam: float = 0.1,
    pool: int = 7,
    threshold: float = 0.5,
) -> Tensor:
    """Score every settled token before the window; larger means more worth keeping.

    Args:
        keys: the cache's keys after RoPE.
        batch: the requests.
        observation_queries: [slots, num_layers, ring_len >= window, num_query_heads, head_size],
            after RoPE; the query of logical position p lies at p modulo ring_len.
        lam: weight of importance against redundancy.
        pool: width of the max-pool over importance, in tokens, odd.
        threshold: cosine above which two keys count as similar.

    Returns:
        float32 [R, num_layers * num_kv_heads, most candidates], -inf behind a row's candidates.

    Raises:
        NonFiniteScoreError: a score is NaN or infinite; names request and head.
        ValueError: the shapes do not fit.
    """
    batch.check_rows(keys)
    batch.check_observations(observation_queries, keys)
    shape = (batch.num_requests, keys.num_layers * keys.num_heads, batch.max_candidates)
    result = torch.full(shape, -math.inf, device=keys.device)
    method = {"window": batch.window, "lam": lam, "pool": pool, "threshold": threshold}
    for i, eviction in enumerate(batch.evictions):
        dense = keys.read(batch.old_block_table[i], eviction.settled_len).flatten(0, 1)
        queries = batch.window_queries(i, observation_queries)
        try:
            part = scores(dense, queries, **method)
        except NonFiniteScoreError as error:
            raise NonFiniteScoreError(error.head, request=i) from error
        result[i, :, : part.shape[1]] = part
    return result
