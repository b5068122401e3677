"""Importance and redundancy in Triton: a few launches over requests x layers x heads.

    logits    per tile of tokens: attention logits of the window, max over the query heads
    attend    per head: softmax over the candidates, mean or maximum over the window
    pool      per tile of tokens: max-pool                                      -> importance
    sums      per tile of tokens: the tile's share of the sum of keys, when they are centred
    norms     per tile of tokens: norms, and the tile's share of the sum of unit keys
    total     per head: adds the tiles of either up, in order
    search    per tile of tokens: column sums in closed form, and the newest similar key of each
              token, sought from the newest key backwards; a tile stops as soon as all its tokens
              have found one
    spread    per head: softmax over the column sums                            -> redundancy

Rows are heads of layers of requests; tokens are counted from the end of the protected prefix, of
which nothing is read. Keys are read through the block table and never copied. What they say must
equal naive.py; docs/method.md has the formulas.

The newest similar keys take cosines out of few column sums, many at once. These subtractions are
atomic and come in any order, so they are made on integers of 2**-40, where the order does not
matter: ranks of tensor parallelism that hold copies of one head, and repeated runs, choose alike.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.naive import (
    LEAST_CENTRED,
    check_keys,
    check_queries,
    check_scale,
    new_scores,
)
from rkv_vllm.kernels.tiles import (
    is_interpreted,
    kernel_block_size,
    load_tile,
    product,
    strides_of,
)

# Tokens per tile. 64 rows are one warp group's tensor-core instruction on Hopper; 64 columns keep
# the products (64 x 64 float32 over 128 threads: 32 registers) and two tiles of bf16 keys of 128
# dimensions in registers. Wider tiles would lengthen the search: most tokens find their key among
# the newest 3 percent, and a tile is searched as a whole. Not measured on a GPU yet.
TILE = tl.constexpr(64)
# Tiles that `total` adds up at once.
TOTAL_TILES = tl.constexpr(16)
# Tokens at once where a program goes through numbers of a head: per window row, and one each.
ATTEND_TILE = tl.constexpr(128)
ROW_TILE = tl.constexpr(1024)
# Column sums are below 2**20 tokens in any context length, so a sum stays below 2**61.
FIXED_POINT = tl.constexpr(float(2**40))
NORM_EPSILON = tl.constexpr(1e-8)
LEAST_SQUARE = tl.constexpr(LEAST_CENTRED**2)

# Triton compiles once more for every class of these (1, multiples of 16, others), which would stop
# serving for a second whenever a flush brings a new one. Strides and the cache itself stay special.
VARYING = (
    "p_block_table",
    "table_stride",
    "p_settled_lens",
    "p_prefix_lens",
    "p_seats",
    "p_window_ends",
    "p_scale",
    "p_soft_cap",
    "num_layers",
    "max_len",
    "num_tiles",
    "max_candidates",
    "rows_per_request",
    "first_member",
    "stop_member",
    "group",
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


def scratch_bytes(head_size: int, window: int) -> int:
    """Bytes of temporaries per token, head and layer while a batch is scored, results included."""
    importance = 4 * window + 4
    redundancy = 4 + 4 + 8 + 4 * triton.cdiv(head_size, TILE.value)
    both_results = 4 + 4
    return max(importance, redundancy) + both_results


def importance_triton(
    keys: PagedStates,
    batch: EvictionBatch,
    queries: Tensor,
    scale: Tensor,
    soft_cap: Tensor,
    *,
    pool: int,
    defensive: bool = False,
) -> Tensor:
    """As `importance_naive`."""
    group = prepare_importance(keys, batch, queries, scale, soft_cap)
    result = new_scores(keys, batch)
    if result.numel() == 0:
        return result
    num_requests, rows_per_request, max_candidates = result.shape
    num_rows = num_requests * rows_per_request
    logits = result.new_empty((num_rows, batch.window, max_candidates))
    attention = result.new_empty((num_rows, max_candidates))
    floors = result.new_empty(num_rows) if defensive else None
    launch_logits(keys, batch, queries, scale, soft_cap, range(group), logits)
    launch_attend(batch, logits, attention, rows_per_request, floors)
    pool_kernel[(num_rows, triton.cdiv(max_candidates, ROW_TILE.value))](
        batch.settled_lens,
        batch.prefix_lens,
        attention,
        floors,
        result,
        rows_per_request,
        max_candidates,
        DEFENSIVE=defensive,
        WINDOW=batch.window,
        POOL=pool,
    )
    return result


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
    num_tiles = triton.cdiv(max_candidates, TILE.value)
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


def redundancy_triton(
    keys: PagedStates, batch: EvictionBatch, *, threshold: float, center: bool = False
) -> Tensor:
    """As `redundancy_naive`."""
    batch.check_rows(keys)
    check_keys(keys)
    result = new_scores(keys, batch)
    if result.numel() == 0:
        return result
    num_requests, rows_per_request, max_candidates = result.shape
    num_rows = num_requests * rows_per_request
    max_len = batch.max_judged
    num_tiles = triton.cdiv(max_len, TILE.value)
    inverse_norms = result.new_empty((num_rows, max_len))
    column_sums = result.new_empty((num_rows, max_len))
    shielded = result.new_zeros((num_rows, max_len), dtype=torch.int64)
    tile_sums = result.new_empty((num_rows, num_tiles, keys.head_size))
    totals = result.new_empty((num_rows, keys.head_size))
    means = torch.empty_like(totals) if center else None
    lengths = (batch.settled_lens, batch.prefix_lens)
    cache = (
        keys.cells,
        strides_of(keys),
        batch.old_block_table,
        batch.old_block_table.stride(0),
        *lengths,
    )
    sizes = (keys.num_layers, max_len, num_tiles)
    layout = layout_of(keys)
    add_up = {key: layout[key] for key in ("HEAD_SIZE", "BLOCK_D")}
    shares = (*lengths, tile_sums)
    if center:
        sums_kernel[(num_rows * num_tiles,)](*cache, tile_sums, *sizes, **layout)
        total_kernel[(num_rows,)](
            *shares, means, rows_per_request, num_tiles, IS_MEAN=True, **add_up
        )
    norms_kernel[(num_rows * num_tiles,)](
        *cache, means, inverse_norms, tile_sums, *sizes, CENTER=center, **layout
    )
    total_kernel[(num_rows,)](*shares, totals, rows_per_request, num_tiles, IS_MEAN=False, **add_up)
    search_kernel[(num_rows * num_tiles,)](
        *cache,
        means,
        inverse_norms,
        totals,
        column_sums,
        shielded,
        *sizes,
        threshold,
        CENTER=center,
        **layout,
    )
    spread_kernel[(num_rows,)](
        *lengths,
        column_sums,
        shielded,
        result,
        rows_per_request,
        max_len,
        max_candidates,
        WINDOW=batch.window,
    )
    return result


def layout_of(states: PagedStates) -> dict[str, int | bool]:
    """What is fixed as long as a cache lives."""
    block_d = max(16, triton.next_power_of_2(states.head_size))
    return {
        "NUM_HEADS": states.num_heads,
        "HEAD_SIZE": states.head_size,
        "BLOCK_D": block_d,
        "BLOCK_SIZE": states.block_size,
        "KERNEL_BLOCK_SIZE": kernel_block_size(states),
        # The interpreter multiplies bf16 as if it were integers.
        "IN_FLOAT32": is_interpreted(),
        # Tiles of wider heads need the registers of more threads.
        "num_warps": 4 if block_d <= 128 else 8,
    }


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
    IN_FLOAT32: tl.constexpr,
):
    """Logits [WINDOW, tokens of a tile] of one head; NaN where a product is not finite."""
    i_tile = tl.program_id(0) % num_tiles
    i_row = tl.program_id(0) // num_tiles
    i_request = i_row // (num_layers * NUM_HEADS)
    i_layer = i_row // NUM_HEADS % num_layers
    i_head = i_row % NUM_HEADS
    prefix_len = tl.load(p_prefix_lens + i_request)
    m = tl.load(p_settled_lens + i_request) - prefix_len - WINDOW
    if i_tile * TILE >= m:
        return
    o_token = i_tile * TILE + tl.arange(0, TILE)
    m_token = o_token < m
    b_keys = load_tile(
        p_keys + i_layer.to(tl.int64) * strides.layer + i_head.to(tl.int64) * strides.head,
        p_block_table + i_request.to(tl.int64) * table_stride,
        prefix_len + o_token,
        m_token,
        strides,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
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


@triton.jit
def _centred(b_keys, b_mean, m_token):
    """Keys [tokens, BLOCK_D] without their mean, float32; zero where there is no token."""
    return tl.where(m_token[:, None], b_keys.to(tl.float32) - b_mean[None, :], 0.0)


@triton.jit
def _has_no_direction(b_square, b_mean):
    """Whether centred keys of these squared norms consist of rounding. False for NaN."""
    return b_square <= LEAST_SQUARE * tl.sum(b_mean * b_mean, axis=0)


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
    max_len,
    num_tiles,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Sum of the keys of a tile of tokens."""
    i_tile = tl.program_id(0) % num_tiles
    i_row = tl.program_id(0) // num_tiles
    i_request = i_row // (num_layers * NUM_HEADS)
    i_layer = i_row // NUM_HEADS % num_layers
    i_head = i_row % NUM_HEADS
    prefix_len = tl.load(p_prefix_lens + i_request)
    n = tl.load(p_settled_lens + i_request) - prefix_len
    if i_tile * TILE >= n:
        return
    o_token = i_tile * TILE + tl.arange(0, TILE)
    m_token = o_token < n
    b_keys = load_tile(
        p_keys + i_layer.to(tl.int64) * strides.layer + i_head.to(tl.int64) * strides.head,
        p_block_table + i_request.to(tl.int64) * table_stride,
        prefix_len + o_token,
        m_token,
        strides,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
    ).to(tl.float32)
    o_dim = tl.arange(0, BLOCK_D)
    p_sum = p_tile_sums + (i_row.to(tl.int64) * num_tiles + i_tile) * HEAD_SIZE
    tl.store(p_sum + o_dim, tl.sum(b_keys, axis=0), mask=o_dim < HEAD_SIZE)


