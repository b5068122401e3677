"""Max-pool over a head's attention: the last step of importance."""

import triton
import triton.language as tl

from rkv_vllm.kernels.tiles import ROW_TILE, VARYING


@triton.jit(do_not_specialize=VARYING)
def pool_kernel(
    p_settled_lens,
    p_prefix_lens,
    p_attention,
    p_floors,
    p_result,
    rows_per_request,
    max_candidates,
    DEFENSIVE: tl.constexpr,
    WINDOW: tl.constexpr,
    POOL: tl.constexpr,
):
    """Max-pool of a tile of one head, clipped to its candidates; -inf behind them."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // rows_per_request
    m = tl.load(p_settled_lens + i_request) - tl.load(p_prefix_lens + i_request) - WINDOW
    o_row = i_row * max_candidates
    o_token = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    b_pooled = tl.full((ROW_TILE,), float("-inf"), tl.float32)
    for shift in tl.static_range(-(POOL // 2), POOL // 2 + 1):
        o_near = o_token + shift
        m_near = (o_near >= 0) & (o_near < m) & (o_token < m)
        b_near = tl.load(p_attention + o_row + o_near, mask=m_near, other=float("-inf"))
        # A maximum of NaN may be -inf on a GPU, which is not finite either.
        b_pooled = tl.maximum(b_pooled, b_near)
    if DEFENSIVE:
        # The largest of floored shares is the floored largest.
        b_floored = tl.maximum(b_pooled, tl.load(p_floors + i_row))
        b_pooled = tl.where(o_token < m, b_floored, b_pooled)
    tl.store(p_result + o_row + o_token, b_pooled, mask=o_token < max_candidates)
