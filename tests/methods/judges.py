"""Which tokens each method keeps, in float64 and one token at a time: no code shared with them.

Scores of one request in one layer, [KV heads, candidates], larger stays; what the frame does with
them is `oracle.expected_kept`.
"""

import math
from typing import NamedTuple

import numpy as np

ALWAYS = 1e30
BITS = 2**64 - 1


class Judged(NamedTuple):
    """One request in one layer.

    Attributes:
        keys: [KV heads, n, head_size], the settled tokens behind the prefix.
        values: the same of the values.
        queries: [query heads, window, head_size].
        budget: tokens to keep, window included.
        prefix_len: protected tokens.
        seed: of the compaction.
        layer: its number in the whole model.
        first_head: number of the first KV head in the whole model.
        scale: of the logits.
        soft_cap: of the logits, 0 = none.
    """

    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    budget: int
    prefix_len: int
    seed: int
    layer: int
    first_head: int
    scale: float
    soft_cap: float

    @property
    def window(self) -> int:
        return self.queries.shape[1]

    @property
    def m(self) -> int:
        return self.keys.shape[1] - self.window

    @property
    def num_heads(self) -> int:
        return self.keys.shape[0]

    def shares(self, head: int, query_head: int, a: int) -> list[float]:
        """Softmax over the candidates of what query `a` of the window looks at."""
        logits = []
        for key in self.keys[head, : self.m]:
            logit = float(np.dot(self.queries[query_head, a], key)) * self.scale
            logits.append(
                self.soft_cap * math.tanh(logit / self.soft_cap) if self.soft_cap else logit
            )
        return softmax(logits)


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


def snapkv(judged: Judged, pool: int = 7, defensive: bool = False) -> np.ndarray:
    """The largest logit of the group, softmax, mean over the window, largest of the neighbours.

    Defensive: the largest share of the window instead, and at least the mean of those.
    """
    group = judged.queries.shape[0] // judged.num_heads
    rows = []
    for head in range(judged.num_heads):
        looks = []
        for a in range(judged.window):
            of_group = [
                [float(np.dot(judged.queries[head * group + g, a], key)) for g in range(group)]
                for key in judged.keys[head, : judged.m]
            ]
            logits = [max(each) * judged.scale for each in of_group]
            if judged.soft_cap:
                logits = [judged.soft_cap * math.tanh(x / judged.soft_cap) for x in logits]
            looks.append(softmax(logits))
        shares = [sum(column) / judged.window for column in zip(*looks, strict=True)]
        if defensive:
            largest = [max(column) for column in zip(*looks, strict=True)]
            shares = [max(share, sum(largest) / judged.m) for share in largest]
        rows.append([max(near(shares, i, pool)) for i in range(judged.m)])
    return np.array(rows)


def near(numbers: list[float], i: int, pool: int) -> list[float]:
    return numbers[max(0, i - pool // 2) : i + pool // 2 + 1]


def keydiff(judged: Judged) -> np.ndarray:
    rows = []
    for keys in judged.keys:
        mean = [sum(column) / len(keys) for column in zip(*keys, strict=True)]
        rows.append([-cosine(key, mean) for key in keys[: judged.m]])
    return np.array(rows)


def cosine(a, b) -> float:
    def product(x, y):
        return math.fsum(float(i) * float(j) for i, j in zip(x, y, strict=True))

    return product(a, b) / math.sqrt(product(a, a) * product(b, b))


def knorm(judged: Judged) -> np.ndarray:
    return np.array(
        [
            [-math.sqrt(math.fsum(x * x for x in key)) for key in keys[: judged.m]]
            for keys in judged.keys
        ]
    )


def recent(judged: Judged, sinks: int = 4) -> np.ndarray:
    row = [
        ALWAYS if judged.prefix_len + i < sinks else judged.prefix_len + i + 1.0
        for i in range(judged.m)
    ]
    return np.array([row] * judged.num_heads)


def random(judged: Judged) -> np.ndarray:
    return np.array(
        [
            [uniform(judged, head, i) for i in range(judged.m)]
            for head in range(judged.first_head, judged.first_head + judged.num_heads)
        ]
    )


def uniform(judged: Judged, head: int, place: int) -> float:
    """The number drawn for a KV head of the whole model and a place behind the prefix."""
    row = mix(mix(judged.seed) + 2**32 * judged.layer + head)
    return ((mix(row + 0x9E3779B97F4A7C15 * place) >> 41) + 0.5) / 2**23


def mix(number: int) -> int:
    number &= BITS
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & BITS
    return number ^ (number >> 31)


def vase(judged: Judged, sinks: int = 4, share: float = 0.25, pool: int = 5) -> np.ndarray:
    """The widest values, sinks first; then a draw: log attention plus Gumbel noise, exponentiated.

    In this form scores within rounding of the cut are near it in relative terms.
    """
    attention = attention_of(judged, pool)
    num_sinks = max(0, sinks - judged.prefix_len)
    num_kept = max(num_sinks, int(share * (judged.budget - judged.window)))
    rows = []
    for head in range(judged.num_heads):
        width = [max(value) - min(value) for value in judged.values[head, : judged.m]]
        order = sorted(range(judged.m), key=lambda i: (i >= num_sinks, -width[i], i))
        row = [ALWAYS if i in order[:num_kept] else None for i in range(judged.m)]
        for i, score in enumerate(row):
            if score is None:
                noise = -math.log(-math.log(uniform(judged, judged.first_head + head, i)))
                row[i] = math.exp(math.log(attention[head, i]) + noise)
        rows.append(row)
    return np.array(rows)


def attention_of(judged: Judged, pool: int) -> np.ndarray:
    """Mean over the group of what the window looks at, each pooled by its mean: [KV heads, m]."""
    group = judged.queries.shape[0] // judged.num_heads
    rows = np.zeros((judged.num_heads, judged.m))
    for query_head in range(judged.queries.shape[0]):
        shares = [judged.shares(query_head // group, query_head, a) for a in range(judged.window)]
        mean = [sum(column) / judged.window for column in zip(*shares, strict=True)]
        for i in range(judged.m):
            some = near(mean, i, pool)
            rows[query_head // group, i] += sum(some) / len(some) / group
    return rows


BY_NAME = {judge.__name__: judge for judge in (snapkv, keydiff, knorm, recent, random, vase)}
