"""Scores of a head: max-pool over its attention, softmax over its column sums, their weights."""

import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.rkv.triton.search import FIXED_POINT
from rkv_vllm.kernels.tiles import ROW_TILE, VARYING

# A program per head: few, so of many warps.
NUM_WARPS = 8


def launch_finish(
    batch: EvictionBatch,
    attention: Tensor | None,
    floors: Tensor | None,
    pool: int,
    sums: tuple[Tensor, Tensor] | None,
    weights: tuple[float, float],
    result: Tensor,
) -> None:
    """Importance, redundancy or the first minus the second.

    Args:
        batch: the requests.
        attention: float32 [rows, most candidates], or None.
        floors: float32 [rows], the least importance of each head, or None.
        pool: width of the max-pool, in tokens, odd.
        sums: column sums float32 [rows, most judged] and what is shielded of them, int64 of
            1 / FIXED_POINT, or None.
        weights: of importance and redundancy where both are given.
        result: out, float32 [R, rows of a request, most candidates]. Behind a row's candidates
            +inf where there is redundancy alone, else -inf.
    """
    num_requests, rows_per_request, max_candidates = result.shape
    column_sums, shielded = sums or (None, None)
    finish_kernel[(num_requests * rows_per_request,)](
        batch.settled_lens,
        batch.prefix_lens,
        attention,
        floors,
        column_sums,
        shielded,
        result,
        rows_per_request,
        batch.max_judged,
        max_candidates,
        *weights,
        IMPORTANCE=attention is not None,
        REDUNDANCY=sums is not None,
        DEFENSIVE=floors is not None,
        WINDOW=batch.window,
        POOL=pool,
        num_warps=NUM_WARPS,
    )


@triton.jit
def _pooled(p_attention, o_token, m, POOL: tl.constexpr):
    """Largest attention near each token, clipped to the candidates; -inf behind them."""
    b_pooled = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    for shift in tl.static_range(-(POOL // 2), POOL // 2 + 1):
        o_near = o_token + shift
        m_near = (o_near >= 0) & (o_near < m) & (o_token < m)
        b_near = tl.load(p_attention + o_near, mask=m_near, other=float("-inf"))
        # A maximum of NaN may be -inf on a GPU, which is not finite either.
        b_pooled = tl.maximum(b_pooled, b_near)
    return b_pooled


@triton.jit
def _spread_logits(p_column_sums, p_shielded, o_token, m_token, n):
    """Column sums without what is shielded, per token."""
    b_sums = tl.load(p_column_sums + o_token, mask=m_token, other=0.0)
    b_shielded = tl.load(p_shielded + o_token, mask=m_token, other=0)
    return (b_sums - b_shielded.to(tl.float32) / FIXED_POINT) / n


@triton.jit(do_not_specialize=VARYING)
def finish_kernel(
    p_settled_lens,
    p_prefix_lens,
    p_attention,
    p_floors,
    p_column_sums,
    p_shielded,
    p_result,
    rows_per_request,
    max_len,
    max_candidates,
    importance_weight,
    redundancy_weight,
    IMPORTANCE: tl.constexpr,
    REDUNDANCY: tl.constexpr,
    DEFENSIVE: tl.constexpr,
    WINDOW: tl.constexpr,
    POOL: tl.constexpr,
):
    """Scores of the candidates of one head."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // rows_per_request
    n = tl.load(p_settled_lens + i_request) - tl.load(p_prefix_lens + i_request)
    m = n - WINDOW
    largest = float("-inf")
    denominator = 0.0
    if REDUNDANCY:
        p_sums = p_column_sums + i_row * max_len
        p_shields = p_shielded + i_row * max_len
        for first in range(0, n, ROW_TILE):
            o_token = first + tl.arange(0, ROW_TILE)
            m_token = o_token < n
            b_logits = _spread_logits(p_sums, p_shields, o_token, m_token, n)
            b_logits = tl.where(m_token, b_logits, float("-inf"))
            new = tl.maximum(largest, tl.max(b_logits, axis=0))
            weights = tl.sum(tl.exp(b_logits - new), axis=0)
            denominator = denominator * tl.exp(largest - new) + weights
            largest = new
    for first in range(0, max_candidates, ROW_TILE):
        o_token = first + tl.arange(0, ROW_TILE)
        m_token = o_token < m
        b_score = tl.zeros((ROW_TILE,), tl.float32)
        if IMPORTANCE:
            b_score = _pooled(p_attention + i_row * max_candidates, o_token, m, POOL)
            if DEFENSIVE:
                # The largest of floored shares is the floored largest.
                b_score = tl.maximum(b_score, tl.load(p_floors + i_row))
        if REDUNDANCY:
            b_logits = _spread_logits(p_sums, p_shields, o_token, m_token, n)
            b_share = tl.exp(b_logits - largest) / denominator
            if IMPORTANCE:
                b_score = b_score * importance_weight - b_share * redundancy_weight
            else:
                b_score = b_share
        behind = float("-inf") if IMPORTANCE else float("inf")
        tl.store(
            p_result + i_row * max_candidates + o_token,
            tl.where(m_token, b_score, behind),
            mask=o_token < max_candidates,
        )
