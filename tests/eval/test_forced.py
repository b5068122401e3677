"""Two passes over the same tokens: how much one's odds differ from the other's."""

import numpy as np
import pytest

from rkv_vllm.eval.forced import ForcedPass, compare, kl_bound

VOCAB, TOKENS = 200, 30


def logits(seed, spread=3.0):
    return np.random.default_rng(seed).normal(scale=spread, size=(TOKENS, VOCAB))


def log_softmax(scores):
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def pass_of(logprobs, forced, top):
    """As vLLM reports it: the forced token, then the likeliest ones."""
    order = np.argsort(-logprobs, axis=1)[:, :top]
    ids = np.concatenate([forced[:, None], order], axis=1)
    found = np.take_along_axis(logprobs, ids, axis=1)
    return ForcedPass(ids.astype(np.int32), found.astype(np.float32))


def passes(top, distance=1.0):
    stock = log_softmax(logits(0))
    side = log_softmax(logits(0) + distance * logits(1, 1.0))
    forced = np.random.default_rng(2).integers(VOCAB, size=TOKENS)
    exact = (np.exp(stock) * (stock - side)).sum(axis=1)
    return pass_of(stock, forced, top), pass_of(side, forced, top), exact


def test_with_the_whole_vocabulary_the_bound_is_the_divergence():
    stock, side, exact = passes(top=VOCAB)
    np.testing.assert_allclose(kl_bound(stock, side), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top", [1, 4, 32])
def test_the_bound_is_below_the_divergence_and_grows_with_what_is_known(top):
    stock, side, exact = passes(top)
    bound = kl_bound(stock, side)
    assert np.all(bound <= exact + 1e-4)
    assert np.all(bound >= 0)
    if top == 32:
        assert bound.sum() > 0.8 * exact.sum()


def test_a_side_that_shares_no_likely_token_is_told_by_the_rest():
    ids = np.array([[0, 1, 2]], dtype=np.int32)
    stock = ForcedPass(ids, np.log([[0.05, 0.6, 0.3]]))
    side = ForcedPass(np.array([[0, 3, 4]], dtype=np.int32), np.log([[0.1, 0.5, 0.2]]))
    expected = 0.05 * np.log(0.05 / 0.1) + 0.95 * np.log(0.95 / 0.9)
    assert kl_bound(stock, side) == pytest.approx(expected)


def test_stock_against_itself_agrees_without_divergence():
    stock, _, _ = passes(top=8)
    sums = compare(stock, stock, 0)
    assert (sums["num_tokens"], sums["num_agree"]) == (TOKENS, TOKENS)
    assert sums["kl"] == pytest.approx(0, abs=1e-9)
    assert sums["nll"] == sums["stock_nll"] > 0


def test_only_tokens_after_the_first_compaction_count_and_all_of_them_beside():
    stock, side, _ = passes(top=8)
    bound = kl_bound(stock, side)
    agree = stock.token_ids[:, 1] == side.token_ids[:, 1]
    sums = compare(stock, side, 20)
    assert sums["num_tokens"] == 10
    assert sums["num_agree"] == agree[20:].sum()
    assert sums["kl"] == pytest.approx(bound[20:].sum())
    assert sums["nll"] == pytest.approx(-side.logprobs[20:, 0].sum(), rel=1e-5)
    assert sums["stock_nll"] == pytest.approx(-stock.logprobs[20:, 0].sum(), rel=1e-5)
    assert sums["all_num_tokens"] == TOKENS
    assert sums["all_kl"] == pytest.approx(bound.sum())
    assert 0 < sums["all_num_agree"] == agree.sum() < TOKENS


@pytest.mark.parametrize("first", [None, TOKENS, TOKENS + 1])
def test_a_pass_without_a_token_after_a_compaction_counts_nothing(first):
    stock, side, _ = passes(top=8)
    sums = compare(stock, side, first)
    assert (sums["num_tokens"], sums["num_agree"], sums["kl"], sums["nll"]) == (0, 0, 0, 0)


def test_a_pass_is_kept_as_it_is(tmp_path):
    stock, _, _ = passes(top=8)
    stock.save(tmp_path / "a.npz")
    again = ForcedPass.load(tmp_path / "a.npz")
    np.testing.assert_array_equal(again.token_ids, stock.token_ids)
    np.testing.assert_array_equal(again.logprobs, stock.logprobs)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
