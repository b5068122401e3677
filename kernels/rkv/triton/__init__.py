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
which nothing counts. Tiles begin where blocks do (tiles.py). Keys are read through the block table
and never copied. What they say must equal naive.py; docs/method.md has the formulas. Each kernel
has a file of its name; this one has the order of the launches.
"""

import torch
import triton
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.naive import check_keys, new_scores
from rkv_vllm.kernels.rkv.triton.attend import launch_attend
from rkv_vllm.kernels.rkv.triton.logits import launch_logits, prepare_importance
from rkv_vllm.kernels.rkv.triton.norms import norms_kernel, sums_kernel, total_kernel
from rkv_vllm.kernels.rkv.triton.pool import pool_kernel
from rkv_vllm.kernels.rkv.triton.search import search_kernel
from rkv_vllm.kernels.rkv.triton.spread import spread_kernel
from rkv_vllm.kernels.tiles import ROW_TILE, TILE, layout_of, most_tiles, strides_of


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
    num_tiles = most_tiles(keys, batch)
    inverse_norms = result.new_empty((num_rows, num_tiles * TILE.value))
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
    add_up = {key: layout[key] for key in ("HEAD_SIZE", "BLOCK_D", "GRAIN")}
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
