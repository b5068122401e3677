"""R-KV: keep what the newest queries look at, drop keys that repeat others.

Pure torch, every step in float32, every head on its own; no pairwise matrix is ever stored. This
module knows tensors of flattened heads only, neither vLLM nor requests. ``docs/method.md`` explains
the formulas; ``base.py`` has the interface.

Source: R-KV: Redundancy-aware KV Cache Compression for Reasoning Models (arXiv:2505.24133),
section 3, with the tie, order and default rules that ``docs/method.md`` lists.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from rkv_vllm.methods.base import CompressionMethod, NonFiniteScoreError
from rkv_vllm.option_field import option

if TYPE_CHECKING:
    from rkv_vllm.config import KVCompressionConfig
    from rkv_vllm.kernels.eviction import EvictionBatch
    from rkv_vllm.kernels.paged import PagedStates

# Keeps the unit key of an all-zero key finite.
NORM_EPSILON = 1e-8

# Keys per step of the backward search. Most rows find a similar key among the newest few, so a
# wider tile computes cosines that nobody reads; a narrower one leaves the matrix product idle.
TILE = 64

# Upper bound in float32 elements (4 MiB) for any one temporary (or one head's worth, if more).
# Heads are processed in groups that respect it, so that a long prompt costs time and not memory.
# Larger groups leave the CPU's cache and measured slower, much smaller ones pay more for calls.
MAX_TEMPORARY_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Options:
    """What R-KV is asked with. Source: the paper's section 4; the released code's defaults."""

    lam: float = option(
        0.1,
        "Weight of importance against redundancy, no unit: 1 looks at attention only, 0 at "
        "similarity only.",
        flag="--kv-lambda",
        metavar="WEIGHT",
        wanted="a number from 0 to 1",
        accepts=lambda weight: 0 <= weight <= 1,
        per_request=True,
    )
    pool: int = option(
        7,
        "Width of the max-pooling over importance, in tokens; odd, 1 switches it off.",
        flag="--kv-pool",
        metavar="TOKENS",
        # Kernels unroll the pooling: one more compilation, and a longer one, for each width.
        wanted="an odd number of tokens, 1 to 63",
        accepts=lambda tokens: 1 <= tokens <= 63 and tokens % 2 == 1,
    )
    threshold: float = option(
        0.5,
        "Cosine between two keys above which the tokens count as similar, no unit. Write a "
        "negative one with `=`.",
        flag="--kv-threshold",
        metavar="COSINE",
        wanted="a cosine from -1 to 1",
        accepts=lambda cosine: -1 <= cosine <= 1,
        per_request=True,
    )


@dataclass(frozen=True)
class RKV(CompressionMethod):
    """R-KV with its four parameters.

    Attributes:
        window: Newest tokens whose queries judge the others; they are always kept.
        lam: Weight of importance against redundancy, in [0, 1].
        pool: Width of the max-pool over importance, in tokens, odd.
        threshold: Cosine above which two keys count as similar.
    """

    Options = Options
    window: int = 8
    lam: float = 0.1
    pool: int = 7
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window {self.window} must be at least 1 token")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool {self.pool} must be odd and positive, for example 7")

    @classmethod
    def from_config(cls, config: KVCompressionConfig) -> RKV:
        """Take the four parameters of the method from the engine's options."""
        own = config.method_options
        return cls(config.window, own.lam, own.pool, own.threshold)

    def keep_indices(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        queries: torch.Tensor,
        budget: int,
    ) -> torch.LongTensor:
        """Choose by keys and queries; R-KV does not look at ``values``. See the base class."""
        return _keep_indices(keys, queries, budget, self)

    def keep_paged(
        self,
        keys: PagedStates,
        values: PagedStates,
        batch: EvictionBatch,
        observation_queries: torch.Tensor,
    ) -> torch.Tensor:
        """Choose without a dense copy of the cache. See the base class."""
        # Deferred: the reference versions of the kernels call this module.
        from rkv_vllm.kernels.select import select

        return select(self.score_paged(keys, batch, observation_queries), batch)

    def score_paged(
        self, keys: PagedStates, batch: EvictionBatch, observation_queries: torch.Tensor
    ) -> torch.Tensor:
        """Weigh importance against redundancy. See the base class."""
        # Deferred: the reference versions of the kernels call this module.
        from rkv_vllm.kernels.score import score

        if batch.window != self.window:
            raise ValueError(f"batch: expected a window of {self.window}, got {batch.window}")
        return score(
            keys,
            batch,
            observation_queries,
            lam=self.lam,
            pool=self.pool,
            threshold=self.threshold,
        )


