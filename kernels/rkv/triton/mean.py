"""The mean key of each head, where keys are centred before they are compared."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.triton.combine import TILES_AT_ONCE, sum_of_tiles
from rkv_vllm.kernels.tiles import (
    TILE,
    VARYING,
    add_up_layout,
    elements,
    judged_span,
    layout_of,
    load_tile,
    place_of_row,
    states_of_head,
    strides_of,
    tile_of_program,
)


def launch_mean(keys: PagedStates, batch: EvictionBatch, tile_sums: Tensor) -> Tensor:
    """Means float32 [rows, head_size] of the judged keys.

    Args:
        keys: the cache.
        batch: the requests.
        tile_sums: float32 [rows, tiles, head_size], overwritten.
    """
    num_rows, num_tiles, head_size = tile_sums.shape
    means = torch.empty((num_rows, head_size), dtype=torch.float32, device=keys.device)
    rows_per_request = keys.num_layers * keys.num_heads
    lengths = (batch.settled_lens, batch.prefix_lens)
    sums_kernel[(num_rows * num_tiles,)](
        elements(keys.cells, keys.dtype),
        strides_of(keys),
        batch.old_block_table,
        batch.old_block_table.stride(0),
        *lengths,
        tile_sums,
        keys.num_layers,
        num_tiles,
        **layout_of(keys),
    )
    mean_kernel[(num_rows,)](
        *lengths, tile_sums, means, rows_per_request, num_tiles, **add_up_layout(keys)
    )
    return means


@triton.jit(do_not_specialize=VARYING)
def sums_kernel(
    p_keys,
    strides,
    p_block_table,
    table_stride,
    p_settled_lens,
    p_prefix_lens,
    p_tile_sums,
    num_layers,
    num_tiles,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    GRAIN: tl.constexpr,
    FP8: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Sum of the keys of a tile of tokens."""
    i_row, i_tile = tile_of_program(num_tiles)
    i_request, i_layer, i_head = place_of_row(i_row, num_layers, NUM_HEADS)
    prefix_len, settled_len, lead, start = judged_span(
        p_prefix_lens, p_settled_lens, i_request, GRAIN
    )
    n = settled_len - prefix_len
    if i_tile * TILE >= n + lead:
        return
    o_token = i_tile * TILE + tl.arange(0, TILE) - lead
    m_token = (o_token >= 0) & (o_token < n)
    p_head, p_row = states_of_head(
        p_keys, strides, p_block_table, table_stride, i_request, i_layer, i_head
    )
    b_keys = load_tile(
        p_head,
        p_row,
        start + i_tile * TILE,
        settled_len,
        strides,
        TILE,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
        GRAIN,
        FP8,
    ).to(tl.float32)
    b_keys = tl.where(m_token[:, None], b_keys, 0.0)
    o_dim = tl.arange(0, BLOCK_D)
    p_sum = p_tile_sums + (i_row.to(tl.int64) * num_tiles + i_tile) * HEAD_SIZE
    tl.store(p_sum + o_dim, tl.sum(b_keys, axis=0), mask=o_dim < HEAD_SIZE)


@triton.jit(do_not_specialize=VARYING)
def mean_kernel(
    p_settled_lens,
    p_prefix_lens,
    p_tile_sums,
    p_means,
    rows_per_request,
    num_tiles,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GRAIN: tl.constexpr,
):
    """Sum of the tiles of one head, per token."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // rows_per_request
    prefix_len = tl.load(p_prefix_lens + i_request)
    n = tl.load(p_settled_lens + i_request) - prefix_len
    num_parts = tl.cdiv(n + prefix_len % GRAIN, TILE)
    p_sums = p_tile_sums + i_row * num_tiles * HEAD_SIZE
    b_total = sum_of_tiles(p_sums, num_parts, HEAD_SIZE, BLOCK_D, TILES_AT_ONCE)
    o_dim = tl.arange(0, BLOCK_D)
    tl.store(p_means + i_row * HEAD_SIZE + o_dim, b_total / n, mask=o_dim < HEAD_SIZE)
