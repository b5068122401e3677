"""Intervals: against stock itself, against a worse side, and where there is little to say."""

import math

import numpy as np
import pytest

from rkv_vllm.eval.statistics import (
    Comparison,
    Interval,
    paired_bootstrap,
    pooled_interval,
    share_interval,
)


def random_stock(n=60, samples=2, seed=0):
    draws = np.random.default_rng(seed).random((n, samples)) < 0.7
    return {f"p{i}": [float(right) for right in row] for i, row in enumerate(draws)}


def test_stock_against_itself_is_one_and_no_difference():
    found = paired_bootstrap(random_stock(), random_stock(), seed=0)
    assert found == Comparison(Interval(0, 0, 0), Interval(1, 1, 1), 60)


def test_draws_in_which_neither_side_is_right_count_as_equal():
    stock = {"a": [1.0], "b": [0.0], "c": [0.0]}
    assert paired_bootstrap(stock, stock, seed=0).ratio == Interval(1, 1, 1)


def test_a_side_that_differs_by_chance_has_an_interval_that_holds_nothing_lost():
    side = random_stock(seed=1)
    found = paired_bootstrap(random_stock(), side, seed=0)
    assert found.difference.low < 0 < found.difference.high
    assert found.ratio.low < 1 < found.ratio.high


def test_a_worse_side_is_found_worse():
    stock = random_stock()
    side = {key: [0.0, v[1]] if i % 2 else v for i, (key, v) in enumerate(stock.items())}
    found = paired_bootstrap(stock, side, seed=0)
    assert found.difference.high < 0
    assert found.ratio.high < 1


def test_the_interval_is_that_of_the_mean_of_paired_differences():
    """Against the normal approximation: pairs that move together must give a narrow interval."""
    rng = np.random.default_rng(3)
    base = rng.random(400)
    stock = {i: [v] for i, v in enumerate(base)}
    side = {i: [v - 0.1 + e] for i, (v, e) in enumerate(zip(base, 0.05 * rng.random(400)))}  # noqa: B905
    found = paired_bootstrap(stock, side, seed=0).difference
    differences = np.array([side[i][0] - stock[i][0] for i in stock])
    half = 1.96 * differences.std() / 20
    assert found.mean == pytest.approx(differences.mean())
    assert found.low == pytest.approx(differences.mean() - half, abs=half / 10)
    assert found.high == pytest.approx(differences.mean() + half, abs=half / 10)


def test_problems_count_alike_however_many_samples_they_have():
    stock = {"a": [1.0] * 8, "b": [0.0]}
    assert share_interval(stock).mean == 0.5
    assert paired_bootstrap(stock, {"a": [0.0], "b": [0.0]}, seed=0).difference.mean == -0.5


def test_only_problems_of_both_sides_are_compared():
    found = paired_bootstrap({"a": [1.0], "b": [0.0]}, {"c": [1.0], "a": [1.0]}, seed=0)
    assert (found.num_problems, found.difference.mean, found.ratio.mean) == (1, 0.0, 1.0)
    with pytest.raises(ValueError, match="no problem"):
        paired_bootstrap({"a": [1.0]}, {"b": [1.0]}, seed=0)


def test_a_seed_repeats():
    stock, side = random_stock(), random_stock(seed=1)
    assert paired_bootstrap(stock, side, seed=5) == paired_bootstrap(stock, side, seed=5)
    assert paired_bootstrap(stock, side, seed=5) != paired_bootstrap(stock, side, seed=6)


def test_one_problem_gives_no_interval():
    found = paired_bootstrap({"a": [1.0]}, {"a": [0.0]}, seed=0)
    assert found == Comparison(Interval(-1, None, None), Interval(0, None, None), 1)


def test_a_stock_that_is_never_right_gives_no_ratio():
    found = paired_bootstrap({"a": [0.0], "b": [0.0]}, {"a": [1.0], "b": [0.0]}, seed=0)
    assert found.ratio is None
    assert found.difference.mean == 0.5


def test_a_stock_that_is_hardly_ever_right_gives_a_ratio_without_upper_end():
    stock = {i: [float(i == 0)] for i in range(10)}
    side = {i: [float(i == 1)] for i in range(10)}
    ratio = paired_bootstrap(stock, side, seed=0).ratio
    assert (ratio.mean, ratio.low, ratio.high) == (1.0, 0.0, math.inf)


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    # Wilson's interval as published tables give it.
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (1, 1, 0.2065, 1.0)],
)
def test_a_share_has_wilsons_interval(right, of, low, high):
    found = share_interval({i: [float(i < right)] for i in range(of)})
    assert found == pytest.approx((right / of, low, high), abs=1e-4)
    with pytest.raises(ValueError, match="no problem"):
        share_interval({})


def test_a_pooled_mean_weighs_problems_by_their_tokens():
    found = pooled_interval({"a": [3.0, 1.0], "b": [0.0]}, {"a": [4, 6], "b": [30]}, seed=0)
    assert found == Interval(0.1, 0.0, 0.4)
    assert pooled_interval({"a": [3.0]}, {"a": [10]}, seed=0) == Interval(0.3, None, None)


def test_problems_without_tokens_are_no_part_of_a_pooled_mean():
    sums, counts = {"a": [3.0], "b": [1.0], "c": [0.0]}, {"a": [10], "b": [10], "c": [0]}
    without = pooled_interval({k: sums[k] for k in "ab"}, {k: counts[k] for k in "ab"}, seed=0)
    assert pooled_interval(sums, counts, seed=0) == without
    assert pooled_interval({"c": [0.0]}, {"c": [0]}, seed=0) is None