def scores(
    keys: torch.Tensor,
    queries: torch.Tensor,
    *,
    window: int = 8,
    lam: float = 0.1,
    pool: int = 7,
    threshold: float = 0.5,
) -> torch.Tensor:
    """Score every token before the window; larger means more worth keeping.

    Args:
        keys: [heads, n, head_size], any float dtype, cache order, after RoPE.
        queries: [heads * group, window, head_size], any float dtype, after RoPE, of the last
            ``window`` tokens in temporal order. Query head ``h * group + g`` reads KV head ``h``.
        window: Newest tokens whose queries judge the others.
        lam: Weight of importance against redundancy, in [0, 1].
        pool: Width of the max-pool over importance, in tokens, odd.
        threshold: Cosine above which two keys count as similar.

    Returns:
        float32 [heads, n - window].

    Raises:
        NonFiniteScoreError: A score is NaN or infinite.
        ValueError: The shapes do not fit each other, or a parameter is out of range.

    Source: arXiv:2505.24133, section 3.
    """
    method = RKV(window, lam, pool, threshold)
    _check_shapes(keys, queries, window)
    result = keys.new_empty((keys.shape[0], keys.shape[1] - window), dtype=torch.float32)
    for heads, part in _scores_by_group(keys, queries, method):
        result[heads] = part
    return result


def keep_indices(
    keys: torch.Tensor,
    queries: torch.Tensor,
    budget: int,
    *,
    window: int = 8,
    lam: float = 0.1,
    pool: int = 7,
    threshold: float = 0.5,
) -> torch.LongTensor:
    """Choose the tokens each head keeps: the best scored ones and the window.

    Args:
        keys: As for ``scores``.
        queries: As for ``scores``.
        budget: Tokens to keep per head, window included, with ``window < budget <= n``.
        window: As for ``scores``.
        lam: As for ``scores``.
        pool: As for ``scores``.
        threshold: As for ``scores``.

    Returns:
        int64 [heads, budget], ascending in every row. Of equal scores the lower index stays.

    Raises:
        NonFiniteScoreError: A score is NaN or infinite.
        ValueError: The shapes or the budget do not fit, or a parameter is out of range.

    Source: arXiv:2505.24133, section 3.
    """
    return _keep_indices(keys, queries, budget, RKV(window, lam, pool, threshold))


def _keep_indices(
    keys: torch.Tensor, queries: torch.Tensor, budget: int, method: RKV
) -> torch.LongTensor:
    _check_shapes(keys, queries, method.window)
    num_heads, n, _ = keys.shape
    if not method.window < budget <= n:
        raise ValueError(
            f"budget {budget} must exceed the window of {method.window} tokens and must not exceed "
            f"the {n} tokens of keys"
        )
    num_candidates = n - method.window
    kept = torch.empty((num_heads, budget), dtype=torch.int64, device=keys.device)
    kept[:, -method.window :] = torch.arange(num_candidates, n, device=keys.device)
    for heads, part in _scores_by_group(keys, queries, method):
        kept[heads, : -method.window] = largest(part, budget - method.window)
    return kept


def _check_shapes(keys: torch.Tensor, queries: torch.Tensor, window: int) -> None:
    if keys.dim() != 3 or queries.dim() != 3:
        raise ValueError(
            "expected keys [heads, n, head_size] and queries [heads * group, window, head_size], "
            f"got keys {list(keys.shape)} and queries {list(queries.shape)}"
        )
    num_heads, n, head_size = keys.shape
    num_query_heads = queries.shape[0]
    if num_query_heads % max(num_heads, 1) or (num_query_heads == 0) != (num_heads == 0):
        raise ValueError(
            f"expected the heads of queries to be a multiple of the {num_heads} heads of keys, "
            f"got {num_query_heads}"
        )
    if queries.shape[1:] != (window, head_size):
        raise ValueError(
            f"expected queries [heads * group, window={window}, head_size={head_size}], "
            f"got {list(queries.shape)}"
        )
    if n <= window:
        raise ValueError(f"expected keys of more than window={window} tokens, got {n}")


