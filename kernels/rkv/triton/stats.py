"""The first look at the keys: window logits, norms and sums of unit keys, one tile per program.

What a score does not ask for is left out when the kernel is compiled.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.naive import LEAST_CENTRED, check_queries, check_scale
from rkv_vllm.kernels.tiles import (
    TILE,
    VARYING,
    elements,
    judged_span,
    layout_of,
    load_tile,
    most_tiles,
    place_of_row,
    product,
    register_limit,
    states_of_head,
    strides_of,
    tile_of_program,
)

# Query rows that are multiplied at once, of several members of a group.
QUERY_ROWS = 32
# Tiles that one program goes through; while it judges one, the next is on its way. An H100 holds
# three programs of that many registers per thread at a time, not two.
TILES_AT_A_TIME = 6
REGISTERS = 168

NORM_EPSILON = tl.constexpr(1e-8)
LEAST_SQUARE = tl.constexpr(LEAST_CENTRED**2)


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


class Window(NamedTuple):
    """What judges the candidates.

    Attributes:
        queries: the ring, see `importance_naive`.
        scale: see there.
        soft_cap: see there.
        members: query heads of each group, by consecutive numbers within it.
        logits: out, float32 [rows, window, most candidates], the largest of these members.
    """

    queries: Tensor
    scale: Tensor
    soft_cap: Tensor
    members: range
    logits: Tensor


class Norms(NamedTuple):
    """What the search needs to know of the keys; all of it is written.

    Attributes:
        means: float32 [rows, head_size], taken off the keys first, or None.
        inverse: float32 [rows, tiles * TILE], NaN where a tile has no token.
        tile_sums: float32 [rows, tiles, head_size], sums of unit keys.
        shielded: int64 [rows, most judged], zeros.
    """

    means: Tensor | None
    inverse: Tensor
    tile_sums: Tensor
    shielded: Tensor


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


def launch_stats(
    keys: PagedStates, batch: EvictionBatch, window: Window | None, norms: Norms | None
) -> None:
    """Fill what is given of the two."""
    num_rows = batch.num_requests * keys.num_layers * keys.num_heads
    num_tiles = most_tiles(keys, batch, 0 if norms else batch.window)
    block_w = triton.next_power_of_2(batch.window)
    members = window.members if window else range(0)
    at_once = min(max(QUERY_ROWS // block_w, 1), triton.next_power_of_2(max(len(members), 1)))
    # At least what tensor cores multiply.
    at_once = max(at_once, 16 // block_w)
    num_parts = triton.cdiv(num_tiles, TILES_AT_A_TIME)
    stats_kernel[(num_rows * num_parts,)](
        elements(keys.cells, keys.dtype),
        strides_of(keys),
        window.queries if window else None,
        RingStrides(*window.queries.stride()[:4]) if window else None,
        batch.old_block_table,
        batch.old_block_table.stride(0),
        batch.settled_lens,
        batch.prefix_lens,
        batch.seats,
        batch.window_ends,
        keys.scale_of_heads(window.scale) if window else None,
        window.soft_cap if window else None,
        window.logits if window else None,
        norms.means if norms else None,
        norms.inverse if norms else None,
        norms.tile_sums if norms else None,
        norms.shielded if norms else None,
        keys.num_layers,
        batch.max_judged,
        num_tiles,
        num_parts,
        batch.max_candidates,
        window.queries.shape[2] if window else 0,
        members.start,
        members.stop,
        IMPORTANCE=window is not None,
        REDUNDANCY=norms is not None,
        CENTER=norms is not None and norms.means is not None,
        GROUP=window.queries.shape[3] // keys.num_heads if window else 1,
        WINDOW=batch.window,
        BLOCK_W=block_w,
        AT_ONCE=at_once,
        STEPS=TILES_AT_A_TIME,
        ONE_ROUND=len(members) <= at_once,
        ALL_MEMBERS=len(members) % at_once == 0,
        **layout_of(keys),
        # Loads ahead are written out.
        num_stages=1,
        **(register_limit(keys, REGISTERS) if norms is None or norms.means is None else {}),
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


@triton.jit
def centred(b_keys, b_mean, m_token):
    """Keys [tokens, BLOCK_D] without their mean, float32; zero where there is no token."""
    return tl.where(m_token[:, None], b_keys.to(tl.float32) - b_mean[None, :], 0.0)


@triton.jit
def has_no_direction(b_square, b_mean):
    """Whether centred keys of these squared norms consist of rounding. False for NaN."""
    return b_square <= LEAST_SQUARE * tl.sum(b_mean * b_mean, axis=0)


@triton.jit
def _query_places(
    p_ring,
    query_strides,
    window_end,
    ring_len,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Where the window's queries of a group's first members lie, and which of them there are."""
    o_window = tl.arange(0, BLOCK_W)
    o_dim = tl.arange(0, BLOCK_D)
    ring_idx = (window_end - WINDOW) % ring_len + o_window
    ring_idx = tl.where(ring_idx >= ring_len, ring_idx - ring_len, ring_idx)
    p_rows = p_ring + ring_idx[None, :, None].to(tl.int64) * query_strides.ring
    o_member = tl.arange(0, AT_ONCE)[:, None, None].to(tl.int64)
    p_rows += o_member * query_strides.head + o_dim[None, None, :]
    return p_rows, (o_window < WINDOW)[None, :, None] & (o_dim < HEAD_SIZE)[None, None, :]


