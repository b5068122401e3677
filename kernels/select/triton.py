"""select in Triton: one program per head finds its cut bit by bit, then writes what is above it.

A float32 becomes a uint32 of the same order. The cut is the largest number that at least `count`
scores reach; its 32 bits are found from the top, each with one count over the row, which stays in
the first-level cache. A second pass writes the indices in order: everything above the cut, and of
the scores equal to it the first ones. No sort, nothing returns to the host.
`select_naive` is the contract. Next: compact/triton.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.select.naive import check_scores

# Scores at once: up to 8 per thread of 4 warps. A row of 1152 takes two steps per bit. Not
# measured on a GPU yet.
TILE = tl.constexpr(1024)

# tiles.py says why.
VARYING = (
    "p_settled_lens",
    "p_prefix_lens",
    "p_budgets",
    "p_non_finite",
    "rows_per_request",
    "max_candidates",
    "max_budget",
)


@triton.jit
def _ordered(p_scores, o_score, m_score):
    """Scores as uint32 of the same order, and both zeros alike."""
    scores = tl.load(p_scores + o_score, mask=m_score, other=0.0)
    scores = tl.where(scores == 0.0, 0.0, scores)
    bits = scores.to(tl.uint32, bitcast=True)
    # Negative numbers count downwards: all bits flip; of the others only the sign.
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)


@triton.jit(do_not_specialize=VARYING)
def select_kernel(
    p_scores,
    p_settled_lens,
    p_prefix_lens,
    p_budgets,
    p_keep,
    p_non_finite,
    rows_per_request,
    max_candidates,
    max_budget,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Kept positions of one head, ascending, -1 behind them."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // rows_per_request
    prefix_len = tl.load(p_prefix_lens + i_request)
    m = tl.load(p_settled_lens + i_request) - prefix_len - WINDOW
    budget = tl.load(p_budgets + i_request)
    count = budget - WINDOW
    p_row = p_scores + i_row * max_candidates
    p_kept = p_keep + i_row * max_budget

    num_bad = 0
    for first in range(0, m, TILE):
        o_score = first + tl.arange(0, TILE)
        m_score = o_score < m
        scores = tl.load(p_row + o_score, mask=m_score, other=0.0)
        # False for NaN as well.
        is_finite = tl.abs(scores) < float("inf")
        num_bad += tl.sum((is_finite == 0).to(tl.int32), axis=0)
    if num_bad > 0:
        head = (i_row % rows_per_request).to(tl.int32)
        tl.atomic_min(p_non_finite + i_request, head, sem="relaxed")
        for first in range(0, count, TILE):
            o_kept = first + tl.arange(0, TILE)
            tl.store(p_kept + o_kept, prefix_len + m - count + o_kept, mask=o_kept < count)
    else:
        cut = tl.zeros((), tl.uint32)
        num_above = 0
        for i_bit in range(32):
            candidate = cut | (tl.full((), 0x80000000, tl.uint32) >> i_bit)
            num_reaching = 0
            for first in range(0, m, TILE):
                o_score = first + tl.arange(0, TILE)
                m_score = o_score < m
                reaches = m_score & (_ordered(p_row, o_score, m_score) >= candidate)
                num_reaching += tl.sum(reaches.to(tl.int32), axis=0)
            is_low = num_reaching >= count
            cut = tl.where(is_low, candidate, cut)
            # The last number that too few reach is the cut's successor.
            num_above = tl.where(is_low, num_above, num_reaching)

        num_tied = count - num_above
        num_kept = 0
        num_ties_seen = 0
        for first in range(0, m, TILE):
            o_score = first + tl.arange(0, TILE)
            m_score = o_score < m
            ordered = _ordered(p_row, o_score, m_score)
            is_tied = (m_score & (ordered == cut)).to(tl.int32)
            tie_rank = num_ties_seen + tl.cumsum(is_tied, axis=0)
            is_kept = m_score & ((ordered > cut) | ((is_tied > 0) & (tie_rank <= num_tied)))
            place = num_kept + tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
            tl.store(p_kept + place, prefix_len + o_score, mask=is_kept)
            num_kept += tl.sum(is_kept.to(tl.int32), axis=0)
            num_ties_seen += tl.sum(is_tied, axis=0)
    o_window = tl.arange(0, BLOCK_W)
    tl.store(p_kept + count + o_window, prefix_len + m + o_window, mask=o_window < WINDOW)
    for first in range(budget, max_budget, TILE):
        o_rest = first + tl.arange(0, TILE)
        tl.store(p_kept + o_rest, -1, mask=o_rest < max_budget)


def select_triton(scores: Tensor, batch: EvictionBatch) -> Tensor:
    """As `select_naive`."""
    check_scores(scores, batch)
    scores = scores.contiguous()
    num_requests, num_heads, max_candidates = scores.shape
    keep = torch.empty(
        (num_requests, num_heads, batch.max_budget), dtype=torch.int32, device=scores.device
    )
    if keep.numel():
        select_kernel[(num_requests * num_heads,)](
            scores,
            batch.settled_lens,
            batch.prefix_lens,
            batch.budgets,
            keep,
            batch.non_finite,
            num_heads,
            max_candidates,
            batch.max_budget,
            WINDOW=batch.window,
            BLOCK_W=triton.next_power_of_2(batch.window),
        )
    return keep
