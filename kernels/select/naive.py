"""Reference for select."""

import torch
from torch import Tensor

from rkv_vllm.kernels.batch import EvictionBatch


def select_naive(scores: Tensor, batch: EvictionBatch) -> Tensor:
    """Positions that each head keeps: the best scored candidates and the window.

    A head with a candidate whose score is NaN or infinite keeps its newest tokens instead, and the
    first such head of each request is noted in `batch.non_finite`.

    Args:
        scores: float32 [R, heads, most candidates]; column i of request r is physical token
            `prefix_len + i`, of its row the first `num_candidates` count.
        batch: the requests.

    Returns:
        int32 [R, heads, largest budget], physical positions in [prefix_len, settled_len),
        ascending, the window last; of equal scores the lower index stays. -1 behind a smaller
        budget.

    Raises:
        ValueError: `scores` is not of this batch.
    """
    check_scores(scores, batch)
    shape = (batch.num_requests, scores.shape[1], batch.max_budget)
    keep = torch.full(shape, -1, dtype=torch.int32, device=scores.device)
    for i, eviction in enumerate(batch.evictions):
        num_candidates = batch.num_candidates(i)
        count = eviction.budget - batch.window
        candidates = scores[i, :, :num_candidates]
        is_bad = ~candidates.isfinite().all(dim=1)
        kept = largest(candidates.masked_fill(is_bad.unsqueeze(1), 0.0), count)
        kept[is_bad] = torch.arange(num_candidates - count, num_candidates, device=scores.device)
        keep[i, :, :count] = eviction.prefix_len + kept
        window = torch.arange(
            eviction.settled_len - batch.window, eviction.settled_len, device=scores.device
        )
        keep[i, :, count : eviction.budget] = window
        heads = torch.arange(len(is_bad), dtype=torch.int32, device=scores.device)
        if is_bad.any():
            batch.non_finite[i] = torch.minimum(batch.non_finite[i], heads[is_bad].amin())
    return keep


def largest(scores: Tensor, count: int) -> Tensor:
    """Indices int64 [rows, count] of the largest entries, ascending; ties go to the lower index."""
    if count == 0:
        return torch.empty((scores.shape[0], 0), dtype=torch.int64, device=scores.device)
    # topk alone promises nothing about ties, so it only finds the value of the cut.
    cut = scores.topk(count, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above = scores > cut
    tied = scores == cut
    room = count - above.sum(dim=1, keepdim=True)
    kept = above | (tied & (tied.cumsum(dim=1) <= room))
    return kept.nonzero()[:, 1].view(-1, count)


def check_scores(scores: Tensor, batch: EvictionBatch) -> None:
    """Raise ValueError unless these are scores of this batch, of any number of heads."""
    shape = list(scores.shape)
    fits = len(shape) == 3 and shape[0] == batch.num_requests and shape[2] == batch.max_candidates
    if not fits or scores.dtype != torch.float32 or scores.device != batch.settled_lens.device:
        raise ValueError(
            f"scores: expected float32 [{batch.num_requests}, heads, {batch.max_candidates}] on "
            f"{batch.settled_lens.device}, got {scores.dtype} {shape} on {scores.device}"
        )
