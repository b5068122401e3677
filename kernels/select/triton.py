"""select in Triton: one program per head finds its cut bit by bit, then writes what is above it.

A float32 becomes a uint32 of the same order. The cut is the largest number that at least `count`
scores reach; its bits are found from the top, each with one count over the row, until a number is
reached by exactly as many as are wanted. A row of up to IN_REGISTERS scores is read once and stays
in registers, a longer one is read again for every bit, from the first-level cache. A last pass
writes the indices in order: everything above the cut, and of the scores equal to it the first ones.
No sort, nothing returns to the host.
`select_naive` is the contract. Next: compact/triton.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.select.naive import check_scores

# Scores of a row that is read once, and scores at once of a longer one: 16 per thread of 4 warps.
IN_REGISTERS = tl.constexpr(2048)
TILE = tl.constexpr(2048)

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
def _ordered(b_scores, m_score):
    """Scores as uint32 of the same order, and both zeros alike; 0 outside of the row."""
    b_scores = tl.where(b_scores == 0.0, 0.0, b_scores)
    bits = b_scores.to(tl.uint32, bitcast=True)
    # Negative numbers count downwards: all bits flip; of the others only the sign.
    bits = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits ^ 0x80000000)
    return tl.where(m_score, bits, 0)


@triton.jit
def _num_bad(b_scores):
    # False for NaN as well.
    is_finite = tl.abs(b_scores) < float("inf")
    return tl.sum((is_finite == 0).to(tl.int32), axis=0)


@triton.jit
def _narrowed(cut, num_above, i_bit, candidate, num_reaching, count):
    """Cut, number of scores above it and next bit, once it is known how many reach a candidate."""
    is_low = num_reaching >= count
    cut = tl.where(is_low, candidate, cut)
    # The last number that too few reach is the cut's successor. Where exactly as many as wanted
    # reach the cut, all of those equal to it are kept, and the other bits do not matter.
    is_exact = num_reaching == count
    num_above = tl.where(is_exact, 0, tl.where(is_low, num_above, num_reaching))
    return cut, num_above, tl.where(is_exact, 32, i_bit + 1)


@triton.jit
def _write(p_kept, b_ordered, o_score, m_score, cut, num_tied, num_kept, num_ties_seen, prefix_len):
    """Store what is kept of some scores; returns how many are, and how many are tied."""
    b_tied = (m_score & (b_ordered == cut)).to(tl.int32)
    b_tie_rank = num_ties_seen + tl.cumsum(b_tied, axis=0)
    is_kept = m_score & ((b_ordered > cut) | ((b_tied > 0) & (b_tie_rank <= num_tied)))
    place = num_kept + tl.cumsum(is_kept.to(tl.int32), axis=0) - 1
    tl.store(p_kept + place, prefix_len + o_score, mask=is_kept)
    return num_kept + tl.sum(is_kept.to(tl.int32), axis=0), num_ties_seen + tl.sum(b_tied, axis=0)


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
    top = tl.full((), 0x80000000, tl.uint32)
    cut = tl.zeros((), tl.uint32)
    num_above = 0
    i_bit = 0
    num_bad = 0
    if m <= IN_REGISTERS:
        o_row = tl.arange(0, IN_REGISTERS)
        m_row = o_row < m
        b_scores = tl.load(p_row + o_row, mask=m_row, other=0.0)
        num_bad = _num_bad(b_scores)
        if num_bad == 0:
            b_ordered = _ordered(b_scores, m_row)
            while i_bit < 32:
                candidate = cut | (top >> i_bit)
                num_reaching = tl.sum((b_ordered >= candidate).to(tl.int32), axis=0)
                cut, num_above, i_bit = _narrowed(
                    cut, num_above, i_bit, candidate, num_reaching, count
                )
            _write(p_kept, b_ordered, o_row, m_row, cut, count - num_above, 0, 0, prefix_len)
    else:
        o_tile = tl.arange(0, TILE)
        for first in range(0, m, TILE):
            num_bad += _num_bad(tl.load(p_row + first + o_tile, mask=first + o_tile < m, other=0.0))
        if num_bad == 0:
            while i_bit < 32:
                candidate = cut | (top >> i_bit)
                num_reaching = 0
                for first in range(0, m, TILE):
                    m_tile = first + o_tile < m
                    b_scores = tl.load(p_row + first + o_tile, mask=m_tile, other=0.0)
                    reaches = _ordered(b_scores, m_tile) >= candidate
                    num_reaching += tl.sum(reaches.to(tl.int32), axis=0)
                cut, num_above, i_bit = _narrowed(
                    cut, num_above, i_bit, candidate, num_reaching, count
                )
            num_kept = 0
            num_ties_seen = 0
            for first in range(0, m, TILE):
                o_score = first + o_tile
                m_tile = o_score < m
                b_scores = tl.load(p_row + o_score, mask=m_tile, other=0.0)
                num_kept, num_ties_seen = _write(
                    p_kept,
                    _ordered(b_scores, m_tile),
                    o_score,
                    m_tile,
                    cut,
                    count - num_above,
                    num_kept,
                    num_ties_seen,
                    prefix_len,
                )
    if num_bad > 0:
        head = (i_row % rows_per_request).to(tl.int32)
        tl.atomic_min(p_non_finite + i_request, head, sem="relaxed")
        for first in range(0, count, TILE):
            o_kept = first + tl.arange(0, TILE)
            tl.store(p_kept + o_kept, prefix_len + m - count + o_kept, mask=o_kept < count)
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
