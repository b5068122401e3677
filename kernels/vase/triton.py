"""VaSE's two halves in Triton; attention runs R-KV's first launches once per member of a group.

    stats     (rkv/triton/) per tile of tokens: attention logits of the window, one query head
    combine   (there) per head: softmax over the candidates, mean over the window, added up over
              the group
    average   per tile of tokens: mean over neighbours                          -> attention
    range     per tile of tokens: largest minus smallest element of each value  -> channel range

One member after the other: the logits of all of them would be memory in proportion to the group.
What the launches say must equal naive.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.naive import check_keys, new_scores
from rkv_vllm.kernels.rkv.triton import new_window
from rkv_vllm.kernels.rkv.triton.combine import launch_combine
from rkv_vllm.kernels.rkv.triton.stats import launch_stats
from rkv_vllm.kernels.tiles import (
    ROW_TILE,
    TILE,
    VARYING,
    elements,
    grain_of,
    judged_span,
    layout_of,
    load_tile,
    place_of_row,
    states_of_head,
    strides_of,
    tile_of_program,
)


def attention_triton(
    keys: PagedStates,
    batch: EvictionBatch,
    queries: Tensor,
    scale: Tensor,
    soft_cap: Tensor,
    *,
    pool: int,
) -> Tensor:
    """As `attention_naive`."""
    window = new_window(keys, batch, queries, scale, soft_cap)
    group = len(window.members)
    result = new_scores(keys, batch)
    if result.numel() == 0:
        return result
    num_requests, rows_per_request, max_candidates = result.shape
    num_rows = num_requests * rows_per_request
    attention = result.new_zeros((num_rows, max_candidates))
    for member in range(group):
        window = window._replace(members=range(member, member + 1))
        launch_stats(keys, batch, window, None)
        launch_combine(keys, batch, window, attention, add=True)
    average_kernel[(num_rows, triton.cdiv(max_candidates, ROW_TILE.value))](
        batch.settled_lens,
        batch.prefix_lens,
        attention,
        result,
        rows_per_request,
        max_candidates,
        group,
        WINDOW=batch.window,
        POOL=pool,
    )
    return result


def channel_range_triton(values: PagedStates, batch: EvictionBatch) -> Tensor:
    """As `channel_range_naive`."""
    batch.check_rows(values)
    check_keys(values)
    result = new_scores(values, batch)
    if result.numel() == 0:
        return result
    num_requests, rows_per_request, max_candidates = result.shape
    # Zeros fill every row to its end.
    most_before = max(eviction.prefix_len % grain_of(values) for eviction in batch.evictions)
    num_tiles = triton.cdiv(most_before + max_candidates, TILE.value)
    range_kernel[(num_requests * rows_per_request * num_tiles,)](
        elements(values.cells, values.dtype),
        strides_of(values),
        batch.old_block_table,
        batch.old_block_table.stride(0),
        batch.settled_lens,
        batch.prefix_lens,
        result,
        values.num_layers,
        max_candidates,
        num_tiles,
        WINDOW=batch.window,
        **layout_of(values),
    )
    if values.quantisation is not None:
        result.mul_(values.quantisation.scale.reshape(1, -1, 1))
    return result


@triton.jit(do_not_specialize=VARYING)
def average_kernel(
    p_settled_lens,
    p_prefix_lens,
    p_attention,
    p_result,
    rows_per_request,
    max_candidates,
    group,
    WINDOW: tl.constexpr,
    POOL: tl.constexpr,
):
    """Mean over the group and the neighbours of a tile of one head; -inf behind its candidates."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // rows_per_request
    m = tl.load(p_settled_lens + i_request) - tl.load(p_prefix_lens + i_request) - WINDOW
    o_row = i_row * max_candidates
    o_token = tl.program_id(1) * ROW_TILE + tl.arange(0, ROW_TILE)
    b_sum = tl.zeros((ROW_TILE,), tl.float32)
    b_count = tl.zeros((ROW_TILE,), tl.float32)
    for shift in tl.static_range(-(POOL // 2), POOL // 2 + 1):
        o_near = o_token + shift
        m_near = (o_near >= 0) & (o_near < m) & (o_token < m)
        b_sum += tl.load(p_attention + o_row + o_near, mask=m_near, other=0.0)
        b_count += m_near.to(tl.float32)
    b_mean = b_sum / (tl.maximum(b_count, 1.0) * group)
    tl.store(
        p_result + o_row + o_token,
        tl.where(o_token < m, b_mean, float("-inf")),
        mask=o_token < max_candidates,
    )


@triton.jit(do_not_specialize=VARYING)
def range_kernel(
    p_values,
    strides,
    p_block_table,
    table_stride,
    p_settled_lens,
    p_prefix_lens,
    p_result,
    num_layers,
    max_candidates,
    num_tiles,
    WINDOW: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    GRAIN: tl.constexpr,
    FP8: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Largest minus smallest element of each value of a tile of tokens; 0 behind the candidates."""
    i_row, i_tile = tile_of_program(num_tiles)
    i_request, i_layer, i_head = place_of_row(i_row, num_layers, NUM_HEADS)
    prefix_len, settled_len, lead, start = judged_span(
        p_prefix_lens, p_settled_lens, i_request, GRAIN
    )
    m = settled_len - prefix_len - WINDOW
    o_token = i_tile * TILE + tl.arange(0, TILE) - lead
    m_token = (o_token >= 0) & (o_token < m)
    p_head, p_row = states_of_head(
        p_values, strides, p_block_table, table_stride, i_request, i_layer, i_head
    )
    b_values = load_tile(
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
    m_dim = (tl.arange(0, BLOCK_D) < HEAD_SIZE)[None, :]
    b_largest = tl.max(tl.where(m_dim, b_values, float("-inf")), axis=1)
    b_smallest = tl.min(tl.where(m_dim, b_values, float("inf")), axis=1)
    # A maximum may hide NaN; this sum is 0 or NaN.
    b_range = b_largest - b_smallest + tl.sum(b_values * 0.0, axis=1)
    p_out = p_result + i_row.to(tl.int64) * max_candidates
    m_out = (o_token >= 0) & (o_token < max_candidates)
    tl.store(p_out + o_token, tl.where(m_token, b_range, 0.0), mask=m_out)
