"""Reference for VaSE's two halves: mean attention of a window, and how wide values are.

Every step in float32, every head on its own; nothing here raises for NaN or Inf. How the two make a
score is said in rkv_vllm/methods/vase.py.

Source: VaSE (arXiv:2606.03928).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.naive import (
    check_keys,
    head_groups,
    new_scores,
    score_windows_naive,
)


def attention_naive(
    keys: PagedStates,
    batch: EvictionBatch,
    queries: Tensor,
    scale: Tensor,
    soft_cap: Tensor,
    *,
    pool: int,
) -> Tensor:
    """Mean attention that each request's window pays to its candidates and their neighbours.

    Other than in `importance_naive` each query head has a softmax of its own, over the candidates.

    Args:
        keys: the cache's keys after RoPE.
        batch: the requests; each has a seat.
        queries: see `importance_naive`.
        scale: see there.
        soft_cap: see there.
        pool: width of the average over neighbours, in tokens, odd; clipped to the candidates.

    Returns:
        float32 [R, num_layers * num_kv_heads, most candidates]; column i of request r is physical
        token `prefix_len + i`. -inf behind a row's candidates; a head that holds NaN or Inf is NaN.

    Raises:
        ValueError: the shapes do not fit.
    """
    of_heads = partial(attention_of_heads, pool=pool)
    return score_windows_naive(of_heads, keys, batch, queries, scale, soft_cap)


def channel_range_naive(values: PagedStates, batch: EvictionBatch) -> Tensor:
    """How far the elements of each candidate's value lie apart.

    Args:
        values: the cache's values.
        batch: the requests.

    Returns:
        float32 [R, num_layers * num_kv_heads, most candidates], largest minus smallest element; NaN
        or infinite where an element is. 0 behind a row's candidates.

    Raises:
        ValueError: the rows do not fit the cache.
    """
    batch.check_rows(values)
    check_keys(values)
    result = new_scores(values, batch).zero_()
    for i, eviction in enumerate(batch.evictions):
        if m := batch.num_candidates(i):
            row, end = batch.old_block_table[i], eviction.prefix_len + m
            dense = values.numbers(row, end, eviction.prefix_len).flatten(0, 1)
            result[i, :, :m] = dense.amax(dim=-1).float() - dense.amin(dim=-1).float()
    return result


@torch.no_grad()
def attention_of_heads(
    candidates: Tensor, queries: Tensor, scale: Tensor, soft_cap: Tensor, *, pool: int
) -> Tensor:
    """Mean attention that a window pays to the tokens before it.

    Args:
        candidates: [heads, m, head_size], any float dtype, cache order, after RoPE.
        queries: [heads * group, window, head_size], any float dtype, after RoPE. Query head
            `h * group + g` reads KV head `h`.
        scale: float32 [heads].
        soft_cap: float32 [heads], 0 = none.
        pool: see `attention_naive`.

    Returns:
        float32 [heads, m].
    """
    num_heads, m, head_size = candidates.shape
    rows_per_head = queries.shape[0] // max(num_heads, 1) * queries.shape[1]
    result = candidates.new_empty((num_heads, m), dtype=torch.float32)
    by_head = queries.reshape(num_heads, rows_per_head, head_size)
    for heads in head_groups(num_heads, m * max(head_size, rows_per_head)):
        rows = by_head[heads].float() * scale[heads].view(-1, 1, 1)
        logits = rows @ candidates[heads].float().transpose(1, 2)
        # Softmax and cap would hide an infinite logit.
        extremes = logits.amin(dim=(1, 2)) * 0.0 + logits.amax(dim=(1, 2)) * 0.0
        cap = soft_cap[heads].view(-1, 1, 1)
        if cap.any():
            logits = torch.where(cap > 0, cap * (logits / cap).tanh(), logits)
        mean = logits.softmax(dim=-1).mean(dim=1) + extremes.unsqueeze(-1)
        pooled = F.avg_pool1d(
            mean.unsqueeze(1), pool, stride=1, padding=pool // 2, count_include_pad=False
        )
        result[heads] = pooled.squeeze(1)
    return result