@torch.no_grad()
def _scores_by_group(
    keys: torch.Tensor, queries: torch.Tensor, method: RKV
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (heads, their finite scores) for groups of heads with bounded temporaries."""
    num_heads, n, head_size = keys.shape
    group = queries.shape[0] // max(num_heads, 1)
    widest = max(head_size, TILE, group * method.window)
    step = max(1, MAX_TEMPORARY_ELEMENTS // (n * widest))
    for first in range(0, num_heads, step):
        heads = slice(first, min(first + step, num_heads))
        query_heads = slice(heads.start * group, heads.stop * group)
        part = _scores(keys[heads].float(), queries[query_heads].float(), method)
        finite = part.isfinite().all(dim=1)
        if not finite.all():
            raise NonFiniteScoreError(first + int((~finite).nonzero()[0]))
        yield heads, part


def _scores(keys: torch.Tensor, queries: torch.Tensor, method: RKV) -> torch.Tensor:
    num_candidates = keys.shape[1] - method.window
    importance = _importance(keys[:, :num_candidates], queries, method.pool)
    redundancy = _redundancy(keys, method.threshold)[:, :num_candidates]
    return method.lam * importance - (1 - method.lam) * redundancy


def _importance(candidates: torch.Tensor, queries: torch.Tensor, pool: int) -> torch.Tensor:
    """Attention that the window's queries pay to each candidate: [heads, m]."""
    num_heads, m, head_size = candidates.shape
    window = queries.shape[1]
    # A head's group and window rows side by side: one product per KV head.
    rows = (queries * head_size**-0.5).reshape(num_heads, -1, head_size)
    logits = rows @ candidates.transpose(1, 2)
    lowest = logits.amin(dim=(1, 2)).unsqueeze(-1)
    logits = logits.view(num_heads, -1, window, m).amax(dim=1)
    mean = logits.softmax(dim=-1).mean(dim=1)
    # Max and softmax would hide a logit of -inf; as NaN it reaches the check of the scores.
    mean += 0.0 * lowest
    # The padding of max_pool1d counts as -inf, which clips the pool to the candidates.
    return F.max_pool1d(mean.unsqueeze(1), pool, stride=1, padding=pool // 2).squeeze(1)


def _redundancy(keys: torch.Tensor, threshold: float) -> torch.Tensor:
    """How much each key repeats the others, as a distribution over all n: [heads, n]."""
    n = keys.shape[1]
    norms = torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
    unit = (keys / (norms + NORM_EPSILON)).contiguous()
    # Column sums of the cosine matrix without its diagonal, from the sum of all unit keys.
    total = unit.sum(dim=1).unsqueeze(-1)
    sums = (unit @ total - (norms / (norms + NORM_EPSILON)).square()).squeeze(-1)

    # The newest key similar to row i is not held against its cluster: take row i's cosine with it
    # out of the sum again. Row 0 points to itself when nothing is similar; it has no cosine there.
    newest = _newest_similar(unit, threshold)
    shielded = _take_rows(unit, newest).mul_(unit).sum(dim=-1)
    shielded.masked_fill_(newest == torch.arange(n, device=keys.device), 0.0)
    sums.scatter_add_(1, newest, -shielded)
    return (sums / n).softmax(dim=-1)


def _newest_similar(unit: torch.Tensor, threshold: float) -> torch.Tensor:
    """For every row the largest other index with cosine > threshold, 0 without any: [heads, n].

    Goes through the keys in tiles from the newest backwards and ends as soon as no row is open.
    Once at most half of the rows at hand are open, only those are carried on, and the tiles grow
    as the rows get fewer: every step costs about the same, so a few stubborn rows cost few steps.
    """
    num_heads, n, _ = unit.shape
    newest = torch.full((num_heads, n), -1, dtype=torch.int64, device=unit.device)
    rows = torch.arange(n, device=unit.device).expand(num_heads, n)
    row_keys = unit
    num_open = stop = n
    while num_open and stop:
        start = max(stop - TILE * n // rows.shape[1], 0)
        hit = _last_hit(row_keys, rows, unit[:, start:stop], start, threshold)
        known = newest.gather(1, rows)
        newest.scatter_(1, rows, torch.where(known < 0, hit, known))
        is_open = newest < 0
        num_open = int(is_open.sum(dim=1).max())
        if 0 < 2 * num_open <= rows.shape[1]:
            # Heads with fewer open rows fill up with settled ones, which `known` protects.
            rows = is_open.float().topk(num_open, dim=1, sorted=False).indices
            row_keys = _take_rows(unit, rows)
        stop = start
    return newest.clamp_(min=0)


def _last_hit(
    row_keys: torch.Tensor,
    rows: torch.Tensor,
    tile: torch.Tensor,
    start: int,
    threshold: float,
) -> torch.Tensor:
    """Largest column of the tile that is similar to each row and is not the row, -1 without any."""
    width = tile.shape[1]
    # A similar column is replaced by its number counted from 1, any other by 0. In place and in
    # float32: that is exact for a tile and the fastest of the forms that were timed.
    numbers = torch.arange(1, width + 1, dtype=torch.float32, device=tile.device)
    hits = (row_keys @ tile.transpose(1, 2)).gt_(threshold).mul_(numbers)
    # Zero each row's own column; a row outside the tile rewrites what its border column holds.
    own = (rows - start).unsqueeze(-1)
    is_outside = (own < 0) | (own >= width)
    own = own.clamp(0, width - 1)
    hits.scatter_(2, own, hits.gather(2, own) * is_outside)
    last = hits.amax(dim=-1).long()
    return torch.where(last > 0, last + (start - 1), -1)


def _take_rows(unit: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows [heads, k] of every head: [heads, k, head_size]."""
    num_heads, n, head_size = unit.shape
    flat = rows + n * torch.arange(num_heads, device=unit.device).unsqueeze(-1)
    # On a CPU index_select copies whole rows: several times faster than gather or indexing.
    taken = unit.view(-1, head_size).index_select(0, flat.view(-1))
    return taken.view(num_heads, -1, head_size)


def largest(part: torch.Tensor, count: int) -> torch.Tensor:
    """Indices int64 [rows, count] of the largest entries, ascending; ties go to the lower index."""
    # topk alone promises nothing about ties, so it only finds the value of the cut.
    cut = part.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above = part > cut
    tied = part == cut
    room = count - above.sum(dim=1, keepdim=True)
    kept = above | (tied & (tied.cumsum(dim=1) <= room))
    return kept.nonzero()[:, 1].view(-1, count)
