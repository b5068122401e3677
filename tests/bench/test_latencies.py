"""Latencies of an offline run from the times of its tokens."""

import pytest

from rkv_vllm.bench.latencies import latencies_of, percentiles

# Arrived, first token, further tokens; in seconds.
TIMES = [[0.0, 1.0, 1.5, 2.5], [0.0, 3.0, 3.5, 4.0], [1.0, 2.0, 2.5, 3.0]]


def test_first_tokens_count_from_the_arrival_and_the_others_from_the_one_before():
    found = latencies_of(TIMES, ())
    assert found.keys() == {"ttft_ms", "itl_ms"}
    # 1, 3, 1 and 0.5, 1, 0.5, 0.5, 0.5, 0.5.
    assert found["ttft_ms"] == {"p50": 1000.0, "p99": pytest.approx(2960.0)}
    assert found["itl_ms"] == {"p50": 500.0, "p99": pytest.approx(975.0)}


def test_classes_are_those_of_the_priorities_the_most_urgent_first():
    first, second = latencies_of(TIMES, (5, -1, 5))["classes"]
    assert (first["priority"], first["num_requests"]) == (-1, 1)
    assert first["e2el_ms"] == {"p50": 4000.0, "p99": 4000.0}
    assert first["ttft_ms"]["p50"] == 3000.0
    assert (second["priority"], second["num_requests"]) == (5, 2)
    # 2.5 and 2.
    assert second["e2el_ms"]["p50"] == 2250.0
    assert second["itl_ms"]["p50"] == 500.0


def test_a_request_without_a_token_has_no_latency():
    found = latencies_of([[0.0], [0.0, 2.0]], (0, 0))
    assert found["ttft_ms"]["p50"] == 2000.0
    assert found["itl_ms"] == {"p50": 0.0, "p99": 0.0}
    assert found["classes"][0]["num_requests"] == 2


def test_of_nothing_there_are_zeros():
    assert percentiles([]) == {"p50": 0.0, "p99": 0.0}
