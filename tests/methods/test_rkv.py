import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from rkv_vllm.kernels.rkv import naive
from rkv_vllm.kernels.select.naive import largest
from rkv_vllm.methods import rkv
from rkv_vllm.methods.rkv import RKV
from rkv_vllm.option_field import options_of
from tests.methods.dense import keep_indices, scores
from tests.methods.oracle import assert_same_kept, expected_kept, expected_scores

# Below this distance to the threshold, float32 may see the other side of it than float64.
MIN_GAP = 1e-6
# Share of kept tokens that may differ because they lie within CUT_TOLERANCE of the cut.
MAX_EXCUSED_SHARE = 2e-3


@pytest.fixture(params=[64, 7], ids=["tile64", "tile7"], autouse=True)
def tile(request, monkeypatch):
    """Odd, small tiles exercise the search over many of them and the narrowing to open rows."""
    monkeypatch.setattr(naive, "TILE", request.param)


def tolerance(keys: torch.Tensor) -> dict[str, float]:
    """For scores. Importance and redundancy may cancel, so the absolute part follows the mean
    redundancy, which is 1 / n."""
    return {"rtol": 1e-5, "atol": 1e-6 / keys.shape[1]}


def random_keys(kind: str, heads: int, n: int, d: int, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    noise = torch.randn(heads, n, d, generator=gen)
    if kind == "random":
        return noise
    if kind == "clustered":
        # Every key belongs to one of four clusters; one in ten is an outlier that has none.
        centres = 2.5 * torch.randn(heads, 4, d, generator=gen)
        member = torch.randint(4, (heads, n, 1), generator=gen).expand(-1, -1, d)
        outlier = torch.rand(heads, n, 1, generator=gen) < 0.1
        return noise + torch.where(outlier, 0.0, centres.gather(1, member))
    if kind == "one_cluster":
        return noise + 1.5 * torch.randn(heads, 1, d, generator=gen)
    if kind == "orthogonal":
        assert n <= d
        order = torch.stack([torch.randperm(d, generator=gen)[:n] for _ in range(heads)])
        return torch.eye(d)[order] * (1 + torch.rand(heads, n, 1, generator=gen))
    raise AssertionError(kind)


def random_queries(heads: int, window: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(heads, window, d, generator=torch.Generator().manual_seed(seed + 1))


def check(keys, queries, budgets, *, exact_ties=False, **parameters) -> None:
    """Scores and kept sets equal the oracle's for every budget."""
    window = parameters.get("window", 8)
    want = expected_scores(keys, queries, **parameters)
    if not exact_ties:
        assert want.gap > MIN_GAP, "choose another seed: a cosine sits on the threshold"
    got = scores(keys, queries, **parameters)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.from_numpy(want.scores), **tolerance(keys))
    excused = total = 0
    for budget in budgets:
        kept = keep_indices(keys, queries, budget, **parameters)
        if exact_ties:
            rows = [expected_kept(row, budget, window) for row in want.scores]
            assert kept.tolist() == rows
        excused += assert_same_kept(kept, want.scores, budget, window)
        total += kept.numel()
    assert excused <= MAX_EXCUSED_SHARE * total


@pytest.mark.parametrize("kind", ["random", "clustered", "one_cluster"])
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize(("n", "d"), [(9, 16), (63, 64), (100, 32), (385, 64)])
def test_equals_the_oracle(kind, group, n, d):
    keys = random_keys(kind, 2, n, d)
    queries = random_queries(2 * group, 8, d)
    check(keys, queries, sorted({9, (n + 9) // 2 | 1, n}))


@pytest.mark.parametrize(("center", "defensive"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", ["clustered", "one_cluster"])
@pytest.mark.parametrize(("group", "n", "d"), [(1, 9, 16), (3, 100, 32), (8, 63, 64), (3, 201, 24)])
def test_centred_keys_and_defensive_aggregation_equal_the_oracle(
    center, defensive, kind, group, n, d
):
    keys, queries = random_keys(kind, 2, n, d, seed=n), random_queries(2 * group, 8, d)
    check(keys, queries, [9, (n + 9) // 2], center=center, defensive=defensive)
    # Attention alone: redundancy must not hide its aggregation.
    check(keys, queries, [9, (n + 9) // 2], center=center, defensive=defensive, lam=1.0, pool=3)


def importance_of_shares(shares, pool: int, *, defensive: bool) -> torch.Tensor:
    """Importance of one head whose window rows attend to the candidates with these shares."""
    logits = torch.tensor(shares).log().unsqueeze(0)
    keys = torch.eye(logits.shape[2]).unsqueeze(0)
    of_heads = (torch.ones(1), torch.zeros(1))
    return naive.importance_of_heads(keys, logits, *of_heads, pool=pool, defensive=defensive)[0]


@pytest.mark.parametrize(
    ("pool", "defensive", "expected"),
    [
        (1, False, [0.4, 0.1, 0.15, 0.35]),
        (3, False, [0.4, 0.4, 0.35, 0.35]),
        # Largest shares .7 .1 .2 .6, their mean .4.
        (1, True, [0.7, 0.4, 0.4, 0.6]),
        (3, True, [0.7, 0.7, 0.6, 0.6]),
    ],
)
def test_the_most_attentive_query_counts_and_nobody_is_worth_less_than_the_mean_of_that(
    pool, defensive, expected
):
    shares = [[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.6]]
    got = importance_of_shares(shares, pool, defensive=defensive)
    torch.testing.assert_close(got, torch.tensor(expected))


def test_the_floor_is_the_mean_before_the_pool():
    # The largest shares are .91 and eight times .03, their mean .1278; pooled ones have .42.
    shares = [[0.76, *[0.03] * 8], [0.91, *[0.01125] * 8]]
    got = importance_of_shares(shares, 3, defensive=True)
    floor = (0.91 + 8 * 0.03) / 9
    torch.testing.assert_close(got, torch.tensor([0.91, 0.91, *[floor] * 7]))


def test_opposite_keys_around_a_mean_are_not_similar_once_they_are_centred():
    # Around the mean they are +-(1, 0) and +-(0, 1): each has one cosine of -1. None is similar,
    # so the oldest is not charged with its cosine.
    keys = torch.tensor([[[8.0, 9.0], [6.0, 9.0], [7.0, 10.0], [7.0, 8.0]]])
    got = naive.redundancy_of_heads(keys, threshold=0.5, center=True)
    torch.testing.assert_close(got, torch.tensor([[0.0, -0.25, -0.25, -0.25]]).softmax(dim=1))
    assert not torch.allclose(got, naive.redundancy_of_heads(keys, threshold=0.5), rtol=0.01)


def test_what_all_keys_have_in_common_changes_nothing_once_they_are_centred():
    keys = random_keys("clustered", 3, 101, 32)
    common = 2.0 * torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(7))
    plain, shifted = (
        naive.redundancy_of_heads(k, threshold=0.5, center=True) for k in (keys, keys + common)
    )
    torch.testing.assert_close(plain, shifted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-4, -3e4])
def test_keys_that_are_their_mean_have_no_direction(value):
    # 0.1 times 101 divided by 101 is another number than 0.1 in float32.
    keys = torch.full((2, 101, 16), value)
    got = naive.redundancy_of_heads(keys, threshold=0.5, center=True)
    torch.testing.assert_close(got, torch.full((2, 101), 1 / 101))


def test_a_key_that_is_the_mean_of_the_others_has_no_direction():
    keys = random_keys("one_cluster", 2, 101, 16)
    for token in (0, 40, 100):
        others = torch.arange(101) != token
        keys[:, token] = keys[:, others].mean(dim=1)
        for threshold in (-0.2, 0.5):
            check(keys, random_queries(2, 8, 16), [9, 31], center=True, threshold=threshold)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_half_precision_inputs_are_scored_in_float32(dtype, kind):
    keys = random_keys(kind, 3, 151, 48, seed=5).to(dtype)
    queries = random_queries(9, 8, 48).to(dtype)
    check(keys, queries, [9, 33, 101])


@pytest.mark.parametrize("size", [3e4, 1e-4])
def test_norms_of_extreme_fp16_keys_neither_overflow_nor_vanish(size):
    # Signs in an odd dimension have no cosine of exactly 0.5.
    keys = (random_keys("one_cluster", 2, 63, 15).sign() * size).to(torch.float16)
    queries = (random_queries(2, 8, 15) / size).to(torch.float16)
    check(keys, queries, [21])


@pytest.mark.parametrize(("n", "d"), [(9, 16), (63, 64), (100, 128)])
def test_without_similar_keys_every_row_points_to_the_oldest(n, d):
    check(random_keys("orthogonal", 3, n, d), random_queries(3, 8, d), [9, (n + 9) // 2 | 1, n])


def test_rows_without_a_similar_key_still_lower_the_oldest_one():
    # Cosines of 0.3 are below the threshold and must be subtracted from column 0 all the same.
    basis = torch.eye(40)
    keys = (basis[:33] + 0.1 * basis[39])[None] + 0.55 * basis[38]
    cosines = torch.nn.functional.normalize(keys[0], dim=-1)
    cosines = cosines @ cosines.T
    assert 0.15 < float(cosines[0, 1]) < 0.5
    check(keys, random_queries(1, 8, 40), [9, 17])
    assert int(scores(keys, torch.zeros(1, 8, 40))[0].argmax()) == 0


def test_a_cosine_of_exactly_the_threshold_is_not_similar():
    # Norm 2 in four dimensions: in float32 every cosine is exactly 1 or 0.5.
    keys = torch.ones(1, 63, 4)
    keys[0, 1::2, 3] = -1.0
    got = scores(keys, torch.zeros(1, 8, 4), threshold=0.5)
    above = scores(keys, torch.zeros(1, 8, 4), threshold=0.51)
    below = scores(keys, torch.zeros(1, 8, 4), threshold=0.49)
    assert torch.equal(got, above)
    assert not torch.equal(got, below)


def test_a_single_similar_key_at_the_far_end_is_found():
    # Only 0 and 300 resemble each other: the search for row 300 goes through all tiles, and so
    # does the one for every other row. Row 1's twin is the very newest key.
    keys = torch.eye(301).repeat(2, 1, 1)
    keys[0, 300] = keys[0, 0]
    keys[1, 300] = keys[1, 1]
    check(keys, random_queries(2, 8, 301), [9, 151])


def test_equal_keys_shield_only_their_newest_copies():
    keys = torch.zeros(2, 100, 16)
    keys[0, :, 3] = 1.0  # all equal
    keys[1, torch.arange(100), torch.arange(100) % 5] = 2.0  # five groups of equal keys
    check(keys, torch.zeros(6, 8, 16), [9, 33, 100], exact_ties=True)


def test_many_equal_scores_keep_the_lower_indices():
    kept = keep_indices(torch.zeros(3, 2000, 16), torch.zeros(3, 8, 16), 777)
    assert kept.tolist() == [[*range(769), *range(1992, 2000)]] * 3


def test_zero_keys_among_others_have_no_direction():
    keys = random_keys("one_cluster", 2, 63, 16)
    keys[:, ::4] = 0.0
    check(keys, random_queries(2, 8, 16), [9, 31, 62])


@given(
    values=st.lists(st.lists(st.integers(-2, 2), min_size=9, max_size=9), min_size=1, max_size=4),
    count=st.integers(1, 9),
)
def test_ties_at_the_cut_go_to_the_lower_index(values, count):
    got = largest(torch.tensor(values, dtype=torch.float32), count)
    want = [sorted(sorted(range(9), key=lambda i: (-row[i], i))[:count]) for row in values]
    assert got.tolist() == want


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["random", "clustered", "one_cluster"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    heads=st.integers(1, 3),
    group=st.integers(1, 4),
    window=st.integers(1, 9),
    candidates=st.integers(1, 60),
    d=st.integers(2, 20),
    pool=st.sampled_from([1, 3, 7, 11]),
    lam=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    threshold=st.sampled_from([-0.2, 0.1, 0.5, 0.9]),
    # None sharper than 1 / sqrt(d), whose largest shares `tolerance` is made for.
    scale=st.sampled_from([None, 1 / 128, 0.1]),
    soft_cap=st.sampled_from([0.0, 0.5, 30.0]),
    center=st.booleans(),
    defensive=st.booleans(),
    budget_share=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    tile=st.sampled_from([1, 5, 64]),
)
def test_random_cases_equal_the_oracle(
    kind,
    dtype,
    heads,
    group,
    window,
    candidates,
    d,
    pool,
    lam,
    threshold,
    scale,
    soft_cap,
    center,
    defensive,
    budget_share,
    seed,
    tile,
):
    parameters = {"window": window, "lam": lam, "pool": pool, "threshold": threshold}
    parameters |= {"scale": scale, "soft_cap": soft_cap}
    parameters |= {"center": center, "defensive": defensive}
    keys = random_keys(kind, heads, candidates + window, d, seed).to(dtype)
    queries = random_queries(heads * group, window, d, seed).to(dtype)
    budget = window + 1 + int(budget_share * (candidates - 1))
    want = expected_scores(keys, queries, **parameters)
    assume(want.gap > MIN_GAP)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(naive, "TILE", tile)
        got = scores(keys, queries, **parameters)
        kept = keep_indices(keys, queries, budget, **parameters)
    torch.testing.assert_close(got.double(), torch.from_numpy(want.scores), **tolerance(keys))
    # A pool makes neighbours tie exactly when lam is 1, so the excused are not counted here.
    assert_same_kept(kept, want.scores, budget, window)


def test_budget_of_all_tokens_keeps_all():
    keys, queries = random_keys("clustered", 3, 63, 16), random_queries(3, 8, 16)
    assert keep_indices(keys, queries, 63).tolist() == [list(range(63))] * 3


def test_non_contiguous_inputs_are_read_in_their_own_order_and_left_alone():
    keys, queries = random_keys("clustered", 3, 101, 32, seed=2), random_queries(9, 8, 32)
    # Token-major storage with keys and values side by side, as caches have it.
    stored = torch.full((101, 3, 64), float("nan"))
    stored[:, :, :32] = keys.transpose(0, 1)
    strided_keys = stored[:, :, :32].transpose(0, 1)
    strided_queries = queries.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided_keys.is_contiguous()
    assert not strided_queries.is_contiguous()
    check(strided_keys, strided_queries, [9, 33])
    assert torch.equal(strided_keys, keys)
    assert torch.equal(strided_queries, queries)


@pytest.mark.parametrize("elements", [1, 2 * 101 * 64, 3 * 101 * 64])
def test_groups_of_heads_give_what_all_heads_at_once_give(monkeypatch, elements):
    keys, queries = random_keys("clustered", 7, 101, 32, seed=3), random_queries(21, 8, 32)
    whole = scores(keys, queries)
    monkeypatch.setattr(naive, "MAX_TEMPORARY_ELEMENTS", elements)
    torch.testing.assert_close(scores(keys, queries), whole, rtol=1e-6, atol=1e-9)
    assert_same_kept(keep_indices(keys, queries, 33), whole.double().numpy(), 33, 8)


class LargestOutput(TorchDispatchMode):
    """Records the largest tensor that any operation made, views of its inputs not counted."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        for out in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, out.numel())
        return result


@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_one_long_head_never_makes_a_pairwise_matrix(kind):
    n = 3001
    keys, queries = random_keys(kind, 1, n, 32), random_queries(4, 8, 32)
    with LargestOutput() as largest:
        keep_indices(keys, queries, 1025)
    assert largest.numel <= n * 64


@pytest.mark.parametrize("kind", ["random", "clustered"])
def test_temporaries_of_many_heads_stay_bounded(kind):
    keys, queries = random_keys(kind, 40, 1001, 48), random_queries(80, 8, 48)
    assert keys.numel() > naive.MAX_TEMPORARY_ELEMENTS
    with LargestOutput() as largest:
        keep_indices(keys, queries, 101)
    assert largest.numel <= naive.MAX_TEMPORARY_ELEMENTS


@pytest.mark.parametrize("changed", [False, True], ids=["plain", "centred, defensive"])
@pytest.mark.parametrize("elements", [1, 2 * 63 * 64, 1 << 20])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("token", [0, 20, 62])
def test_a_non_finite_key_shows_in_all_scores_of_its_head_and_in_no_other(
    monkeypatch, elements, bad, token, changed
):
    monkeypatch.setattr(naive, "MAX_TEMPORARY_ELEMENTS", elements)
    keys, queries = random_keys("one_cluster", 6, 63, 16), random_queries(18, 8, 16)
    keys[3, token, 5] = bad
    keys[5, token, 5] = bad
    got = scores(keys, queries, center=changed, defensive=changed)
    assert got[[3, 5]].isnan().all()
    assert got[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("soft_cap", [0.0, 5.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_query_shows_in_all_scores_of_its_kv_head(bad, soft_cap):
    keys, queries = random_keys("one_cluster", 6, 63, 16), random_queries(18, 8, 16)
    queries[3 * 4 + 2, 7, 5] = bad
    got = scores(keys.bfloat16(), queries.bfloat16(), soft_cap=soft_cap)
    assert got[4].isnan().all()
    assert got[[0, 1, 2, 3, 5]].isfinite().all()


@pytest.mark.parametrize(("threshold", "warns"), [(0.5, False), (0.9, False), (0.95, True)])
def test_a_threshold_that_makes_every_search_long_is_warned_about_once(
    monkeypatch, threshold, warns
):
    said = []
    monkeypatch.setattr(rkv.logger, "warning", lambda *args: said.append(args))
    rkv._warn_of_long_searches.cache_clear()
    for more in (0.0, 0.01):
        RKV(RKV.Options(threshold=threshold + more - 0.01), None, None)
    assert len(said) == warns


def test_what_options_accept_is_what_the_kernels_take():
    accepts = {name: each.accepts for name, each in options_of(RKV.Options).items()}
    for name, each in options_of(RKV.Options).items():
        assert each.check(each.default) is each.default
        assert accepts[name] is None or not accepts[name](float("nan"))
    assert [pool for pool in range(-2, 70) if accepts["pool"](pool)] == [*range(1, 64, 2)]
    assert [accepts["lam"](lam) for lam in (-0.1, 0, 1, 1.1)] == [False, True, True, False]
    assert [accepts["threshold"](t) for t in (-1.1, -1, 1, 1.1)] == [False, True, True, False]
