"""slots in Triton: one program per request and one for the padding behind the last of them."""

import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.slots.naive import StepRows, StepSlots

# Tokens per inner step. A decode has one token, a prefill chunk thousands; 1024 lanes serve both
# because the launch, not the loop, is what this kernel costs.
_TILE = 1024


def slots_triton(
    rows: StepRows, positions: Tensor, block_table: Tensor, block_size: int, out: StepSlots
) -> None:
    """As `slots_naive`."""
    num_reqs = rows.state_idx.shape[0]
    slots_kernel[(num_reqs + 1,)](
        rows.state_idx,
        rows.query_start_loc,
        rows.num_evicted,
        rows.seats,
        positions,
        block_table,
        block_table.stride(0),
        out.slot_mapping,
        out.token_rows,
        out.seq_lens,
        out.slot_mapping.shape[0],
        out.seq_lens.shape[0],
        BLOCK_SIZE=block_size,
        RING_LEN=rows.ring_len,
        TILE=_TILE,
    )


@triton.jit
def slots_kernel(
    p_state_idx,
    p_query_start_loc,
    p_num_evicted,
    p_seats,
    p_positions,
    p_block_table,
    table_stride,
    p_slot_mapping,
    p_token_rows,
    p_seq_lens,
    max_num_tokens,
    max_num_reqs,
    BLOCK_SIZE: tl.constexpr,
    RING_LEN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Slots, length and rows to observe of one request; the last program pads."""
    i_req = tl.program_id(0)
    num_reqs = tl.num_programs(0) - 1
    start = tl.load(p_query_start_loc + i_req)
    if i_req == num_reqs:
        # Graphs replay with more tokens and requests than the step has.
        for first in range(start, max_num_tokens, TILE):
            o_token = first + tl.arange(0, TILE)
            m_token = o_token < max_num_tokens
            tl.store(p_slot_mapping + o_token, -1, mask=m_token)
            tl.store(p_token_rows + o_token, -1, mask=m_token)
        for first in range(num_reqs, max_num_reqs, TILE):
            o_req = first + tl.arange(0, TILE)
            tl.store(p_seq_lens + o_req, 0, mask=o_req < max_num_reqs)
        return

    end = tl.load(p_query_start_loc + i_req + 1)
    state = tl.load(p_state_idx + i_req)
    is_real = state >= 0
    # Row 0 is read in place of none; what comes of it is thrown away.
    state = tl.maximum(state, 0)
    num_evicted = tl.where(is_real, tl.load(p_num_evicted + state), 0)
    seat = tl.where(is_real, tl.load(p_seats + state), -1)
    last_position = tl.load(p_positions + end - 1)
    tl.store(p_seq_lens + i_req, (last_position + 1 - num_evicted).to(tl.int32))
    for first in range(start, end, TILE):
        o_token = first + tl.arange(0, TILE)
        m_token = o_token < end
        logical = tl.load(p_positions + o_token, mask=m_token, other=0)
        physical = tl.where(m_token, logical - num_evicted, 0)
        block_id = tl.load(
            p_block_table + state * table_stride + physical // BLOCK_SIZE,
            mask=m_token,
            other=0,
        ).to(tl.int64)
        cache_slot = tl.where(is_real, block_id * BLOCK_SIZE + physical % BLOCK_SIZE, -1)
        tl.store(p_slot_mapping + o_token, cache_slot, mask=m_token)
        # Of a row longer than the ring only the newest tokens: each ring place is written once.
        is_watched = (seat >= 0) & (o_token >= end - RING_LEN)
        row = tl.where(is_watched, seat * RING_LEN + (logical % RING_LEN).to(tl.int32), -1)
        tl.store(p_token_rows + o_token, row, mask=m_token)
