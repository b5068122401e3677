"""Softmax over a head's column sums: the last step of redundancy."""

import triton
import triton.language as tl

from rkv_vllm.kernels.rkv.triton.search import FIXED_POINT
from rkv_vllm.kernels.tiles import ROW_TILE, VARYING


@triton.jit
def _spread_logits(p_column_sums, p_shielded, o_token, m_token, n):
    """Column sums without what is shielded, per token."""
    b_sums = tl.load(p_column_sums + o_token, mask=m_token, other=0.0)
    b_shielded = tl.load(p_shielded + o_token, mask=m_token, other=0)
    return (b_sums - b_shielded.to(tl.float32) / FIXED_POINT) / n


@triton.jit(do_not_specialize=VARYING)
def spread_kernel(
    p_settled_lens,
    p_prefix_lens,
    p_column_sums,
    p_shielded,
    p_result,
    rows_per_request,
    max_len,
    max_candidates,
    WINDOW: tl.constexpr,
):
    """Softmax over the column sums of one head; of the candidates, +inf behind them."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // rows_per_request
    n = tl.load(p_settled_lens + i_request) - tl.load(p_prefix_lens + i_request)
    p_sums = p_column_sums + i_row * max_len
    p_shields = p_shielded + i_row * max_len
    largest = float("-inf")
    denominator = 0.0
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
        m_token = o_token < n - WINDOW
        b_logits = _spread_logits(p_sums, p_shields, o_token, m_token, n)
        b_share = tl.exp(b_logits - largest) / denominator
        tl.store(
            p_result + i_row * max_candidates + o_token,
            tl.where(m_token, b_share, float("inf")),
            mask=o_token < max_candidates,
        )
