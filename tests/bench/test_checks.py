"""Which results forbid a ratio."""

import pytest

from rkv_vllm.bench.checks import failed_checks
from rkv_vllm.bench.sides import Side
from tests.bench.results import SIDES, new_result, new_results, new_workload

STOCK, COMPRESSED = SIDES


def test_good_results_pass():
    assert failed_checks(new_workload(), new_results(repeats=2)) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"output_lens": [150, 0]}, "1 of 2 requests lost"),
        ({"output_lens": [150]}, "1 of 2 requests lost"),
        ({"output_lens": [0, 0], "error": "refused"}, "2 of 2 requests lost (refused)"),
        ({"output_lens": [150, 149]}, "outputs of [149] tokens, wanted 150"),
        ({"prompt_lens": [20, 31]}, "prompts of other lengths"),
        ({"pool_blocks": 15}, "a pool of 15 blocks, wanted 16"),
        ({"compactions": 0}, "0 compactions, wanted 6"),
        ({"compactions": 5}, "5 compactions, wanted 6"),
        ({"compactions": 7}, "7 compactions, wanted 6"),
        ({"compactions": 0, "preemptions": 1}, "0 compactions, wanted 1 to 6"),
        ({"compactions": 7, "deferred": 1}, "7 compactions, wanted 1 to 6"),
        ({"probe": [[11, 12], [13, 14], [15, 17]]}, "too short to be compacted got another text"),
    ],
)
def test_a_compressed_run_that_is_not_as_it_must_be(changes, problem):
    (found,) = failed_checks(new_workload(), new_results(**changes))
    assert found.startswith("budget 64, run 1: ")
    assert problem in found


@pytest.mark.parametrize("changes", [{"preemptions": 2}, {"deferred": 1}])
def test_compactions_may_be_fewer_after_a_wait_or_a_preemption(changes):
    assert failed_checks(new_workload(), new_results(compactions=5, **changes)) == []


def test_stock_that_compacts_is_not_stock():
    results = [new_result(COMPRESSED), new_result(STOCK, compactions=1)]
    assert failed_checks(new_workload(), results) == ["stock, run 1: 1 compactions, wanted none"]


def test_every_run_is_checked_and_named():
    results = new_results(repeats=2)
    results[2]["compactions"] = 0
    (found,) = failed_checks(new_workload(), results)
    assert found.startswith("budget 64, run 2: ")


def test_pools_of_vllms_own_size_may_differ_by_the_query_ring_and_no_more():
    results = [new_result(COMPRESSED, pool_blocks=990), new_result(STOCK, pool_blocks=1000)]
    assert failed_checks(new_workload(pool_tokens=0), results) == []
    results[0]["pool_blocks"] = 989
    (found,) = failed_checks(new_workload(pool_tokens=0), results)
    assert "a pool of 989 blocks, wanted 1000" in found


def test_every_engine_has_the_pool_that_was_asked_for():
    two = [new_result(side, engines=2, pool_blocks=32) for side in (COMPRESSED, STOCK)]
    assert failed_checks(new_workload(), two) == []
    two[0]["pool_blocks"] = 16
    (found,) = failed_checks(new_workload(), two)
    assert "a pool of 16 blocks, wanted 32" in found


def test_a_boundary_that_asynchronous_scheduling_misses_may_be_missed():
    # 30 + 132 - 2 tokens are settled at the end without it, one less with it; due at 160.
    workload = new_workload(prompt_lens=(30, 30), output_lens=(132, 132))
    assert workload.expected_compactions(64) == (4, 6)
    same = {"prompt_lens": [30, 30], "output_lens": [132, 132]}
    for compactions, is_right in ((3, False), (4, True), (6, True), (7, False)):
        results = [new_result(COMPRESSED, compactions=compactions, **same)]
        assert (failed_checks(workload, results) == []) == is_right


FP8_SIDE = Side(None, (), "fp8", pool_tokens=1024, is_exact=False, may_refuse=True)


def test_another_cache_may_say_something_else_in_more_blocks():
    other = [[1], [2], [3]]
    fp8 = new_result(FP8_SIDE, probe=other, pool_blocks=32)
    assert failed_checks(new_workload(), [*new_results(), fp8]) == []
    fp8["pool_blocks"] = 16
    (found,) = failed_checks(new_workload(), [*new_results(), fp8])
    assert found == "stock, fp8, run 1: a pool of 16 blocks, wanted 32"
    # vLLM decides how many of its blocks fit into its memory.
    fp8["pool_blocks"] = 64
    assert failed_checks(new_workload(pool_tokens=0), [*new_results(), fp8]) == []


def test_a_baseline_of_the_same_cache_is_exact():
    side = Side(None, (), "--max-num-seqs=1", may_refuse=True)
    results = [*new_results(), new_result(side, probe=[[1], [2], [3]])]
    (found,) = failed_checks(new_workload(), results)
    assert found.startswith("stock, --max-num-seqs=1, run 1: a request too short")


def test_each_request_has_the_output_that_it_was_asked_for():
    workload = new_workload(output_lens=(150, 160))
    good = {"output_lens": [150, 160]}
    assert failed_checks(workload, [new_result(COMPRESSED, **good)]) == []
    swapped = new_result(COMPRESSED, output_lens=[160, 150])
    (found,) = failed_checks(workload, [swapped])
    assert "outputs of [150, 160] tokens, wanted 160, 150" in found
