"""R-KV in float64, one head and one token at a time: what the fast code has to agree with.

Deliberately slow and free of torch arithmetic. `gap` tells how far the nearest cosine that decided
something stayed away from the threshold: below float32 rounding the two may rightly differ.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

CUT_TOLERANCE = 1e-5  # relative; scores closer to the cut than this may swap


@dataclass
class Expected:
    scores: np.ndarray  # [heads, n - window]
    gap: float


def expected_scores(
    keys,
    queries,
    *,
    window=8,
    lam=0.1,
    pool=7,
    threshold=0.5,
    scale=None,
    soft_cap=0.0,
    prefix_len=0,
    center=False,
    defensive=False,
) -> Expected:
    """Scores of keys [heads, prefix_len + n, d]; what stands in the prefix must not matter."""
    keys = keys.detach().double().numpy()[:, prefix_len:]
    scale = 1 / math.sqrt(keys.shape[2]) if scale is None else scale
    queries = queries.detach().double().numpy()
    group = queries.shape[0] // keys.shape[0]
    rows, gap = [], math.inf
    for head in range(keys.shape[0]):
        own_queries = queries[head * group : (head + 1) * group]
        attention = _attention(keys[head], own_queries, window, scale, soft_cap)
        importance = _importance(attention, pool, defensive)
        redundancy, head_gap = _redundancy(keys[head], threshold, center)
        gap = min(gap, head_gap)
        m = keys.shape[1] - window
        rows.append([lam * importance[i] - (1 - lam) * redundancy[i] for i in range(m)])
    return Expected(np.array(rows), gap)


def _attention(keys, queries, window, scale, soft_cap):
    group, m = queries.shape[0], len(keys) - window
    rows = []
    for a in range(window):
        logits = []
        for i in range(m):
            of_group = [np.dot(queries[g, a], keys[i]) * scale for g in range(group)]
            if soft_cap:
                of_group = [soft_cap * math.tanh(logit / soft_cap) for logit in of_group]
            logits.append(max(of_group))
        rows.append(_softmax(logits))
    return rows


def _importance(rows, pool, defensive):
    m = len(rows[0])
    columns = [[row[i] for row in rows] for i in range(m)]
    if defensive:
        worst = [max(column) for column in columns]
        judged = [max(value, sum(worst) / m) for value in worst]
    else:
        judged = [sum(column) / len(rows) for column in columns]
    reach = pool // 2
    return [max(judged[max(0, i - reach) : min(m, i + reach + 1)]) for i in range(m)]


def _centred(keys):
    mean = sum(keys) / len(keys)
    least = 1e-5 * math.sqrt(np.dot(mean, mean))
    rest = [key - mean for key in keys]
    return [key if math.sqrt(np.dot(key, key)) > least else 0 * key for key in rest]


def _redundancy(keys, threshold, center):
    n = len(keys)
    if center:
        keys = _centred(keys)
    unit = [key / (math.sqrt(np.dot(key, key)) + 1e-8) for key in keys]
    cosine = [[np.dot(unit[i], unit[j]) for j in range(n)] for i in range(n)]
    sums = [sum(cosine[i][j] for i in range(n) if i != j) for j in range(n)]
    gap = math.inf
    for i in range(n):
        newest = 0
        for j in range(n - 1, -1, -1):
            if j == i:
                continue
            gap = min(gap, abs(cosine[i][j] - threshold))
            if cosine[i][j] > threshold:
                newest = j
                break
        if newest != i:
            sums[newest] -= cosine[i][newest]
    return _softmax([value / n for value in sums]), gap


def _softmax(values):
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    total = sum(powers)
    return [power / total for power in powers]


def expected_kept(head_scores, budget: int, window: int) -> list[int]:
    """Indices kept in one head; sorting by (-score, index) gives ties to the lower index."""
    m = len(head_scores)
    order = sorted(range(m), key=lambda i: (-head_scores[i], i))
    return sorted(order[: budget - window]) + list(range(m, m + window))


def assert_same_kept(kept: torch.Tensor, scores, budget: int, window: int) -> int:
    """Compare `kept` [heads, budget] with float64 scores [heads, m].

    Tokens whose score lies within `CUT_TOLERANCE` of the cut may differ; returns their number, so
    that a test can demand that there are few.
    """
    assert kept.dtype == torch.int64
    assert kept.shape == (len(scores), budget)
    excused = 0
    for row, head_scores in zip(kept.tolist(), scores, strict=True):
        assert row == sorted(set(row)), "ascending, without repetition"
        want = expected_kept(head_scores, budget, window)
        assert row[-window:] == want[-window:], "the window is always kept"
        cut = min(head_scores[i] for i in want[:-window])
        for i in set(row) ^ set(want):
            assert abs(head_scores[i] - cut) <= CUT_TOLERANCE * abs(cut), (i, head_scores[i], cut)
            excused += 1
    return excused
