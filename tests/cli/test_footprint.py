"""The lengths that `plan` reckons with are those of the planner that decides in an engine."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rkv_vllm.cli.footprint import num_blocks, rkv_life, stock_life
from rkv_vllm.policy import Terms
from tests.bench.test_workload import planned_lengths


# A busy machine takes its time.
@settings(deadline=None)
@given(
    prompt_len=st.integers(1, 60),
    output_len=st.integers(1, 200),
    budget=st.integers(3, 40),
    buffer=st.integers(2, 20),
    prefix_len=st.integers(0, 70),
    in_flight=st.integers(1, 2),
)
def test_lengths_are_those_of_the_planner(
    prompt_len, output_len, budget, buffer, prefix_len, in_flight
):
    terms = Terms(budget, buffer, prefix_len)
    expected, _ = planned_lengths(terms, prompt_len, output_len, in_flight)
    life = rkv_life(prompt_len, output_len, terms, in_flight)
    assert life.held.tolist() == expected
    # Room for what is reserved is room for what it holds then and later.
    assert (life.reserved >= np.maximum.accumulate(life.held[::-1])[::-1]).all()
    assert stock_life(prompt_len, output_len).held.tolist() == [
        *range(prompt_len, prompt_len + output_len)
    ]


def test_of_a_compressed_prompt_only_the_last_chunk_is_left():
    life = rkv_life(100, 12, Terms(budget=8, buffer=4, prompt_chunk=12), in_flight=1)
    # At most 8 + 12; 4 tokens behind the boundary at 96, compacted when 4 more have settled.
    assert life.held.tolist() == [20, 13, 14, 15, 16, 17, 10, 11, 12, 13, 10, 11]
    assert life.reserved.max() == life.reserved[0] == 20
    whole = Terms(budget=8, buffer=4)
    short = rkv_life(20, 12, whole._replace(prompt_chunk=12), in_flight=1)
    assert short.held.tolist() == rkv_life(20, 12, whole, in_flight=1).held.tolist()


def test_room_for_a_long_prompt_is_needed_until_its_first_compaction_only():
    life = rkv_life(50, 30, Terms(budget=8, buffer=4), in_flight=2)
    assert life.held[:8].tolist() == [50, 51, 52, 53, 54, 55, 56, 11]
    assert num_blocks(life.reserved, 4).sum() == 7 * 14 + (30 - 7) * 4
    assert num_blocks(stock_life(50, 30).reserved, 4).sum() == 30 * 20
