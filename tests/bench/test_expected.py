"""How many compactions are right under pressure, where no calendar says it."""

import pytest

from rkv_vllm.bench.checks import failed_checks
from rkv_vllm.bench.expected import expected_compactions
from rkv_vllm.bench.sides import Side
from tests.bench.results import SIDES, new_result, new_workload

PRESSURE = Side(64, ("--kv-budget=64",), "pressure", "pressure")
# Two requests of 170 and 180 tokens: 6 blocks each, and one each for the forecast.
ROOM = {"pool_tokens": 14 * 32}


def under_pressure(workload, **changes):
    fields = {"pool_blocks": workload.pool_blocks, **changes}
    return new_result(PRESSURE, **fields)


@pytest.mark.parametrize("compactions", [0, 1])
def test_with_room_for_all_nothing_is_compacted(compactions):
    workload = new_workload(**ROOM)
    results = [under_pressure(workload, compactions=compactions)]
    results.append(new_result(SIDES[0], pool_blocks=workload.pool_blocks))
    problems = failed_checks(workload, results)
    wanted = ["budget 64, pressure, run 1: 1 compactions, wanted none"] if compactions else []
    assert problems == wanted


def test_a_run_that_was_preempted_with_room_for_all_is_no_excuse():
    workload = new_workload(**ROOM)
    assert expected_compactions(workload, under_pressure(workload, preemptions=1)) == (0, 0)


def test_a_block_less_may_be_pressure_and_must_not():
    workload = new_workload(pool_tokens=13 * 32)
    # Prompts and outputs of 170 and 180 tokens, 64 of which are kept.
    assert expected_compactions(workload, under_pressure(workload)) == (0, 106 + 116)


def test_a_pool_that_cannot_hold_who_ran_at_once_compacts():
    workload = new_workload(pool_tokens=11 * 32)
    assert expected_compactions(workload, under_pressure(workload))[0] == 1
    # One at a time always fits.
    assert expected_compactions(workload, under_pressure(workload, running_peak=1))[0] == 0


@pytest.mark.parametrize("changes", [{"request_rate": 0.1}, {"max_concurrency": 1}])
def test_requests_that_come_one_after_the_other_need_not_meet(changes):
    workload = new_workload(pool_tokens=11 * 32, **changes)
    assert expected_compactions(workload, under_pressure(workload))[0] == 0


def test_what_is_recomputed_may_be_compacted_again():
    workload = new_workload(pool_tokens=11 * 32)
    assert expected_compactions(workload, under_pressure(workload, preemptions=2))[1] == 3 * 222


def test_every_engine_has_room_for_itself_alone():
    workload = new_workload(**ROOM)
    two = under_pressure(workload, engines=2, pool_blocks=14)
    assert expected_compactions(workload, two)[1] > 0
    assert expected_compactions(workload, {**two, "pool_blocks": 28}) == (0, 0)


def test_protected_tokens_are_not_evicted():
    workload = new_workload(pool_tokens=11 * 32, compression={"protect": "prompt"})
    assert expected_compactions(workload, under_pressure(workload))[1] == 2 * (150 - 64)


CHUNKED = {"compression": {"compress_prompt": True, "prompt_chunk": 50}, "prompt_lens": (120, 180)}


def test_prompts_are_compacted_with_room_for_all():
    # At 100; at 100 and 150.
    workload = new_workload(pool_tokens=32 * 32, **CHUNKED)
    assert expected_compactions(workload, under_pressure(workload)) == (3, 3)
    short = new_workload(pool_tokens=8 * 32, **CHUNKED)
    fewest, most = expected_compactions(short, under_pressure(short))
    assert fewest == 3
    assert most > 100


def test_a_recompute_compacts_its_text_again():
    workload = new_workload(**CHUNKED)
    calm, preempted = (new_result(SIDES[1], preemptions=count) for count in (0, 2))
    fewest, most = expected_compactions(workload, calm)
    assert 3 < fewest <= most
    # 330 tokens: at 100, 150, ..., 300.
    assert expected_compactions(workload, preempted) == (1, most + 2 * 5)
