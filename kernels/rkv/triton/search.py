"""Column sums in closed form, and the newest similar key of each token.

A program has a tile of rows and goes through tiles of columns from the newest key backwards, until
all its rows have found a similar one. A row's cosine with it is taken from the product at hand.

The newest similar keys take cosines out of few column sums, many at once. These subtractions are
atomic and come in any order, so they are made on integers of 2**-40, where the order does not
matter: ranks of tensor parallelism that hold copies of one head, and repeated runs, choose alike.
"""

import triton
import triton.language as tl
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.triton.stats import NORM_EPSILON, Norms, centred
from rkv_vllm.kernels.tiles import (
    TILE,
    VARYING,
    elements,
    judged_span,
    layout_of,
    load_tile,
    place_of_row,
    product,
    register_limit,
    states_of_head,
    strides_of,
    tile_of_program,
)

# Of a thread. Programs wait for memory most of the time: an H100 holds four of these at a time, not
# three, at 24 spilled bytes.
REGISTERS = 128
# Column sums are below 2**20 tokens in any context length, so a sum stays below 2**61.
FIXED_POINT = tl.constexpr(float(2**40))


def launch_search(
    keys: PagedStates,
    batch: EvictionBatch,
    norms: Norms,
    totals: Tensor,
    threshold: float,
    column_sums: Tensor,
) -> None:
    """Column sums, and what of them is shielded.

    Args:
        keys: the cache.
        batch: the requests.
        norms: as `launch_stats` leaves them; `shielded` is filled.
        totals: float32 [rows, head_size], sums of unit keys.
        threshold: cosine above which two keys count as similar.
        column_sums: out, float32 [rows, most judged].
    """
    num_rows, num_tiles, _ = norms.tile_sums.shape
    search_kernel[(num_rows * num_tiles,)](
        elements(keys.cells, keys.dtype),
        strides_of(keys),
        batch.old_block_table,
        batch.old_block_table.stride(0),
        batch.settled_lens,
        batch.prefix_lens,
        norms.means,
        norms.inverse,
        totals,
        column_sums,
        norms.shielded,
        keys.num_layers,
        batch.max_judged,
        num_tiles,
        threshold,
        CENTER=norms.means is not None,
        **layout_of(keys),
        **(register_limit(keys, REGISTERS) if norms.means is None else {}),
    )


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
    GRAIN: tl.constexpr,
    FP8: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Column sum and newest similar key of each token of a tile."""
    i_row, i_tile = tile_of_program(num_tiles)
    i_request, i_layer, i_head = place_of_row(i_row, num_layers, NUM_HEADS)
    prefix_len, settled_len, lead, start = judged_span(
        p_prefix_lens, p_settled_lens, i_request, GRAIN
    )
    n = settled_len - prefix_len
    first_row = i_tile * TILE
    if first_row >= n + lead:
        return
    p_head, p_row = states_of_head(
        p_keys, strides, p_block_table, table_stride, i_request, i_layer, i_head
    )
    o_tile = tl.arange(0, TILE)
    o_token = first_row + o_tile - lead
    m_token = (o_token >= 0) & (o_token < n)
    b_keys = load_tile(
        p_head,
        p_row,
        start + first_row,
        settled_len,
        strides,
        TILE,
        HEAD_SIZE,
        BLOCK_D,
        BLOCK_SIZE,
        KERNEL_BLOCK_SIZE,
        GRAIN,
        FP8,
    )
    o_row = i_row.to(tl.int64) * max_len
    p_norms = p_inverse_norms + i_row.to(tl.int64) * num_tiles * TILE
    b_inverse = tl.load(p_norms + first_row + o_tile)
    o_dim = tl.arange(0, BLOCK_D)
    if CENTER:
        p_mean = p_means + i_row.to(tl.int64) * HEAD_SIZE
        b_mean = tl.load(p_mean + o_dim, mask=o_dim < HEAD_SIZE, other=0.0)
        b_keys = centred(b_keys, b_mean, b_inverse != 0.0)
    p_total = p_totals + i_row.to(tl.int64) * HEAD_SIZE
    b_total = tl.load(p_total + o_dim, mask=o_dim < HEAD_SIZE, other=0.0)
    # The inverse is 1 / (norm + epsilon), or 0.
    b_own = tl.where(b_inverse == 0.0, 0.0, 1.0 - NORM_EPSILON * b_inverse)
    b_sums = tl.sum(b_keys.to(tl.float32) * b_total[None, :], axis=1) * b_inverse - b_own * b_own
    tl.store(p_column_sums + o_row + o_token, b_sums, mask=m_token)

    # A cosine above the threshold, both sides times the norm of the row's key.
    b_limit = threshold * tl.where(b_inverse == 0.0, NORM_EPSILON, 1.0 / b_inverse)
    # Rows of no token are settled from the start.
    b_newest = tl.where(m_token, -1, 0)
    b_scaled_cosine = tl.zeros((TILE,), tl.float32)
    i_column = (n + lead - 1) // TILE
    while i_column >= 0:
        first = i_column * TILE
        b_columns = load_tile(
            p_head,
            p_row,
            start + first,
            settled_len,
            strides,
            TILE,
            HEAD_SIZE,
            BLOCK_D,
            BLOCK_SIZE,
            KERNEL_BLOCK_SIZE,
            GRAIN,
            FP8,
        )
        b_column_norms = tl.load(p_norms + first + o_tile)
        if CENTER:
            b_columns = centred(b_columns, b_mean, b_column_norms != 0.0)
        b_scaled = product(b_keys, tl.trans(b_columns), IN_FLOAT32) * b_column_norms[None, :]
        b_hits = tl.where(b_scaled > b_limit[:, None], o_tile[None, :], -1)
        if i_column == i_tile:
            b_hits = tl.where(o_tile[None, :] == o_tile[:, None], -1, b_hits)
        b_hit = tl.max(b_hits, axis=1)
        # The oldest key is shielded where no key is similar, whatever the cosine with it.
        b_hit = tl.maximum(b_hit, tl.where(i_column == 0, lead, -1))
        b_at_hit = tl.sum(tl.where(o_tile[None, :] == b_hit[:, None], b_scaled, 0.0), axis=1)
        is_found = (b_newest < 0) & (b_hit >= 0)
        b_newest = tl.where(is_found, first - lead + b_hit, b_newest)
        b_scaled_cosine = tl.where(is_found, b_at_hit, b_scaled_cosine)
        i_column = tl.where(tl.min(b_newest, axis=0) < 0, i_column - 1, -1)
    # Token 0 without a similar key points to itself; its own cosine was never in the sum.
    tl.atomic_add(
        p_shielded + o_row + b_newest,
        (b_scaled_cosine * b_inverse * FIXED_POINT).to(tl.int64),
        mask=m_token & (b_newest != o_token),
        sem="relaxed",
    )
