"""Norms of the keys, and the sums of keys and of unit keys, tile by tile and over a head.

Tiles are added up in order: which request shares the launch changes no bit.
"""

import triton
import triton.language as tl

from rkv_vllm.kernels.rkv.naive import LEAST_CENTRED
from rkv_vllm.kernels.tiles import TILE, VARYING, load_tile

# Tiles that `total` adds up at once.
TOTAL_TILES = tl.constexpr(16)

NORM_EPSILON = tl.constexpr(1e-8)
LEAST_SQUARE = tl.constexpr(LEAST_CENTRED**2)


@triton.jit
def centred(b_keys, b_mean, m_token):
    """Keys [tokens, BLOCK_D] without their mean, float32; zero where there is no token."""
    return tl.where(m_token[:, None], b_keys.to(tl.float32) - b_mean[None, :], 0.0)


@triton.jit
def has_no_direction(b_square, b_mean):
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
    GRAIN: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Sum of the keys of a tile of tokens."""
    i_tile = tl.program_id(0) % num_tiles
    i_row = tl.program_id(0) // num_tiles
    i_request = i_row // (num_layers * NUM_HEADS)
    i_layer = i_row // NUM_HEADS % num_layers
    i_head = i_row % NUM_HEADS
    prefix_len = tl.load(p_prefix_lens + i_request)
    settled_len = tl.load(p_settled_lens + i_request)
    lead = prefix_len % GRAIN
    start = prefix_len - lead
    n = settled_len - prefix_len
    if i_tile * TILE >= n + lead:
        return
    o_token = i_tile * TILE + tl.arange(0, TILE) - lead
    m_token = (o_token >= 0) & (o_token < n)
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
    ).to(tl.float32)
    b_keys = tl.where(m_token[:, None], b_keys, 0.0)
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
    GRAIN: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Inverse norms of a tile of tokens and the sum of its unit keys."""
    i_tile = tl.program_id(0) % num_tiles
    i_row = tl.program_id(0) // num_tiles
    i_request = i_row // (num_layers * NUM_HEADS)
    i_layer = i_row // NUM_HEADS % num_layers
    i_head = i_row % NUM_HEADS
    prefix_len = tl.load(p_prefix_lens + i_request)
    settled_len = tl.load(p_settled_lens + i_request)
    lead = prefix_len % GRAIN
    start = prefix_len - lead
    n = settled_len - prefix_len
    if i_tile * TILE >= n + lead:
        return
    o_token = i_tile * TILE + tl.arange(0, TILE) - lead
    m_token = (o_token >= 0) & (o_token < n)
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
    ).to(tl.float32)
    o_row = i_row.to(tl.int64)
    o_dim = tl.arange(0, BLOCK_D)
    if CENTER:
        b_mean = tl.load(p_means + o_row * HEAD_SIZE + o_dim, mask=o_dim < HEAD_SIZE, other=0.0)
        b_keys = centred(b_keys, b_mean, m_token)
    else:
        b_keys = tl.where(m_token[:, None], b_keys, 0.0)
    b_square = tl.sum(b_keys * b_keys, axis=1)
    b_inverse = 1.0 / (tl.sqrt(b_square) + NORM_EPSILON)
    if CENTER:
        b_inverse = tl.where(has_no_direction(b_square, b_mean), 0.0, b_inverse)
    b_sum = tl.sum(b_keys * b_inverse[:, None], axis=0)
    # NaN is no hit of the search, whatever the threshold.
    b_inverse = tl.where(m_token, b_inverse, float("nan"))
    tl.store(p_inverse_norms + (o_row * num_tiles + i_tile) * TILE + tl.arange(0, TILE), b_inverse)
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
    GRAIN: tl.constexpr,
):
    """Sum of the tiles of one head, or what it is per token."""
    i_row = tl.program_id(0).to(tl.int64)
    i_request = i_row // rows_per_request
    prefix_len = tl.load(p_prefix_lens + i_request)
    n = tl.load(p_settled_lens + i_request) - prefix_len
    num_parts = tl.cdiv(n + prefix_len % GRAIN, TILE)
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
