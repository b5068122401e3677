"""Attention logits of the window per tile of tokens, the largest over a group's query heads."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.naive import check_queries, check_scale
from rkv_vllm.kernels.tiles import (
    TILE,
    VARYING,
    layout_of,
    load_tile,
    most_tiles,
    product,
    strides_of,
)


class RingStrides(NamedTuple):
    """Element strides of the query ring, whose last dimension is contiguous.

    Attributes:
        seat: from seat to seat.
        layer: from layer to layer.
        ring: from position to position of a ring.
        head: from query head to query head.
    """

    seat: int
    layer: int
    ring: int
    head: int


def prepare_importance(
    keys: PagedStates, batch: EvictionBatch, queries: Tensor, scale: Tensor, soft_cap: Tensor
) -> int:
    """Query heads per KV head; ValueError unless everything fits together."""
    batch.check_rows(keys)
    check_scale(scale, soft_cap, keys)
    group = check_queries(queries, batch, keys)
    if queries.stride(-1) != 1:
        raise ValueError(
            f"queries: expected a contiguous last dimension, got strides {queries.stride()}"
        )
    return group


def launch_logits(
    keys: PagedStates,
    batch: EvictionBatch,
    queries: Tensor,
    scale: Tensor,
    soft_cap: Tensor,
    members: range,
    logits: Tensor,
) -> None:
    """Largest logits of some members of each group.

    Args:
        keys: see `importance_naive`.
        batch: see there.
        queries: see there.
        scale: see there.
        soft_cap: see there.
        members: consecutive numbers within the group.
        logits: out, float32 [R * num_layers * num_kv_heads, window, most candidates].
    """
    num_rows, window, max_candidates = logits.shape
    num_tiles = most_tiles(keys, batch, window)
    logits_kernel[(num_rows * num_tiles,)](
        keys.cells,
        strides_of(keys),
        queries,
        RingStrides(*queries.stride()[:4]),
        batch.old_block_table,
        batch.old_block_table.stride(0),
        batch.settled_lens,
        batch.prefix_lens,
        batch.seats,
        batch.window_ends,
        scale,
        soft_cap,
        logits,
        keys.num_layers,
        max_candidates,
        num_tiles,
        queries.shape[2],
        members.start,
        members.stop,
        GROUP=queries.shape[3] // keys.num_heads,
        WINDOW=window,
        # At least what tensor cores multiply.
        BLOCK_W=max(16, triton.next_power_of_2(window)),
        **layout_of(keys),
    )


@triton.jit
def _soft_capped(logits, cap):
    """The logits as cap * tanh(logits / cap)."""
    share = logits / cap
    power = tl.exp(-2.0 * tl.abs(share))
    wide = (1.0 - power) / (1.0 + power)
    wide = tl.where(share < 0.0, -wide, wide)
    # Near zero that cancels; the next term of the series is below 6e-9 of the sum there.
    square = share * share
    series = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0)))
    return cap * tl.where(tl.abs(share) < 0.15, share * series, wide)


@triton.jit(do_not_specialize=VARYING)
def logits_kernel(
    p_keys,
    strides,
    p_queries,
    query_strides,
    p_block_table,
    table_stride,
    p_settled_lens,
    p_prefix_lens,
    p_seats,
    p_window_ends,
    p_scale,
    p_soft_cap,
    p_logits,
    num_layers,
    max_candidates,
    num_tiles,
    ring_len,
    first_member,
    stop_member,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    GRAIN: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Logits [WINDOW, tokens of a tile] of one head; NaN where a product is not finite."""
    i_tile = tl.program_id(0) % num_tiles
    i_row = tl.program_id(0) // num_tiles
    i_request = i_row // (num_layers * NUM_HEADS)
    i_layer = i_row // NUM_HEADS % num_layers
    i_head = i_row % NUM_HEADS
    prefix_len = tl.load(p_prefix_lens + i_request)
    settled_len = tl.load(p_settled_lens + i_request)
    lead = prefix_len % GRAIN
    start = prefix_len - lead
    m = settled_len - prefix_len - WINDOW
    if i_tile * TILE >= m + lead:
        return
    o_token = i_tile * TILE + tl.arange(0, TILE) - lead
    m_token = (o_token >= 0) & (o_token < m)
    b_keys = load_tile(
        p_keys + i_layer.to(tl.int64) * strides.layer + i_head.to(tl.int64) * strides.head,
        p_block_table + i_request.to(tl.int64) * table_stride,
        start + i_tile * TILE,
        settled_len,
        strides,
        TILE,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
        GRAIN,
    )
    b_keys_t = tl.trans(b_keys)
    o_window = tl.arange(0, BLOCK_W)
    o_dim = tl.arange(0, BLOCK_D)
    seat = tl.load(p_seats + i_request).to(tl.int64)
    ring_idx = (tl.load(p_window_ends + i_request) - WINDOW + o_window) % ring_len
    p_rows = (
        p_queries
        + seat * query_strides.seat
        + i_layer.to(tl.int64) * query_strides.layer
        + (i_head * GROUP).to(tl.int64) * query_strides.head
        + ring_idx[:, None].to(tl.int64) * query_strides.ring
        + o_dim[None, :]
    )
    m_rows = (o_window < WINDOW)[:, None] & (o_dim < HEAD_SIZE)[None, :]
    m_logits = (o_window < WINDOW)[:, None] & m_token[None, :]
    scale = tl.load(p_scale + i_layer)
    b_logits = tl.full((BLOCK_W, TILE), float("-inf"), tl.float32)
    b_bad = tl.zeros((BLOCK_W, TILE), tl.int32)
    for i_group in range(first_member, stop_member):
        b_queries = tl.load(p_rows + i_group * query_strides.head, mask=m_rows, other=0.0)
        b_part = product(b_queries.to(b_keys.dtype), b_keys_t, IN_FLOAT32) * scale
        # Maximum and cap would hide what is not finite. False for NaN as well.
        b_bad += ((tl.abs(b_part) < float("inf")) == 0).to(tl.int32)
        b_logits = tl.maximum(b_logits, b_part)
    soft_cap = tl.load(p_soft_cap + i_layer)
    if soft_cap > 0.0:
        # It keeps the order, so the largest of the group is still the largest.
        b_logits = _soft_capped(b_logits, soft_cap)
    b_logits = tl.where(b_bad > 0, float("nan"), b_logits)
    p_out = p_logits + (i_row.to(tl.int64) * WINDOW + o_window[:, None]) * max_candidates
    tl.store(p_out + o_token[None, :], b_logits, mask=m_logits)