@triton.jit
def _queries(
    p_rows,
    m_rows,
    head_stride,
    first,
    stop_member,
    BLOCK_W: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Queries [AT_ONCE * BLOCK_W, BLOCK_D] of the members from `first` on, and who is a member."""
    m_member = first + tl.arange(0, AT_ONCE) < stop_member
    m_queries = m_rows & m_member[:, None, None]
    b_queries = tl.load(p_rows + first * head_stride, mask=m_queries, other=0.0)
    return tl.reshape(b_queries, (AT_ONCE * BLOCK_W, BLOCK_D)), m_member


@triton.jit
def _largest_logits(
    b_keys,
    b_queries,
    m_member,
    scale,
    BLOCK_W: tl.constexpr,
    AT_ONCE: tl.constexpr,
    ALL_MEMBERS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Logits [tokens, BLOCK_W], the largest of some members; NaN where a product is not finite."""
    b_part = product(b_keys, tl.trans(b_queries.to(b_keys.dtype)), IN_FLOAT32) * scale
    b_part = tl.reshape(b_part, (TILE, AT_ONCE, BLOCK_W))
    # Maximum and cap would hide what is not finite; zero times that is NaN. Who is no member has
    # queries of zeros, and finite products wherever the members have.
    b_nan = tl.sum(b_part * 0.0, axis=1)
    if not ALL_MEMBERS:
        b_part = tl.where(m_member[None, :, None], b_part, float("-inf"))
    return tl.max(b_part, axis=1) + b_nan


@triton.jit(do_not_specialize=VARYING)
def stats_kernel(
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
    p_means,
    p_inverse_norms,
    p_tile_sums,
    p_shielded,
    num_layers,
    max_len,
    num_tiles,
    num_parts,
    max_candidates,
    ring_len,
    first_member,
    stop_member,
    IMPORTANCE: tl.constexpr,
    REDUNDANCY: tl.constexpr,
    CENTER: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_W: tl.constexpr,
    AT_ONCE: tl.constexpr,
    STEPS: tl.constexpr,
    ONE_ROUND: tl.constexpr,
    ALL_MEMBERS: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    GRAIN: tl.constexpr,
    FP8: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Logits [WINDOW, tokens of some tiles] of one head, inverse norms, sums of unit keys."""
    i_row, i_part = tile_of_program(num_parts)
    i_request, i_layer, i_head = place_of_row(i_row, num_layers, NUM_HEADS)
    prefix_len, settled_len, lead, start = judged_span(
        p_prefix_lens, p_settled_lens, i_request, GRAIN
    )
    n = settled_len - prefix_len
    first_tile = i_part * STEPS
    stop_tile = tl.minimum(first_tile + STEPS, tl.cdiv(n + lead, TILE))
    if first_tile >= stop_tile:
        return
    stop = tl.minimum(start + stop_tile * TILE, settled_len)
    p_head, p_row = states_of_head(
        p_keys, strides, p_block_table, table_stride, i_request, i_layer, i_head
    )
    b_keys = load_tile(
        p_head,
        p_row,
        start + first_tile * TILE,
        stop,
        strides,
        TILE,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
        GRAIN,
        FP8,
        prefix_len,
        REDUNDANCY,
    )
    o_row = i_row.to(tl.int64)
    o_tile = tl.arange(0, TILE)
    o_window = tl.arange(0, BLOCK_W)
    o_dim = tl.arange(0, BLOCK_D)
    m_dim = o_dim < HEAD_SIZE
    if IMPORTANCE:
        seat = tl.load(p_seats + i_request).to(tl.int64)
        p_ring = p_queries + seat * query_strides.seat + i_layer.to(tl.int64) * query_strides.layer
        p_rows, m_rows = _query_places(
            p_ring + (i_head * GROUP).to(tl.int64) * query_strides.head,
            query_strides,
            tl.load(p_window_ends + i_request),
            ring_len,
            WINDOW,
            BLOCK_W,
            AT_ONCE,
            HEAD_SIZE,
            BLOCK_D,
        )
        if ONE_ROUND:
            b_queries, m_member = _queries(
                p_rows,
                m_rows,
                query_strides.head,
                first_member,
                stop_member,
                BLOCK_W,
                AT_ONCE,
                BLOCK_D,
            )
        scale = tl.load(p_scale + i_layer * NUM_HEADS + i_head)
        soft_cap = tl.load(p_soft_cap + i_layer)
    if CENTER:
        b_mean = tl.load(p_means + o_row * HEAD_SIZE + o_dim, mask=m_dim, other=0.0)
    for i_tile in range(first_tile, stop_tile):
        first_row = i_tile * TILE
        o_token = first_row + o_tile - lead
        b_next = load_tile(
            p_head,
            p_row,
            start + first_row + TILE,
            stop,
            strides,
            TILE,
            HEAD_SIZE,
            BLOCK_D,
            BLOCK_SIZE,
            KERNEL_BLOCK_SIZE,
            GRAIN,
            FP8,
            prefix_len,
            REDUNDANCY,
        )
        if IMPORTANCE:
            # Numbers of fp8 fit either float of two bytes; queries may be beyond float16.
            b_judged = b_keys if FP8 == 0 else b_keys.to(p_queries.dtype.element_ty)
            if ONE_ROUND:
                b_logits = _largest_logits(
                    b_judged, b_queries, m_member, scale, BLOCK_W, AT_ONCE, ALL_MEMBERS, IN_FLOAT32
                )
            else:
                b_logits = tl.full((TILE, BLOCK_W), float("-inf"), tl.float32)
                for first in range(first_member, stop_member, AT_ONCE):
                    b_some, m_some = _queries(
                        p_rows,
                        m_rows,
                        query_strides.head,
                        first,
                        stop_member,
                        BLOCK_W,
                        AT_ONCE,
                        BLOCK_D,
                    )
                    b_part = _largest_logits(
                        b_judged, b_some, m_some, scale, BLOCK_W, AT_ONCE, ALL_MEMBERS, IN_FLOAT32
                    )
                    # A maximum of NaN may be the other number.
                    b_logits = tl.maximum(b_logits, b_part) + b_part * 0.0
            if soft_cap > 0.0:
                # It keeps the order, so the largest of the group is still the largest.
                b_logits = _soft_capped(b_logits, soft_cap)
            p_out = p_logits + (o_row * WINDOW + o_window[None, :]) * max_candidates
            m_out = (o_token >= 0) & (o_token < n - WINDOW)
            m_out = m_out[:, None] & (o_window < WINDOW)[None, :]
            tl.store(p_out + o_token[:, None], b_logits, mask=m_out)
        if REDUNDANCY:
            m_token = (o_token >= 0) & (o_token < n)
            b_wide = centred(b_keys, b_mean, m_token) if CENTER else b_keys.to(tl.float32)
            b_square = tl.sum(b_wide * b_wide, axis=1)
            b_inverse = 1.0 / (tl.sqrt(b_square) + NORM_EPSILON)
            if CENTER:
                b_inverse = tl.where(has_no_direction(b_square, b_mean), 0.0, b_inverse)
            b_sum = tl.sum(b_wide * b_inverse[:, None], axis=0)
            # NaN is no hit of the search, whatever the threshold.
            b_inverse = tl.where(m_token, b_inverse, float("nan"))
            o_rows = o_row * num_tiles + i_tile
            tl.store(p_inverse_norms + o_rows * TILE + o_tile, b_inverse)
            tl.store(p_tile_sums + o_rows * HEAD_SIZE + o_dim, b_sum, mask=m_dim)
            p_sums = p_shielded + o_row * max_len + o_token
            tl.store(p_sums, tl.zeros((TILE,), tl.int64), mask=m_token)
        b_keys = b_next
