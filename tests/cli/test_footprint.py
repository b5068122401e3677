"""The lengths that `plan` reckons with are those of the planner that decides in an engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkv_vllm.cli.footprint import Life, Ramp, rkv_life, stock_life
from rkv_vllm.config import KVCompressionConfig
from rkv_vllm.request_options import RequestOptions
from rkv_vllm.scheduling.planner import CompressionPlanner, ScheduledRequest


class Books:
    """Blocks are never short."""

    def __init__(self):
        self.evicted = 0

    def num_evicted(self, req_id):
        return self.evicted

    def compact(self, req_id, num_evict, total_len):
        self.evicted += num_evict
        return [], []


def planned_lengths(prompt_len, output_len, config, in_flight):
    """Tokens that one request holds in every step, before the step's own compaction."""
    books = Books()
    planner = CompressionPlanner(config, books)
    options = RequestOptions(config.budget, config.buffer)
    scheduled, lengths = [], []
    for step in range(output_len):
        scheduled.append(prompt_len if step == 0 else 1)
        num_computed = sum(scheduled)
        lengths.append(num_computed - books.evicted)
        unsettled = sum(scheduled[-in_flight:])
        planner.plan_step(
            [ScheduledRequest("a", num_computed, scheduled[-1], unsettled, False, options)]
        )
    return lengths


def lengths_of(life):
    return [
        length
        for ramp in life.ramps
        for _ in range(ramp.times)
        for length in range(ramp.first, ramp.last + 1)
    ]


@given(
    prompt_len=st.integers(1, 60),
    output_len=st.integers(1, 200),
    budget=st.integers(3, 40),
    buffer=st.integers(2, 20),
    in_flight=st.integers(1, 2),
)
def test_lengths_are_those_of_the_planner(prompt_len, output_len, budget, buffer, in_flight):
    config = KVCompressionConfig(budget=budget, buffer=buffer, window=2)
    expected = planned_lengths(prompt_len, output_len, config, in_flight)
    assert lengths_of(rkv_life(prompt_len, output_len, budget, buffer, in_flight)) == expected


@given(
    prompt_len=st.integers(1, 60),
    output_len=st.integers(1, 200),
    block_size=st.integers(1, 17),
)
def test_peak_and_means_are_those_of_the_lengths(prompt_len, output_len, block_size):
    for life in (
        stock_life(prompt_len, output_len),
        rkv_life(prompt_len, output_len, budget=12, buffer=5, in_flight=2),
    ):
        lengths = lengths_of(life)
        assert life.num_steps == len(lengths) == output_len
        assert life.peak_len == max(lengths)
        assert life.mean_len == pytest.approx(sum(lengths) / output_len)
        blocks = sum(-(-length // block_size) for length in lengths)
        assert life.block_steps(block_size) == blocks


def test_repeated_ramps_count_every_time():
    life = Life((Ramp(1, 3), Ramp(2, 3, times=4)))
    assert life.num_steps == 3 + 8
    assert life.mean_len == pytest.approx((1 + 2 + 3 + 4 * 5) / 11)


def test_room_for_a_long_prompt_is_needed_until_its_first_compaction_only():
    life = rkv_life(prompt_len=50, output_len=30, budget=8, buffer=4, in_flight=2)
    assert life.ramps[0] == Ramp(50, 56)
    assert life.reserved_block_steps(4) == 7 * 14 + (30 - 7) * 4
    assert stock_life(50, 30).reserved_block_steps(4) == 30 * 20
