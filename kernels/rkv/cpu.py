"""Importance and redundancy in C++: read the paged keys in place, memory O(tokens) per thread."""

import math
from collections.abc import Callable
from ctypes import byref
from typing import Any

from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.native import DTYPES, check_memory, library, paged
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.naive import check_keys, check_queries, check_scale, new_scores


def importance_cpu(
    keys: PagedStates,
    batch: EvictionBatch,
    queries: Tensor,
    scale: Tensor,
    soft_cap: Tensor,
    *,
    pool: int,
    defensive: bool = False,
) -> Tensor:
    """As `importance_naive`; one call per request, whose heads the threads share."""
    call = library().rkv_importance
    return score_windows_cpu(call, keys, batch, queries, scale, soft_cap, pool, defensive)


def score_windows_cpu(
    call: Callable[..., int],
    keys: PagedStates,
    batch: EvictionBatch,
    queries: Tensor,
    scale: Tensor,
    soft_cap: Tensor,
    pool: int,
    *more: Any,
) -> Tensor:
    """What a function of the library says each request's window pays to its candidates.

    Args:
        call: takes one request; the rows of its result are those of its heads.
        keys: see `importance_naive`, as all the others.
        batch: see there.
        queries: see there.
        scale: see there.
        soft_cap: see there.
        pool: see there.
        more: further arguments of the function, behind the others.
    """
    batch.check_rows(keys)
    group = check_queries(queries, batch, keys)
    check_scale(scale, soft_cap, keys)
    result = new_scores(keys, batch).fill_(-math.inf)
    described, scale_of_heads = paged(keys), keys.scale_of_heads(scale)
    for i, eviction in enumerate(batch.evictions):
        if not batch.num_candidates(i):
            continue
        window = batch.window_queries(i, queries).float().contiguous()
        done = call(
            byref(described),
            batch.old_block_table[i].data_ptr(),
            DTYPES[keys.dtype],
            eviction.prefix_len,
            eviction.num_judged,
            window.data_ptr(),
            scale_of_heads.data_ptr(),
            soft_cap.data_ptr(),
            group,
            batch.window,
            pool,
            result[i].data_ptr(),
            result.stride(1),
            *more,
        )
        check_memory(done, f"score {eviction.num_judged} tokens")
    return result


def redundancy_cpu(
    keys: PagedStates,
    batch: EvictionBatch,
    *,
    threshold: float,
    center: bool = False,
    num_tiles: Tensor | None = None,
) -> Tensor:
    """As `redundancy_naive`; one call per request, whose heads the threads share.

    Args:
        keys: see `redundancy_naive`.
        batch: see `redundancy_naive`.
        threshold: see `redundancy_naive`.
        center: see `redundancy_naive`.
        num_tiles: int64 [1], raised by the number of tiles of 4 x 32 pairs that were looked at.
    """
    batch.check_rows(keys)
    check_keys(keys)
    result = new_scores(keys, batch).fill_(math.inf)
    described = paged(keys)
    for i, eviction in enumerate(batch.evictions):
        if not batch.num_candidates(i):
            continue
        done = library().rkv_redundancy(
            byref(described),
            batch.old_block_table[i].data_ptr(),
            DTYPES[keys.dtype],
            eviction.prefix_len,
            eviction.num_judged,
            batch.num_candidates(i),
            threshold,
            result[i].data_ptr(),
            result.stride(1),
            None if num_tiles is None else num_tiles.data_ptr(),
            center,
        )
        check_memory(done, f"score {eviction.num_judged} tokens")
    return result
