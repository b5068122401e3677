"""R-KV on dense heads, from the reference functions: what explicit eviction and its tests call."""

import torch
from torch import Tensor

from rkv_vllm.kernels.rkv.naive import importance_of_heads, redundancy_of_heads
from rkv_vllm.kernels.select.naive import largest


def scores(
    keys: Tensor,
    queries: Tensor,
    *,
    window: int = 8,
    lam: float = 0.1,
    pool: int = 7,
    threshold: float = 0.5,
    scale: float | None = None,
    soft_cap: float = 0.0,
    center: bool = False,
    defensive: bool = False,
) -> Tensor:
    """Score every token before the window.

    Args:
        keys: [heads, n, head_size], any float dtype, cache order, after RoPE.
        queries: [heads * group, window, head_size] of the last `window` tokens, after RoPE.
        window: newest tokens, which are not scored.
        lam: weight of importance against redundancy.
        pool: width of the max-pool over importance.
        threshold: cosine above which two keys count as similar.
        scale: of the logits, None for 1 / sqrt(head_size).
        soft_cap: of the logits, 0 = none.
        center: whether cosines are those of centred keys.
        defensive: whether the most attentive query counts, not the mean of all.

    Returns:
        float32 [heads, n - window].
    """
    num_heads, n, head_size = keys.shape
    of_heads = [
        torch.full((num_heads,), value)
        for value in (head_size**-0.5 if scale is None else scale, soft_cap)
    ]
    candidates = keys[:, : n - window]
    importance = importance_of_heads(candidates, queries, *of_heads, pool=pool, defensive=defensive)
    redundancy = redundancy_of_heads(keys, threshold=threshold, center=center)[:, : n - window]
    return lam * importance - (1 - lam) * redundancy


def keep_indices(
    keys: Tensor, queries: Tensor, budget: int, *, window: int = 8, **options: float
) -> Tensor:
    """Indices int64 [heads, budget] of the best scored tokens and the window, ascending."""
    num_heads, n, _ = keys.shape
    kept = largest(scores(keys, queries, window=window, **options), budget - window)
    return torch.cat([kept, torch.arange(n - window, n).expand(num_heads, -1)], dim=1)