@triton.jit(do_not_specialize=VARYING)
def norms_kernel(
    p_keys,
    strides,
    p_block_table,
    table_stride,
    p_settled_lens,
    p_prefix_lens,
    p_means,
    p_inverse_norms,
    p_tile_sums,
    num_layers,
    max_len,
    num_tiles,
    CENTER: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Inverse norms of a tile of tokens and the sum of its unit keys."""
    i_tile = tl.program_id(0) % num_tiles
    i_row = tl.program_id(0) // num_tiles
    i_request = i_row // (num_layers * NUM_HEADS)
    i_layer = i_row // NUM_HEADS % num_layers
    i_head = i_row % NUM_HEADS
    prefix_len = tl.load(p_prefix_lens + i_request)
    n = tl.load(p_settled_lens + i_request) - prefix_len
    if i_tile * TILE >= n:
        return
    o_token = i_tile * TILE + tl.arange(0, TILE)
    m_token = o_token < n
    b_keys = load_tile(
        p_keys + i_layer.to(tl.int64) * strides.layer + i_head.to(tl.int64) * strides.head,
        p_block_table + i_request.to(tl.int64) * table_stride,
        prefix_len + o_token,
        m_token,
        strides,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
    ).to(tl.float32)
    o_row = i_row.to(tl.int64)
    o_dim = tl.arange(0, BLOCK_D)
    if CENTER:
        b_mean = tl.load(p_means + o_row * HEAD_SIZE + o_dim, mask=o_dim < HEAD_SIZE, other=0.0)
        b_keys = _centred(b_keys, b_mean, m_token)
    b_square = tl.sum(b_keys * b_keys, axis=1)
    b_inverse = 1.0 / (tl.sqrt(b_square) + NORM_EPSILON)
    if CENTER:
        b_inverse = tl.where(_has_no_direction(b_square, b_mean), 0.0, b_inverse)
    tl.store(p_inverse_norms + o_row * max_len + o_token, b_inverse, mask=m_token)
    b_sum = tl.sum(b_keys * b_inverse[:, None], axis=0)
    p_sum = p_tile_sums + (o_row * num_tiles + i_tile) * HEAD_SIZE
    tl.store(p_sum + o_dim, b_sum, mask=o_dim < HEAD_SIZE)


@triton.jit(do_not_specialize=VARYING)
def total_kernel(
    p_settled_lens,
    p_prefix_lens,
    p_tile_sums,
    p_totals,
    rows_per_request,
    num_tiles,
    IS_MEAN: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of the tiles of one head, or what it is per token."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // rows_per_request
    n = tl.load(p_settled_lens + i_request) - tl.load(p_prefix_lens + i_request)
    num_parts = tl.cdiv(n, TILE)
    o_dim = tl.arange(0, BLOCK_D)
    b_total = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, num_parts, TOTAL_TILES):
        o_part = first + tl.arange(0, TOTAL_TILES)
        b_sums = tl.load(
            p_tile_sums + (i_row * num_tiles + o_part)[:, None] * HEAD_SIZE + o_dim[None, :],
            mask=(o_part < num_parts)[:, None] & (o_dim < HEAD_SIZE)[None, :],
            other=0.0,
        )
        b_total += tl.sum(b_sums, axis=0)
    if IS_MEAN:
        b_total /= n
    tl.store(p_totals + i_row * HEAD_SIZE + o_dim, b_total, mask=o_dim < HEAD_SIZE)


@triton.jit(do_not_specialize=VARYING)
def search_kernel(
    p_keys,
    strides,
    p_block_table,
    table_stride,
    p_settled_lens,
    p_prefix_lens,
    p_means,
    p_inverse_norms,
    p_totals,
    p_column_sums,
    p_shielded,
    num_layers,
    max_len,
    num_tiles,
    threshold,
    CENTER: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KERNEL_BLOCK_SIZE: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Column sum and newest similar key of each token of a tile."""
    i_tile = tl.program_id(0) % num_tiles
    i_row = tl.program_id(0) // num_tiles
    i_request = i_row // (num_layers * NUM_HEADS)
    i_layer = i_row // NUM_HEADS % num_layers
    i_head = i_row % NUM_HEADS
    prefix_len = tl.load(p_prefix_lens + i_request)
    n = tl.load(p_settled_lens + i_request) - prefix_len
    first_row = i_tile * TILE
    if first_row >= n:
        return
    p_head = p_keys + i_layer.to(tl.int64) * strides.layer + i_head.to(tl.int64) * strides.head
    p_row = p_block_table + i_request.to(tl.int64) * table_stride
    o_tile = tl.arange(0, TILE)
    o_token = first_row + o_tile
    m_token = o_token < n
    b_keys = load_tile(
        p_head,
        p_row,
        prefix_len + o_token,
        m_token,
        strides,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
    )
    o_row = i_row.to(tl.int64) * max_len
    p_norms = p_inverse_norms + o_row
    o_dim = tl.arange(0, BLOCK_D)
    if CENTER:
        p_mean = p_means + i_row.to(tl.int64) * HEAD_SIZE
        b_mean = tl.load(p_mean + o_dim, mask=o_dim < HEAD_SIZE, other=0.0)
        b_keys = _centred(b_keys, b_mean, m_token)
        b_bare = _has_no_direction(tl.sum(b_keys * b_keys, axis=1), b_mean)
        b_keys = tl.where(b_bare[:, None], 0.0, b_keys)
    b_wide = b_keys.to(tl.float32)
    b_norms = tl.sqrt(tl.sum(b_wide * b_wide, axis=1))
    b_inverse = 1.0 / (b_norms + NORM_EPSILON)
    p_total = p_totals + i_row.to(tl.int64) * HEAD_SIZE
    b_total = tl.load(p_total + o_dim, mask=o_dim < HEAD_SIZE, other=0.0)
    b_own = b_norms * b_inverse
    b_sums = tl.sum(b_wide * b_total[None, :], axis=1) * b_inverse - b_own * b_own
    tl.store(p_column_sums + o_row + o_token, b_sums, mask=m_token)

    # A cosine above the threshold, both sides times the norm of the row's key.
    b_limit = threshold * (b_norms + NORM_EPSILON)
    # Rows behind the end are settled from the start.
    b_newest = tl.where(m_token, -1, 0)
    first = (n - 1) // TILE * TILE
    while first >= 0:
        o_column = first + o_tile
        m_column = o_column < n
        b_columns = load_tile(
            p_head,
            p_row,
            prefix_len + o_column,
            m_column,
            strides,
            HEAD_SIZE,
            BLOCK_D,
            BLOCK_SIZE,
            KERNEL_BLOCK_SIZE,
        )
        if CENTER:
            b_columns = _centred(b_columns, b_mean, m_column)
        # NaN is no hit, whatever the threshold.
        b_column_norms = tl.load(p_norms + o_column, mask=m_column, other=float("nan"))
        b_scaled = product(b_keys, tl.trans(b_columns), IN_FLOAT32) * b_column_norms[None, :]
        b_hits = tl.where(b_scaled > b_limit[:, None], o_tile[None, :], -1)
        if first == first_row:
            b_hits = tl.where(o_tile[None, :] == o_tile[:, None], -1, b_hits)
        b_hit = tl.max(b_hits, axis=1)
        b_newest = tl.where((b_newest < 0) & (b_hit >= 0), first + b_hit, b_newest)
        first = tl.where(tl.min(b_newest, axis=0) < 0, first - TILE, -1)
    # The oldest key is shielded where no key is similar, whatever the cosine with it.
    b_newest = tl.maximum(b_newest, 0)
    b_similar = load_tile(
        p_head,
        p_row,
        prefix_len + b_newest,
        m_token,
        strides,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
    ).to(tl.float32)
    if CENTER:
        b_similar = _centred(b_similar, b_mean, m_token)
    b_similar_norms = tl.load(p_norms + b_newest, mask=m_token, other=0.0)
    b_cosine = tl.sum(b_wide * b_similar, axis=1) * b_inverse * b_similar_norms
    # Token 0 without a similar key points to itself; its own cosine was never in the sum.
    tl.atomic_add(
        p_shielded + o_row + b_newest,
        (b_cosine * FIXED_POINT).to(tl.int64),
        mask=m_token & (b_newest != o_token),
        sem="relaxed",
    )


@triton.jit
def _spread_logits(p_column_sums, p_shielded, o_token, m_token, n):
    """Column sums without what is shielded, per token."""
    b_sums = tl.load(p_column_sums + o_token, mask=m_token, other=0.0)
    b_shielded = tl.load(p_shielded + o_token, mask=m_token, other=0)
    return (b_sums - b_shielded.to(tl.float32) / FIXED_POINT) / n


@triton.jit(do_not_specialize=VARYING)
def spread_kernel(
    p_settled_lens,
    p_prefix_lens,
    p_column_sums,
    p_shielded,
    p_result,
    rows_per_request,
    max_len,
    max_candidates,
    WINDOW: tl.constexpr,
):
    """Softmax over the column sums of one head; of the candidates, +inf behind them."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // rows_per_request
    n = tl.load(p_settled_lens + i_request) - tl.load(p_prefix_lens + i_request)
    p_sums = p_column_sums + i_row * max_len
    p_shields = p_shielded + i_row * max_len
    largest = float("-inf")
    denominator = 0.0
    for first in range(0, n, ROW_TILE):
        o_token = first + tl.arange(0, ROW_TILE)
        m_token = o_token < n
        b_logits = _spread_logits(p_sums, p_shields, o_token, m_token, n)
        b_logits = tl.where(m_token, b_logits, float("-inf"))
        new = tl.maximum(largest, tl.max(b_logits, axis=0))
        weights = tl.sum(tl.exp(b_logits - new), axis=0)
        denominator = denominator * tl.exp(largest - new) + weights
        largest = new
    for first in range(0, max_candidates, ROW_TILE):
        o_token = first + tl.arange(0, ROW_TILE)
        m_token = o_token < n - WINDOW
        b_logits = _spread_logits(p_sums, p_shields, o_token, m_token, n)
        b_share = tl.exp(b_logits - largest) / denominator
        tl.store(
            p_result + i_row * max_candidates + o_token,
            tl.where(m_token, b_share, float("inf")),
            mask=o_token < max_candidates,
        )
