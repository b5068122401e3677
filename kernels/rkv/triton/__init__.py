"""R-KV's scores in Triton: four launches over requests x layers x heads.

    stats     per tile of tokens: attention logits of the window, max over the query heads; norms
              and the tile's share of the sum of unit keys
    combine   per head: softmax over the candidates, mean or maximum over the window; adds the
              tiles of the sum up, in order
    search    per tile of tokens: column sums in closed form, and the newest similar key of each
              token, sought from the newest key backwards; a tile stops as soon as all its tokens
              have found one
    finish    per head: max-pool over the attention, softmax over the column sums, their weights

Two more come first where keys are centred: sums and mean. Importance alone needs no search, and
redundancy alone no logits. Rows are heads of layers of requests; tokens are counted from the end of
the protected prefix, of which nothing counts. Tiles begin where blocks do (tiles.py). Keys are read
through the block table and never copied. What the launches say must equal naive.py; docs/method.md
has the formulas. Each kernel has a file of its name; this one has the order of the launches.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch
from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.kernels.rkv.naive import check_keys, new_scores
from rkv_vllm.kernels.rkv.triton.combine import launch_combine
from rkv_vllm.kernels.rkv.triton.finish import launch_finish
from rkv_vllm.kernels.rkv.triton.mean import launch_mean
from rkv_vllm.kernels.rkv.triton.search import launch_search
from rkv_vllm.kernels.rkv.triton.stats import Norms, Window, launch_stats, prepare_importance
from rkv_vllm.kernels.tiles import TILE, most_tiles


class Pooling(NamedTuple):
    """How attention becomes importance, see `importance_naive`."""

    width: int
    defensive: bool


class Similarity(NamedTuple):
    """How keys are compared, see `redundancy_naive`."""

    threshold: float
    center: bool


def scratch_bytes(head_size: int, window: int) -> int:
    """Bytes of temporaries per token, head and layer while a batch is scored, result included."""
    importance = 4 * window + 4
    redundancy = 4 + 4 + 8 + 4 * triton.cdiv(head_size, TILE.value)
    scores, keep = 4, 4
    return importance + redundancy + scores + keep


def rkv_scores_triton(
    keys: PagedStates,
    batch: EvictionBatch,
    queries: Tensor,
    scale: Tensor,
    soft_cap: Tensor,
    *,
    lam: float,
    pool: int,
    threshold: float,
    defensive: bool = False,
    center: bool = False,
) -> Tensor:
    """As `rkv_scores` of importance and redundancy (ops.py), in launches that serve both."""
    window = new_window(keys, batch, queries, scale, soft_cap)
    pooling, similarity = Pooling(pool, defensive), Similarity(threshold, center)
    return _scores(keys, batch, window, pooling, similarity, (lam, 1 - lam))


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
    window = new_window(keys, batch, queries, scale, soft_cap)
    return _scores(keys, batch, window, Pooling(pool, defensive), None)


def redundancy_triton(
    keys: PagedStates, batch: EvictionBatch, *, threshold: float, center: bool = False
) -> Tensor:
    """As `redundancy_naive`."""
    batch.check_rows(keys)
    check_keys(keys)
    return _scores(keys, batch, None, Pooling(1, False), Similarity(threshold, center))


def new_window(
    keys: PagedStates, batch: EvictionBatch, queries: Tensor, scale: Tensor, soft_cap: Tensor
) -> Window:
    """All query heads of each group, and memory for their logits; ValueError if nothing fits."""
    group = prepare_importance(keys, batch, queries, scale, soft_cap)
    num_rows = batch.num_requests * keys.num_layers * keys.num_heads
    shape = (num_rows, batch.window, batch.max_candidates)
    logits = torch.empty(shape, dtype=torch.float32, device=keys.device)
    return Window(queries, scale, soft_cap, range(group), logits)


def _scores(
    keys: PagedStates,
    batch: EvictionBatch,
    window: Window | None,
    pooling: Pooling,
    similarity: Similarity | None,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Importance with a window, redundancy with a similarity, their difference with both."""
    result = new_scores(keys, batch)
    if result.numel() == 0:
        return result
    num_rows = result.shape[0] * result.shape[1]
    norms = attention = floors = totals = tile_sums = sums = None
    if window is not None:
        attention = result.new_empty((num_rows, batch.max_candidates))
        floors = result.new_empty(num_rows) if pooling.defensive else None
    if similarity is not None:
        num_tiles = most_tiles(keys, batch)
        tile_sums = result.new_empty((num_rows, num_tiles, keys.head_size))
        totals = result.new_empty((num_rows, keys.head_size))
        norms = Norms(
            means=launch_mean(keys, batch, tile_sums) if similarity.center else None,
            inverse=result.new_empty((num_rows, num_tiles * TILE.value)),
            tile_sums=tile_sums,
            shielded=result.new_empty((num_rows, batch.max_judged), dtype=torch.int64),
        )
    launch_stats(keys, batch, window, norms)
    launch_combine(keys, batch, window, attention, floors, tile_sums=tile_sums, totals=totals)
    if similarity is not None:
        column_sums = result.new_empty((num_rows, batch.max_judged))
        launch_search(keys, batch, norms, totals, similarity.threshold, column_sums)
        sums = column_sums, norms.shielded
    launch_finish(batch, attention, floors, pooling.width, sums, weights, result)
    return result
