"""score in Triton: four kernels over requests x layers x heads, memory O(tokens) per head.

    stats     per tile of tokens: norms, the tile's share of the sum of unit keys, and of the
              softmax of the window's attention
    combine   per head: adds the tiles up, in order
    search    per tile of tokens: mean attention, column sums in closed form, and the newest
              similar key of each token, sought from the newest key backwards; a tile stops as soon
              as all its tokens have found one
    finish    per head: softmax over the column sums, max-pool over the attention, the scores

Keys are read through the block table three times and never copied: a head's keys of one request
fit into the second-level cache, and storing logits or unit keys would cost more traffic.
`score_naive` is the contract, docs/method.md has the formulas. Next: passes.py.

The newest similar keys take cosines out of few column sums, many at once. These subtractions are
atomic and come in any order, so they are made on integers of 2**-40, where the order does not
matter: ranks of tensor parallelism that hold copies of one head, and repeated runs, choose alike.
"""

import torch
import triton
from torch import Tensor

from rkv_vllm.kernels.eviction import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.score.passes import (
    TILE,
    combine_kernel,
    finish_kernel,
    search_kernel,
    stats_kernel,
)
from rkv_vllm.kernels.tiles import is_interpreted, kernel_block_size, strides_of


def score_triton(
    keys: PagedStates,
    batch: EvictionBatch,
    observation_queries: Tensor,
    *,
    lam: float = 0.1,
    pool: int = 7,
    threshold: float = 0.5,
) -> Tensor:
    """As `score_naive`, but a NaN or infinite score is noted in `batch.non_finite`."""
    batch.check_rows(keys)
    group = batch.check_observations(observation_queries, keys)
    if observation_queries.stride(-1) != 1:
        raise ValueError(
            "observation_queries: expected a contiguous last dimension, got strides "
            f"{observation_queries.stride()}"
        )
    num_rows = batch.num_requests * keys.num_layers * keys.num_heads
    max_len, max_candidates = batch.max_settled_len, batch.max_candidates
    scores = keys.blocks.new_empty(
        (batch.num_requests, keys.num_layers * keys.num_heads, max_candidates), dtype=torch.float32
    )
    if num_rows == 0:
        return scores
    num_tiles = triton.cdiv(max_len, TILE.value)
    block_w = max(16, triton.next_power_of_2(batch.window))
    block_d = max(16, triton.next_power_of_2(keys.head_size))

    def floats(*shape: int) -> Tensor:
        return scores.new_empty((num_rows, *shape))

    inverse_norms, attention, column_sums = floats(max_len), floats(max_len), floats(max_len)
    shielded = scores.new_zeros((num_rows, max_len), dtype=torch.int64)
    tile_sums = floats(num_tiles, keys.head_size)
    tile_maxima, tile_denominators = floats(num_tiles, block_w), floats(num_tiles, block_w)
    totals, maxima, denominators = floats(keys.head_size), floats(block_w), floats(block_w)
    cache_and_queries = (
        keys.cells,
        *strides_of(keys),
        observation_queries,
        *observation_queries.stride()[:4],
        batch.old_block_table,
        batch.old_block_table.stride(0),
        batch.settled_lens,
        batch.slots,
        batch.window_ends,
    )
    sizes = (keys.num_layers, max_len, num_tiles, observation_queries.shape[2])
    scale = keys.head_size**-0.5
    widths = {
        "WINDOW": batch.window,
        "BLOCK_W": block_w,
        "HEAD_SIZE": keys.head_size,
        "BLOCK_D": block_d,
    }
    layout = {
        "NUM_HEADS": keys.num_heads,
        "GROUP": group,
        "BLOCK_SIZE": keys.block_size,
        "KERNEL_BLOCK_SIZE": kernel_block_size(keys),
        # The interpreter multiplies bf16 as if it were integers.
        "IN_FLOAT32": is_interpreted(),
        # Tiles of wider heads need the registers of more threads.
        "num_warps": 4 if block_d <= 128 else 8,
    }
    rows_per_request = keys.num_layers * keys.num_heads
    stats_kernel[(num_rows * num_tiles,)](
        *cache_and_queries,
        inverse_norms,
        tile_sums,
        tile_maxima,
        tile_denominators,
        *sizes,
        scale,
        **widths,
        **layout,
    )
    combine_kernel[(num_rows,)](
        batch.settled_lens,
        tile_sums,
        tile_maxima,
        tile_denominators,
        totals,
        maxima,
        denominators,
        rows_per_request,
        num_tiles,
        **widths,
    )
    search_kernel[(num_rows * num_tiles,)](
        *cache_and_queries,
        inverse_norms,
        totals,
        maxima,
        denominators,
        attention,
        column_sums,
        shielded,
        *sizes,
        scale,
        threshold,
        **widths,
        **layout,
    )
    finish_kernel[(num_rows,)](
        batch.settled_lens,
        attention,
        column_sums,
        shielded,
        scores,
        batch.non_finite,
        rows_per_request,
        max_len,
        max_candidates,
        lam,
        1.0 - lam,
        WINDOW=batch.window,
        POOL=pool,
    )
    return scores
