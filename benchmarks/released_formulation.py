"""The formulation that the paper's authors released, in batched torch: the baseline to beat.

It builds the n x n matrix of cosines of all heads at once and works on it as a whole, as
`cal_similarity` and the R-KV cache class of the released code do (Zefan-Cai/R-KV, arXiv:2505.24133,
section 3). Written anew and made as good as plain torch allows, so that the comparison is fair: all
layers and requests in one batch instead of one layer after the other, int32 instead of int64
indices, no loop over heads. It gets dense keys and values for nothing; what gathering them out of
a paged cache costs is not charged. Knows nothing of rkv_vllm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Of every pair: the cosine, whether it exceeds the threshold (1 byte), and its column index or 0.
_INDEX_AND_MASK_BYTES = 5
_NORM_EPSILON = 1e-8


def bytes_per_head(num_tokens: int, dtype: torch.dtype) -> int:
    """Memory of the n x n temporaries of one head that live at the same time."""
    return num_tokens**2 * (dtype.itemsize + _INDEX_AND_MASK_BYTES)


def released_scores(
    keys: Tensor,
    queries: Tensor,
    *,
    window: int,
    lam: float = 0.1,
    pool: int = 7,
    threshold: float = 0.5,
    heads_at_once: int,
) -> Tensor:
    """Score the tokens before the window.

    Args:
        keys: [heads, n, head_size] after RoPE; all arithmetic is in their dtype.
        queries: [heads * group, window, head_size] in the same dtype.
        window: newest tokens whose queries judge.
        lam: weight of importance against redundancy.
        pool: width of the max-pool over importance.
        threshold: cosine above which two keys count as similar.
        heads_at_once: heads per batch; the n x n temporaries are theirs.

    Returns:
        float32 [heads, n - window].
    """
    num_heads, n, _ = keys.shape
    group = queries.shape[0] // num_heads
    result = keys.new_empty((num_heads, n - window), dtype=torch.float32)
    for first in range(0, num_heads, heads_at_once):
        part = keys[first : first + heads_at_once]
        judges = queries[first * group : (first + heads_at_once) * group]
        importance = _importance(part, judges, window, pool)
        redundancy = _redundancy(part, threshold)[:, : n - window]
        result[first : first + heads_at_once] = lam * importance - (1 - lam) * redundancy
    return result


def released_select(scores: Tensor, count: int) -> Tensor:
    """Indices int64 [heads, count] of the best scores; in order of score, as released."""
    return scores.topk(count, dim=1).indices


def released_compact(states: Tensor, chosen: Tensor, window: int) -> Tensor:
    """Survivors and window of dense states [heads, n, head_size] in a new tensor."""
    index = chosen.unsqueeze(-1).expand(-1, -1, states.shape[2])
    survivors = states[:, :-window].gather(1, index)
    return torch.cat([survivors, states[:, -window:]], dim=1)


def _importance(keys: Tensor, queries: Tensor, window: int, pool: int) -> Tensor:
    num_heads, n, head_size = keys.shape
    candidates = keys[:, : n - window]
    rows = (queries * head_size**-0.5).reshape(num_heads, -1, head_size)
    logits = rows @ candidates.transpose(1, 2)
    logits = logits.view(num_heads, -1, window, n - window).amax(dim=1)
    mean = logits.softmax(dim=-1, dtype=torch.float32).mean(dim=1)
    return F.max_pool1d(mean.unsqueeze(1), pool, stride=1, padding=pool // 2).squeeze(1)


def _redundancy(keys: Tensor, threshold: float) -> Tensor:
    n = keys.shape[1]
    norms = torch.linalg.vector_norm(keys, dim=-1, keepdim=True, dtype=torch.float32)
    unit = (keys / (norms + _NORM_EPSILON)).to(keys.dtype)
    cosines = unit @ unit.transpose(1, 2)
    cosines.diagonal(dim1=1, dim2=2).zero_()
    columns = torch.arange(n, dtype=torch.int32, device=keys.device)
    # Of each row the last similar column; column 0 where there is none.
    last = torch.where(cosines > threshold, columns, 0).amax(dim=2, keepdim=True)
    cosines.scatter_(2, last.long(), 0.0)
    return cosines.mean(dim=1, dtype=torch.float32).softmax(dim=-1)
