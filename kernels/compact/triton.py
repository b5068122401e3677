"""compact in Triton: one program per (request, layer, head) moves its tokens, oldest first.

In place this is safe because survivors ascend: token i comes from a place j >= i. A program loads a
tile of tokens, waits until all its threads have, and stores it. A store to place i can only hit
what a later token would read if that token came from i as well, but later tokens come from behind
i. Within the tile the barrier keeps the order. New blocks that are not the old ones at the same
index hold nothing of this request, and no program touches another one's head. That the requests of
a batch do not write what others read is the caller's promise.
`compact_naive` is the contract.
"""

import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.compact.naive import check_keep
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.tiles import kernel_block_size, strides_of, token_places

# Tokens in flight per program: 64 of 128 bf16 are 16 KiB, 32 registers of each of 128 threads. One
# request of a model with 32 layers of 8 heads makes 256 programs, 4 MiB in flight, more than the
# 2 to 3 MiB that hide the latency of an H100's memory at full bandwidth. Not measured yet.
TILE = tl.constexpr(64)

# tiles.py says why.
VARYING = (
    "p_old_block_table",
    "old_table_stride",
    "p_new_block_table",
    "new_table_stride",
    "p_settled_lens",
    "p_total_lens",
    "p_budgets",
    "p_prefix_lens",
    "num_layers",
    "max_budget",
)


@triton.jit(do_not_specialize=VARYING)
def compact_kernel(
    p_states,
    strides,
    p_old_block_table,
    old_table_stride,
    p_new_block_table,
    new_table_stride,
    p_settled_lens,
    p_total_lens,
    p_budgets,
    p_prefix_lens,
    p_keep,
    num_layers,
    max_budget,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
):
    """Move survivors and tail of one head."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // (num_layers * NUM_HEADS)
    i_layer = i_row // NUM_HEADS % num_layers
    i_head = i_row % NUM_HEADS
    settled_len = tl.load(p_settled_lens + i_request)
    prefix_len = tl.load(p_prefix_lens + i_request)
    kept_len = prefix_len + tl.load(p_budgets + i_request)
    new_len = kept_len + tl.load(p_total_lens + i_request) - settled_len
    p_head = p_states + i_layer * strides.layer + i_head * strides.head
    p_old_row = p_old_block_table + i_request * old_table_stride
    p_new_row = p_new_block_table + i_request * new_table_stride
    p_kept = p_keep + i_row * max_budget
    o_dim = tl.arange(0, BLOCK_D)
    m_dim = o_dim < HEAD_SIZE
    # Blocks full of prefix are skipped; what the next one holds of it goes along.
    for first in range(prefix_len // BLOCK_SIZE * BLOCK_SIZE, new_len, TILE):
        o_token = first + tl.arange(0, TILE)
        m_token = o_token < new_len
        m_kept = (o_token >= prefix_len) & (o_token < kept_len)
        kept = tl.load(p_kept + o_token - prefix_len, mask=m_kept, other=0)
        source = tl.where(o_token < prefix_len, o_token, settled_len + o_token - kept_len)
        source = tl.where(m_kept, kept, source)
        old_places = token_places(
            p_old_row,
            source,
            m_token,
            strides,
            BLOCK_SIZE,
            KERNEL_BLOCK_SIZE,
        )
        new_places = token_places(
            p_new_row,
            o_token,
            m_token,
            strides,
            BLOCK_SIZE,
            KERNEL_BLOCK_SIZE,
        )
        # Nothing to do for the oldest tokens, as long as none before them was evicted.
        m_moved = (m_token & (old_places != new_places))[:, None] & m_dim[None, :]
        o_cells = o_dim[None, :] * strides.dim
        states = tl.load(p_head + old_places[:, None] + o_cells, mask=m_moved)
        tl.debug_barrier()
        tl.store(p_head + new_places[:, None] + o_cells, states, mask=m_moved)


def compact_triton(states: PagedStates, batch: EvictionBatch, keep: Tensor) -> None:
    """As `compact_naive`, but cells behind the last token keep what they held."""
    batch.check_rows(states)
    check_keep(keep, batch, states)
    if keep.numel() == 0:
        return
    compact_kernel[(keep.shape[0] * keep.shape[1],)](
        states.cells,
        strides_of(states),
        batch.old_block_table,
        batch.old_block_table.stride(0),
        batch.new_block_table,
        batch.new_block_table.stride(0),
        batch.settled_lens,
        batch.total_lens,
        batch.budgets,
        batch.prefix_lens,
        keep.contiguous(),
        states.num_layers,
        batch.max_budget,
        NUM_HEADS=states.num_heads,
        HEAD_SIZE=states.head_size,
        BLOCK_D=triton.next_power_of_2(states.head_size),
        BLOCK_SIZE=states.block_size,
        KERNEL_BLOCK_SIZE=kernel_block_size(states),
    )
