"""Softmax over a head's candidates per window row, and what the window says together."""

import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.tiles import VARYING

# Tokens of a window row at once.
ATTEND_TILE = tl.constexpr(128)


def launch_attend(
    batch: EvictionBatch,
    logits: Tensor,
    attention: Tensor,
    rows_per_request: int,
    floors: Tensor | None = None,
    *,
    add: bool = False,
) -> None:
    """Mean share of each candidate, or the largest where there are floors.

    Args:
        batch: the requests.
        logits: as `launch_logits` leaves them.
        attention: out, float32 [rows, most candidates].
        rows_per_request: heads of all layers.
        floors: out, float32 [rows], the mean of the largest shares of each head.
        add: whether to add to what is there.
    """
    num_rows, window, max_candidates = logits.shape
    attend_kernel[(num_rows,)](
        batch.settled_lens,
        batch.prefix_lens,
        logits,
        attention,
        floors,
        rows_per_request,
        max_candidates,
        DEFENSIVE=floors is not None,
        ADD=add,
        WINDOW=window,
        BLOCK_W=triton.next_power_of_2(window),
    )


@triton.jit(do_not_specialize=VARYING)
def attend_kernel(
    p_settled_lens,
    p_prefix_lens,
    p_logits,
    p_attention,
    p_floors,
    rows_per_request,
    max_candidates,
    DEFENSIVE: tl.constexpr,
    ADD: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Softmax over the candidates of one head; mean over its window, or maximum and their mean."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // rows_per_request
    m = tl.load(p_settled_lens + i_request) - tl.load(p_prefix_lens + i_request) - WINDOW
    o_window = tl.arange(0, BLOCK_W)
    m_window = (o_window < WINDOW)[:, None]
    p_rows = p_logits + (i_row * WINDOW + o_window[:, None]) * max_candidates
    b_largest = tl.full((BLOCK_W,), float("-inf"), tl.float32)
    b_denominator = tl.zeros((BLOCK_W,), tl.float32)
    for first in range(0, m, ATTEND_TILE):
        o_token = first + tl.arange(0, ATTEND_TILE)
        m_logits = m_window & (o_token < m)[None, :]
        # Padded window rows are zeros, so that no infinities cancel there.
        b_logits = tl.load(p_rows + o_token[None, :], mask=m_logits, other=0.0)
        b_logits = tl.where((o_token < m)[None, :], b_logits, float("-inf"))
        b_new = tl.maximum(b_largest, tl.max(b_logits, axis=1))
        b_weights = tl.exp(b_logits - b_new[:, None])
        b_denominator = b_denominator * tl.exp(b_largest - b_new) + tl.sum(b_weights, axis=1)
        b_largest = b_new
    total = 0.0
    for first in range(0, m, ATTEND_TILE):
        o_token = first + tl.arange(0, ATTEND_TILE)
        m_logits = m_window & (o_token < m)[None, :]
        b_logits = tl.load(p_rows + o_token[None, :], mask=m_logits, other=0.0)
        b_shares = tl.exp(b_logits - b_largest[:, None]) / b_denominator[:, None]
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
