"""Means over problems, with intervals: of one side, and of a side against stock.

The unit of chance is the problem: its samples are averaged first, and what is drawn again are
problems, the same ones for both sides. Knows numbers only. Next: report.py.
"""

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from math import sqrt
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
_Z = 1.959964


class Interval(NamedTuple):
    """An estimate and its 95 % interval; both ends None where the data cannot say."""

    mean: float
    low: float | None
    high: float | None


class Comparison(NamedTuple):
    """A side against stock.

    Attributes:
        difference: of the means, side minus stock.
        ratio: of the means, side over stock; None where stock's mean is 0. The upper end is
            infinite where stock's mean is 0 in too many draws.
        num_problems: that both sides finished.
    """

    difference: Interval
    ratio: Interval | None
    num_problems: int


def share_interval(values: Mapping[Hashable, Sequence[float]]) -> Interval:
    """Returns the mean over problems of a share, with Wilson's interval.

    Unlike the bootstrap's it has a width where all problems are right, or all wrong. It takes a
    problem with several samples for one trial, which makes it too wide rather than too narrow.

    Args:
        values: for each problem, its samples, each between 0 and 1.

    Raises:
        ValueError: no problems.
    """
    means = _means(values)
    n, mean = len(means), float(means.mean())
    centre = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
    return Interval(mean, max(0.0, centre - half), min(1.0, centre + half))


def paired_bootstrap(
    stock: Mapping[Hashable, Sequence[float]],
    side: Mapping[Hashable, Sequence[float]],
    *,
    seed: int,
    draws: int = 10_000,
) -> Comparison:
    """Returns difference and ratio of the means over the problems that both sides have.

    Problems are drawn with replacement, for both sides the same; an end of an interval is the
    2.5 % or 97.5 % quantile of what the draws give. A single problem gives no interval.

    Args:
        stock: for each problem, its samples.
        side: likewise.
        seed: of the draws.
        draws: how many.

    Raises:
        ValueError: no problem is in both.
    """
    shared = [key for key in stock if key in side]
    ours = _means({key: side[key] for key in shared})
    theirs = _means({key: stock[key] for key in shared})
    n = len(shared)
    difference, ratio = float(ours.mean() - theirs.mean()), _ratios(ours.mean(), theirs.mean())
    weights = _draw(n, seed, draws)
    ours_drawn, theirs_drawn = weights @ ours / n, weights @ theirs / n
    return Comparison(
        _interval(difference, ours_drawn - theirs_drawn, n),
        None
        if theirs.mean() == 0
        else _interval(float(ratio), _ratios(ours_drawn, theirs_drawn), n),
        n,
    )


def pooled_interval(
    sums: Mapping[Hashable, Sequence[float]],
    counts: Mapping[Hashable, Sequence[float]],
    *,
    seed: int,
    draws: int = 10_000,
) -> Interval | None:
    """Returns a mean per token over all problems together; None where there is no token.

    Args:
        sums: for each problem, what its samples add up to over their tokens.
        counts: for each problem, its samples' tokens.
        seed: of the draws, which are of problems.
        draws: how many.
    """
    keys = [key for key in counts if sum(counts[key])]
    if not keys:
        return None
    numerators = np.array([sum(sums[key]) for key in keys], dtype=np.float64)
    denominators = np.array([sum(counts[key]) for key in keys], dtype=np.float64)
    weights = _draw(len(keys), seed, draws)
    drawn = (weights @ numerators) / (weights @ denominators)
    return _interval(float(numerators.sum() / denominators.sum()), drawn, len(keys))


# All sides of a set have the same draws, and 500 problems take a third of a second.
@lru_cache(maxsize=4)
def _draw(num_problems: int, seed: int, draws: int) -> np.ndarray:
    """How often each draw holds each problem, its weight in the draw's mean: [draws, problems]."""
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=draws)
    # Products with floats would convert them each time.
    weights = weights.astype(np.float64)
    weights.flags.writeable = False
    return weights


def _means(values: Mapping[Hashable, Sequence[float]]) -> np.ndarray:
    if not values:
        raise ValueError("statistics: got no problem, wanted at least one that both sides finished")
    return np.array([np.mean(samples) for samples in values.values()], dtype=np.float64)


def _ratios(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of means, none of them negative: equal ones give 1, zeros included."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(ours == theirs, 1.0, ours / theirs)


def _interval(mean: float, drawn: np.ndarray, num_problems: int) -> Interval:
    if num_problems < 2:
        return Interval(mean, None, None)
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    # Values that were drawn, never between two: infinity has no middle.
    low, high = np.quantile(drawn, tails, method="inverted_cdf")
    return Interval(mean, float(low), float(high))
