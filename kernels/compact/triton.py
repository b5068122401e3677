"""compact in Triton: one program per (request, layer, head) moves its tokens, oldest first.

In place this is safe because survivors ascend: token i comes from a place j >= i. A program loads a
tile of tokens and the next one, waits until all its threads have, and stores the first of the two.
A store to place i can only hit what a later token would read if that token came from i as well, but
later tokens come from behind i. Within the tile the barrier keeps the order. New blocks that are
not the old ones at the same index hold nothing of this request, and no program touches another
one's head. That the requests of a batch do not write what others read is the caller's promise.

Keys and values that lie alike share a launch: half as many programs would not fill an H100 for one
request. Whatever the dtype, 32-bit words are moved. `compact_naive` is the contract.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.compact.naive import check_keep
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.tiles import (
    Strides,
    grain_of,
    kernel_block_size,
    place_of_row,
    strides_of,
    token_places,
)

# Tokens of a tile: 64 of 128 bf16 are 16 KiB, 32 registers of each of 128 threads, and two tiles
# are in flight. One request of a model with 32 layers of 8 heads makes 512 programs of keys and
# values, of which an H100 holds all at once.
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


@triton.jit
def _loaded(
    p_head,
    p_old_row,
    p_kept,
    first,
    lengths,
    strides,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    GRAIN: tl.constexpr,
):
    """What belongs at the new positions [first, first + TILE): [grains, GRAIN, BLOCK_D].

    The only place that reads the cache; zero where there is no token.
    """
    prefix_len, settled_len, kept_len, new_len = lengths
    o_token = first + (tl.arange(0, TILE // GRAIN) * GRAIN)[:, None] + tl.arange(0, GRAIN)[None, :]
    m_token = o_token < new_len
    m_kept = (o_token >= prefix_len) & (o_token < kept_len)
    kept = tl.load(p_kept + o_token - prefix_len, mask=m_kept, other=0)
    source = tl.where(o_token < prefix_len, o_token, settled_len + o_token - kept_len)
    source = tl.where(m_kept, kept, source)
    places = token_places(p_old_row, source, m_token, strides, BLOCK_SIZE, KERNEL_BLOCK_SIZE)
    o_dim = tl.arange(0, BLOCK_D)
    m_states = m_token[:, :, None]
    if HEAD_SIZE < BLOCK_D:
        m_states &= (o_dim < HEAD_SIZE)[None, None, :]
    p_cells = p_head + (o_dim * strides.dim)[None, None, :] + places[:, :, None]
    return tl.load(p_cells, mask=m_states, other=0.0)


@triton.jit
def _store(
    p_head,
    p_new_row,
    first,
    end,
    b_states,
    strides,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    GRAIN: tl.constexpr,
):
    """Write the new positions [first, first + TILE) as far as `end`, the end of a block."""
    grain = first + tl.arange(0, TILE // GRAIN) * GRAIN
    m_grain = grain < end
    places = token_places(p_new_row, grain, m_grain, strides, BLOCK_SIZE, KERNEL_BLOCK_SIZE)
    o_token = tl.arange(0, GRAIN).to(tl.int64) * strides.token
    o_dim = tl.arange(0, BLOCK_D)
    m_states = m_grain[:, None, None]
    if HEAD_SIZE < BLOCK_D:
        m_states &= (o_dim < HEAD_SIZE)[None, None, :]
    p_cells = p_head + places[:, None, None] + o_token[None, :, None]
    p_cells += (o_dim * strides.dim)[None, None, :]
    tl.store(p_cells, b_states, mask=m_states)


@triton.jit(do_not_specialize=VARYING)
def compact_kernel(
    p_keys,
    p_values,
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
    BOTH: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    GRAIN: tl.constexpr,
):
    """Move survivors and tail of one head, of its keys or of its values; zeros behind them."""
    i_row = tl.program_id(0)
    p_states = p_keys
    if BOTH:
        p_states = tl.where(i_row % 2 == 0, p_keys, p_values)
        i_row = i_row // 2
    i_request, i_layer, i_head = place_of_row(i_row, num_layers, NUM_HEADS)
    settled_len = tl.load(p_settled_lens + i_request)
    prefix_len = tl.load(p_prefix_lens + i_request)
    kept_len = prefix_len + tl.load(p_budgets + i_request)
    new_len = kept_len + tl.load(p_total_lens + i_request) - settled_len
    p_head = p_states + i_layer.to(tl.int64) * strides.layer + i_head.to(tl.int64) * strides.head
    p_old_row = p_old_block_table + i_request.to(tl.int64) * old_table_stride
    p_new_row = p_new_block_table + i_request.to(tl.int64) * new_table_stride
    p_kept = p_keep + i_row.to(tl.int64) * max_budget
    # Blocks full of prefix are skipped; what the next one holds of it goes along. The last block is
    # written to its end.
    start = prefix_len // BLOCK_SIZE * BLOCK_SIZE
    end = (new_len + BLOCK_SIZE - 1) // BLOCK_SIZE * BLOCK_SIZE
    lengths = (prefix_len, settled_len, kept_len, new_len)
    b_states = _loaded(
        p_head,
        p_old_row,
        p_kept,
        start,
        lengths,
        strides,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
        GRAIN,
    )
    for first in range(start, end, TILE):
        b_next = _loaded(
            p_head,
            p_old_row,
            p_kept,
            first + TILE,
            lengths,
            strides,
            HEAD_SIZE,
            BLOCK_D,
            BLOCK_SIZE,
            KERNEL_BLOCK_SIZE,
            GRAIN,
        )
        tl.debug_barrier()
        _store(
            p_head,
            p_new_row,
            first,
            end,
            b_states,
            strides,
            HEAD_SIZE,
            BLOCK_D,
            BLOCK_SIZE,
            KERNEL_BLOCK_SIZE,
            GRAIN,
        )
        b_states = b_next


def compact_triton(states: PagedStates, batch: EvictionBatch, keep: Tensor) -> None:
    """As `compact_naive`."""
    _launch(states, None, batch, keep)


def compact_both_triton(
    keys: PagedStates, values: PagedStates, batch: EvictionBatch, keep: Tensor
) -> None:
    """As `compact_naive` of keys and of values, in one launch where they lie alike."""
    if keys.dtype == values.dtype and _shape(keys) == _shape(values):
        _launch(keys, values, batch, keep)
    else:
        _launch(keys, None, batch, keep)
        _launch(values, None, batch, keep)


def _shape(states: PagedStates) -> tuple[tuple[int, ...], ...]:
    return tuple(states.cells.shape), states.cells.stride()


def _in_words(cells: Tensor) -> Tensor:
    """The same cells as 32-bit words; as they are where a head is not made of whole ones."""
    ratio = 4 // cells.element_size()
    *strides, dim_stride = cells.stride()
    sizes = (cells.shape[-1], cells.storage_offset(), *strides)
    if ratio > 1 and dim_stride == 1 and all(size % ratio == 0 for size in sizes):
        return cells.view(torch.int32)
    return cells


def _launch(
    states: PagedStates, values: PagedStates | None, batch: EvictionBatch, keep: Tensor
) -> None:
    batch.check_rows(states)
    check_keep(keep, batch, states)
    if keep.numel() == 0:
        return
    both = values is not None
    cells, words = _in_words(states.cells), _in_words(values.cells) if both else None
    ratio = cells.element_size() // states.cells.element_size()
    head_size = states.head_size // ratio
    *strides, dim_stride = strides_of(states)
    compact_kernel[(keep.shape[0] * keep.shape[1] * (1 + both),)](
        cells,
        words,
        Strides(*(stride // ratio for stride in strides), dim_stride),
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
        BOTH=both,
        NUM_HEADS=states.num_heads,
        HEAD_SIZE=head_size,
        BLOCK_D=triton.next_power_of_2(head_size),
        BLOCK_SIZE=states.block_size,
        KERNEL_BLOCK_SIZE=kernel_block_size(states),
        GRAIN=grain_of(states),
    )
