"""What one program makes of all tiles of a head: the window's attention, the sum of unit keys.

Tiles are added up in order: which request shares the launch changes no bit.
"""

import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.triton.stats import Window
from rkv_vllm.kernels.tiles import TILE, VARYING, add_up_layout

# Logits at once: 16 per thread.
LOGITS_AT_ONCE = 4096
# Tiles that are added up at once.
TILES_AT_ONCE = tl.constexpr(16)


def launch_combine(
    keys: PagedStates,
    batch: EvictionBatch,
    window: Window | None,
    attention: Tensor | None,
    floors: Tensor | None = None,
    *,
    tile_sums: Tensor | None = None,
    totals: Tensor | None = None,
    add: bool = False,
) -> None:
    """Mean share of each candidate, or the largest where there are floors; sums over all tiles.

    Args:
        keys: the cache.
        batch: the requests.
        window: as `launch_stats` leaves it, or None.
        attention: out, float32 [rows, most candidates], with a window.
        floors: out, float32 [rows], the mean of the largest shares of each head, or None.
        tile_sums: float32 [rows, tiles, head_size], or None.
        totals: out, float32 [rows, head_size], with tile_sums.
        add: whether to add to the attention that is there.
    """
    block_w = triton.next_power_of_2(batch.window)
    rows_per_request = keys.num_layers * keys.num_heads
    combine_kernel[(batch.num_requests * rows_per_request,)](
        batch.settled_lens,
        batch.prefix_lens,
        window.logits if window else None,
        attention,
        floors,
        tile_sums,
        totals,
        rows_per_request,
        batch.max_candidates,
        tile_sums.shape[1] if tile_sums is not None else 0,
        IMPORTANCE=window is not None,
        REDUNDANCY=tile_sums is not None,
        DEFENSIVE=floors is not None,
        ADD=add,
        WINDOW=batch.window,
        BLOCK_W=block_w,
        TOKENS=max(LOGITS_AT_ONCE // block_w, 64),
        **add_up_layout(keys),
    )


@triton.jit
def sum_of_tiles(
    p_sums, num_parts, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Sum [BLOCK_D] of the first tiles' sums."""
    o_dim = tl.arange(0, BLOCK_D)
    b_total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, num_parts, AT_ONCE):
        o_part = first + tl.arange(0, AT_ONCE)
        m_sums = (o_part < num_parts)[:, None] & (o_dim < HEAD_SIZE)[None, :]
        p_parts = p_sums + o_part[:, None].to(tl.int64) * HEAD_SIZE + o_dim[None, :]
        b_total += tl.sum(tl.load(p_parts, mask=m_sums, other=0.0), axis=0)
    return b_total


@triton.jit(do_not_specialize=VARYING)
def combine_kernel(
    p_settled_lens,
    p_prefix_lens,
    p_logits,
    p_attention,
    p_floors,
    p_tile_sums,
    p_totals,
    rows_per_request,
    max_candidates,
    num_tiles,
    IMPORTANCE: tl.constexpr,
    REDUNDANCY: tl.constexpr,
    DEFENSIVE: tl.constexpr,
    ADD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GRAIN: tl.constexpr,
):
    """Attention of the window: softmax of a head, mean or maximum of rows; sum of its tiles."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // rows_per_request
    prefix_len = tl.load(p_prefix_lens + i_request)
    n = tl.load(p_settled_lens + i_request) - prefix_len
    if REDUNDANCY:
        num_parts = tl.cdiv(n + prefix_len % GRAIN, TILE)
        p_sums = p_tile_sums + i_row * num_tiles * HEAD_SIZE
        b_total = sum_of_tiles(p_sums, num_parts, HEAD_SIZE, BLOCK_D, TILES_AT_ONCE)
        o_dim = tl.arange(0, BLOCK_D)
        tl.store(p_totals + i_row * HEAD_SIZE + o_dim, b_total, mask=o_dim < HEAD_SIZE)
    if IMPORTANCE:
        m = n - WINDOW
        o_window = tl.arange(0, BLOCK_W)
        m_window = (o_window < WINDOW)[:, None]
        p_rows = p_logits + (i_row * WINDOW + o_window[:, None]) * max_candidates
        b_largest = tl.full((BLOCK_W,), float("-inf"), tl.float32)
        b_denominator = tl.zeros((BLOCK_W,), tl.float32)
        for first in range(0, m, TOKENS):
            o_token = first + tl.arange(0, TOKENS)
            m_logits = m_window & (o_token < m)[None, :]
            # Padded window rows are zeros, so that no infinities cancel there.
            b_logits = tl.load(p_rows + o_token[None, :], mask=m_logits, other=0.0)
            b_logits = tl.where((o_token < m)[None, :], b_logits, float("-inf"))
            b_new = tl.maximum(b_largest, tl.max(b_logits, axis=1))
            b_weights = tl.exp(b_logits - b_new[:, None])
            b_denominator = b_denominator * tl.exp(b_largest - b_new) + tl.sum(b_weights, axis=1)
            b_largest = b_new
        b_factor = 1.0 / b_denominator
        total = 0.0
        for first in range(0, m, TOKENS):
            o_token = first + tl.arange(0, TOKENS)
            m_logits = m_window & (o_token < m)[None, :]
            b_logits = tl.load(p_rows + o_token[None, :], mask=m_logits, other=0.0)
            b_shares = tl.exp(b_logits - b_largest[:, None]) * b_factor[:, None]
            b_shares = tl.where(m_logits, b_shares, 0.0)
            b_attention = tl.sum(b_shares, axis=0) / WINDOW
            if DEFENSIVE:
                # A maximum may hide NaN; the sum has it, and is at least 0 otherwise.
                b_attention = tl.where(b_attention >= 0.0, tl.max(b_shares, axis=0), b_attention)
                total += tl.sum(b_attention, axis=0)
            p_out = p_attention + i_row * max_candidates + o_token
            if ADD:
                b_attention += tl.load(p_out, mask=o_token < m, other=0.0)
                # The threads that store a number need not be those that loaded it.
                tl.debug_barrier()
            tl.store(p_out, b_attention, mask=o_token < m)
        if DEFENSIVE:
            tl.store(p_floors + i_row, total / m)
