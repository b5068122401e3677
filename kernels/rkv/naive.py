"""Reference for importance and redundancy: R-KV's formulas in plain torch.

Every step in float32, every head on its own; no pairwise matrix is ever stored. The first two
functions serve a paged cache, the next two are the maths on dense heads. A head that holds NaN or
Inf comes out NaN; nothing here raises for it. `docs/method.md` explains the formulas.

Source: R-KV: Redundancy-aware KV Cache Compression for Reasoning Models (arXiv:2505.24133),
section 3, with the tie, order and default rules that `docs/method.md` lists.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import FLOATS_OF_A_BYTE, PagedStates

# Dtypes of queries, and with those of a byte what keys and values are read as.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Keeps the unit key of an all-zero key finite.
NORM_EPSILON = 1e-8

# A centred key this much shorter than the mean key consists of rounding: it has no direction.
# bf16 keys that differ at all differ by more.
LEAST_CENTRED = 1e-5

# Keys per step of the backward search. Most rows find a similar key among the newest few, so a
# wider tile computes cosines that nobody reads; a narrower one leaves the matrix product idle.
TILE = 64

# Upper bound in float32 elements (4 MiB) for any one temporary (or one head's worth, if more).
# Heads are processed in groups that respect it, so that a long prompt costs time and not memory.
# Larger groups leave the CPU's cache and measured slower, much smaller ones pay more for calls.
MAX_TEMPORARY_ELEMENTS = 1 << 20


def importance_naive(
    keys: PagedStates,
    batch: EvictionBatch,
    queries: Tensor,
    scale: Tensor,
    soft_cap: Tensor,
    *,
    pool: int,
    defensive: bool = False,
) -> Tensor:
    """Attention that each request's window pays to its candidates.

    Args:
        keys: the cache's keys after RoPE.
        batch: the requests; each has a seat.
        queries: [seats, num_layers, ring_len >= window, num_query_heads, head_size], after RoPE;
            the query of logical position p lies at p modulo ring_len.
        scale: float32 [num_layers], factor of each layer's logits.
        soft_cap: float32 [num_layers], c of c * tanh(logit / c), 0 for a layer without one.
        pool: width of the max-pool, in tokens, odd.
        defensive: whether the most attentive query counts instead of the mean over the window, and
            no candidate less than the head's mean of that.

    Returns:
        float32 [R, num_layers * num_kv_heads, most candidates]; column i of request r is physical
        token `prefix_len + i`. -inf behind a row's candidates.

    Raises:
        ValueError: the shapes do not fit.
    """
    of_heads = partial(importance_of_heads, pool=pool, defensive=defensive)
    return score_windows_naive(of_heads, keys, batch, queries, scale, soft_cap)


def score_windows_naive(
    of_heads: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    keys: PagedStates,
    batch: EvictionBatch,
    queries: Tensor,
    scale: Tensor,
    soft_cap: Tensor,
) -> Tensor:
    """What a function of dense heads says each request's window pays to its candidates.

    Args:
        of_heads: (candidates, queries, scale, soft_cap) -> [heads, m], see `importance_of_heads`.
        keys: see `importance_naive`, as all the others.
        batch: see there.
        queries: see there.
        scale: see there.
        soft_cap: see there.
    """
    batch.check_rows(keys)
    check_queries(queries, batch, keys)
    check_scale(scale, soft_cap, keys)
    result = new_scores(keys, batch).fill_(-math.inf)
    by_head = [t.repeat_interleave(keys.num_heads) for t in (scale, soft_cap)]
    for i, eviction in enumerate(batch.evictions):
        if m := batch.num_candidates(i):
            row, end = batch.old_block_table[i], eviction.prefix_len + m
            dense = keys.numbers(row, end, eviction.prefix_len).flatten(0, 1)
            window = batch.window_queries(i, queries)
            result[i, :, :m] = of_heads(dense, window, *by_head)
    return result


def redundancy_naive(
    keys: PagedStates, batch: EvictionBatch, *, threshold: float, center: bool = False
) -> Tensor:
    """How much each candidate repeats the other judged tokens, window included.

    Args:
        keys: the cache's keys after RoPE.
        batch: the requests.
        threshold: cosine above which two keys count as similar.
        center: whether the mean of a head's judged keys is taken off each of them first.

    Returns:
        float32 [R, num_layers * num_kv_heads, most candidates]; with the window's, which are left
        out, a head's sum to 1. +inf behind a row's candidates, so that a difference of importance
        and redundancy is -inf there.

    Raises:
        ValueError: the rows do not fit the cache.
    """
    batch.check_rows(keys)
    check_keys(keys)
    result = new_scores(keys, batch).fill_(math.inf)
    for i, eviction in enumerate(batch.evictions):
        if m := batch.num_candidates(i):
            row = batch.old_block_table[i]
            dense = keys.numbers(row, eviction.settled_len, eviction.prefix_len).flatten(0, 1)
            found = redundancy_of_heads(dense, threshold=threshold, center=center)
            result[i, :, :m] = found[:, :m]
    return result


@torch.no_grad()
def importance_of_heads(
    candidates: Tensor,
    queries: Tensor,
    scale: Tensor,
    soft_cap: Tensor,
    *,
    pool: int,
    defensive: bool = False,
) -> Tensor:
    """Attention that a window pays to the tokens before it.

    Args:
        candidates: [heads, m, head_size], any float dtype, cache order, after RoPE.
        queries: [heads * group, window, head_size], any float dtype, after RoPE. Query head
            `h * group + g` reads KV head `h`.
        scale: float32 [heads].
        soft_cap: float32 [heads], 0 = none.
        pool: width of the max-pool, in tokens, odd.
        defensive: see `importance_naive`.

    Returns:
        float32 [heads, m].
    """
    num_heads, m, head_size = candidates.shape
    group, window = queries.shape[0] // max(num_heads, 1), queries.shape[1]
    result = candidates.new_empty((num_heads, m), dtype=torch.float32)
    for heads in head_groups(num_heads, m * max(head_size, group * window)):
        own = queries[heads.start * group : heads.stop * group].float()
        # A head's group and window rows side by side: one product per KV head.
        rows = own.reshape(-1, group * window, head_size) * scale[heads].view(-1, 1, 1)
        logits = rows @ candidates[heads].float().transpose(1, 2)
        extremes = logits.amin(dim=(1, 2)) * 0.0 + logits.amax(dim=(1, 2)) * 0.0
        logits = logits.view(-1, group, window, m).amax(dim=1)
        cap = soft_cap[heads].view(-1, 1, 1)
        if cap.any():
            # It keeps the order, so the largest of the group is still the largest.
            logits = torch.where(cap > 0, cap * (logits / cap).tanh(), logits)
        shares = logits.softmax(dim=-1)
        attention = shares.amax(dim=1) if defensive else shares.mean(dim=1)
        # Max, softmax and tanh would hide an infinite logit; as NaN it reaches `select`.
        attention += extremes.unsqueeze(-1)
        if defensive:
            attention = attention.maximum(attention.mean(dim=-1, keepdim=True))
        # The padding of max_pool1d counts as -inf, which clips the pool to the candidates.
        pooled = F.max_pool1d(attention.unsqueeze(1), pool, stride=1, padding=pool // 2)
        result[heads] = pooled.squeeze(1)
    return result


@torch.no_grad()
def redundancy_of_heads(keys: Tensor, *, threshold: float, center: bool = False) -> Tensor:
    """How much each key repeats the others, as a distribution over all of them.

    Args:
        keys: [heads, n, head_size], any float dtype, cache order, after RoPE.
        threshold: cosine above which two keys count as similar.
        center: see `redundancy_naive`.

    Returns:
        float32 [heads, n].
    """
    num_heads, n, head_size = keys.shape
    result = keys.new_empty((num_heads, n), dtype=torch.float32)
    for heads in head_groups(num_heads, n * max(head_size, TILE)):
        own = keys[heads].float()
        result[heads] = _redundancy(_centred(own) if center else own, threshold)
    return result


def head_groups(num_heads: int, elements_per_head: int) -> Iterator[slice]:
    """Heads whose temporaries are within bounds together, at least one at a time."""
    step = max(1, MAX_TEMPORARY_ELEMENTS // elements_per_head)
    for first in range(0, num_heads, step):
        yield slice(first, min(first + step, num_heads))


def _centred(keys: Tensor) -> Tensor:
    mean = keys.mean(dim=1, keepdim=True)
    centred = keys - mean
    least = LEAST_CENTRED * torch.linalg.vector_norm(mean, dim=-1, keepdim=True)
    norms = torch.linalg.vector_norm(centred, dim=-1, keepdim=True)
    return centred.masked_fill_(norms <= least, 0.0)


def _redundancy(keys: Tensor, threshold: float) -> Tensor:
    n = keys.shape[1]
    norms = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    unit = (keys / (norms + NORM_EPSILON)).contiguous()
    # Column sums of the cosine matrix without its diagonal, from the sum of all unit keys.
    total = unit.sum(dim=1).unsqueeze(-1)
    sums = (unit @ total - (norms / (norms + NORM_EPSILON)).square()).squeeze(-1)

    # The newest key similar to row i is not held against its cluster: take row i's cosine with it
    # out of the sum again. Row 0 points to itself when nothing is similar; it has no cosine there.
    newest = _newest_similar(unit, threshold)
    shielded = _take_rows(unit, newest).mul_(unit).sum(dim=-1)
    shielded.masked_fill_(newest == torch.arange(n, device=keys.device), 0.0)
    sums.scatter_add_(1, newest, -shielded)
    return (sums / n).softmax(dim=-1)


def _newest_similar(unit: Tensor, threshold: float) -> Tensor:
    """For every row the largest other index with cosine > threshold, 0 without any: [heads, n].

    Goes through the keys in tiles from the newest backwards and ends as soon as no row is open.
    Once at most half of the rows at hand are open, only those are carried on, and the tiles grow
    as the rows get fewer: every step costs about the same, so a few stubborn rows cost few steps.
    """
    num_heads, n, _ = unit.shape
    newest = torch.full((num_heads, n), -1, dtype=torch.int64, device=unit.device)
    rows = torch.arange(n, device=unit.device).expand(num_heads, n)
    row_keys = unit
    num_open = stop = n
    while num_open and stop:
        start = max(stop - TILE * n // rows.shape[1], 0)
        hit = _last_hit(row_keys, rows, unit[:, start:stop], start, threshold)
        known = newest.gather(1, rows)
        newest.scatter_(1, rows, torch.where(known < 0, hit, known))
        is_open = newest < 0
        num_open = int(is_open.sum(dim=1).max())
        if 0 < 2 * num_open <= rows.shape[1]:
            # Heads with fewer open rows fill up with settled ones, which `known` protects.
            rows = is_open.float().topk(num_open, dim=1, sorted=False).indices
            row_keys = _take_rows(unit, rows)
        stop = start
    return newest.clamp_(min=0)


def _last_hit(
    row_keys: Tensor,
    rows: Tensor,
    tile: Tensor,
    start: int,
    threshold: float,
) -> Tensor:
    """Largest column of the tile that is similar to each row and is not the row, -1 without any."""
    width = tile.shape[1]
    # A similar column is replaced by its number counted from 1, any other by 0. In place and in
    # float32: that is exact for a tile and the fastest of the forms that were timed.
    numbers = torch.arange(1, width + 1, dtype=torch.float32, device=tile.device)
    hits = (row_keys @ tile.transpose(1, 2)).gt_(threshold).mul_(numbers)
    # Zero each row's own column; a row outside the tile rewrites what its border column holds.
    own = (rows - start).unsqueeze(-1)
    is_outside = (own < 0) | (own >= width)
    own = own.clamp(0, width - 1)
    hits.scatter_(2, own, hits.gather(2, own) * is_outside)
    last = hits.amax(dim=-1).long()
    return torch.where(last > 0, last + (start - 1), -1)


def _take_rows(unit: Tensor, rows: Tensor) -> Tensor:
    """Rows [heads, k] of every head: [heads, k, head_size]."""
    num_heads, n, head_size = unit.shape
    flat = rows + n * torch.arange(num_heads, device=unit.device).unsqueeze(-1)
    # On a CPU index_select copies whole rows: several times faster than gather or indexing.
    taken = unit.view(-1, head_size).index_select(0, flat.view(-1))
    return taken.view(num_heads, -1, head_size)


def new_scores(keys: PagedStates, batch: EvictionBatch) -> Tensor:
    """Memory for one number per candidate: float32 [R, num_layers * num_kv_heads, most of them]."""
    shape = (batch.num_requests, keys.num_layers * keys.num_heads, batch.max_candidates)
    return torch.empty(shape, dtype=torch.float32, device=keys.device)


def check_keys(keys: PagedStates) -> None:
    """Raise ValueError unless keys of this dtype can be scored."""
    known = (*FLOATS, *FLOATS_OF_A_BYTE)
    if keys.dtype not in known:
        raise ValueError(f"keys: expected one of {known}, got {keys.dtype}")


def check_queries(queries: Tensor, batch: EvictionBatch, keys: PagedStates) -> int:
    """Query heads per KV head; ValueError unless every window lies in this ring."""
    check_keys(keys)
    shape = list(queries.shape)
    fits = (
        len(shape) == 5
        and shape[1] == keys.num_layers
        and shape[2] >= batch.window
        and shape[3] >= keys.num_heads
        and shape[3] % keys.num_heads == 0
        and shape[4] == keys.head_size
    )
    if not fits or queries.device != keys.device:
        raise ValueError(
            f"queries: expected [seats, {keys.num_layers}, >= {batch.window}, multiple of "
            f"{keys.num_heads}, {keys.head_size}] on {keys.device}, got {shape} on "
            f"{queries.device}"
        )
    if queries.dtype not in FLOATS:
        raise ValueError(f"queries: expected one of {FLOATS}, got {queries.dtype}")
    seats = [eviction.seat for eviction in batch.evictions]
    if any(not 0 <= seat < shape[0] for seat in seats):
        raise ValueError(f"seats: expected ids in [0, {shape[0]}), got {seats}")
    return shape[3] // keys.num_heads


def check_scale(scale: Tensor, soft_cap: Tensor, keys: PagedStates) -> None:
    """Raise ValueError unless these are one number per layer of this cache."""
    for name, tensor in (("scale", scale), ("soft_cap", soft_cap)):
        fits = tensor.shape == (keys.num_layers,) and tensor.is_contiguous()
        if not fits or tensor.dtype != torch.float32 or tensor.device != keys.device:
            raise ValueError(
                f"{name}: expected contiguous float32 [{keys.num_layers}] on {keys.device}, got "
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
