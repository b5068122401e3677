"""Reference for score: gathers the keys and calls the method."""

from torch import Tensor

from rkv_vllm.kernels.paged import PagedStates
from rkv_vllm.methods.rkv import scores


def score_naive(
    keys: PagedStates,
    block_ids: Tensor,
    num_tokens: int,
    queries: Tensor,
    *,
    window: int = 8,
    lam: float = 0.1,
    pool: int = 7,
    threshold: float = 0.5,
) -> Tensor:
    """Score every token before the window; larger means more worth keeping.

    Args:
        keys: the cache's keys after RoPE.
        block_ids: int64 [>= ceil(num_tokens / block_size)], the request's row.
        num_tokens: tokens to judge, the window included.
        queries: [num_layers * num_kv_heads * group, window, head_size], queries of the last
            `window` of these tokens in temporal order.
        window: newest tokens, whose queries judge the others.
        lam: weight of importance against redundancy.
        pool: width of the max-pool over importance, in tokens, odd.
        threshold: cosine above which two keys count as similar.

    Returns:
        float32 [num_layers * num_kv_heads, num_tokens - window].

    Raises:
        NonFiniteScoreError: a score is NaN or infinite.
        ValueError: the shapes do not fit.
    """
    dense = keys.read(block_ids, num_tokens).flatten(0, 1)
    return scores(dense, queries, window=window, lam=lam, pool=pool, threshold=threshold)
