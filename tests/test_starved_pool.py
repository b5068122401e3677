"""Freed blocks really admit more requests."""

import pytest

import rkv_vllm
from tests.engine import BLOCK_SIZE, running_engine
from tests.models import random_prompt

pytestmark = pytest.mark.engine

BUDGET, BUFFER = 96, 32
PROMPT_LEN, OUTPUT_LEN, NUM_REQUESTS = 40, 600, 16
# Four full-length requests of 640 tokens, and the null block.
NUM_BLOCKS = 4 * (PROMPT_LEN + OUTPUT_LEN) // BLOCK_SIZE + 1


def serve_all(model, **options):
    """Run all requests; returns (engine, peak of blocks held by one request)."""
    lengths: list[int] = []
    with running_engine(model, num_blocks=NUM_BLOCKS, **options) as engine:
        manager = engine.scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        for i in range(NUM_REQUESTS):
            engine.add(f"r{i}", random_prompt(PROMPT_LEN, seed=i), OUTPUT_LEN)
        if options:
            watch_compactions(manager, lengths)
        while engine.llm.llm_engine.has_unfinished_requests():
            engine.step()
            lengths.extend(len(row) for row in manager.req_to_blocks.values())
        engine.final_stats = engine.stats() if options else None
        engine.assert_pool_is_empty()
    assert all(len(o.token_ids) == OUTPUT_LEN for o in engine.outputs.values())
    return engine, max(lengths)


def watch_compactions(manager, lengths: list[int]) -> None:
    """Note the blocks of a request right before its compaction gives some back."""
    evict = manager.evict

    def noting(req_id, *args):
        lengths.append(len(manager.req_to_blocks[req_id]))
        return evict(req_id, *args)

    manager.evict = noting


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_starved_pool_runs_more_requests_at_once_than_stock(random_model_dir):
    model = random_model_dir("qwen3", 3)
    stock, stock_peak = serve_all(model)
    ours, our_peak = serve_all(model, **rkv_vllm.engine_args(budget=BUDGET, buffer=BUFFER))
    assert stock_peak == -(-(PROMPT_LEN + OUTPUT_LEN) // BLOCK_SIZE)
    # budget + buffer settled tokens and the one of the step in hand.
    assert our_peak == -(-(BUDGET + BUFFER + 1) // BLOCK_SIZE)
    assert stock.preempted_at, "the pool was meant to starve stock vLLM"
    assert not ours.preempted_at
    stats = ours.final_stats
    # The first at 128 settled tokens, then every 32; the last token is never computed.
    per_request = (PROMPT_LEN + OUTPUT_LEN - 2 - BUDGET) // BUFFER
    assert stats["compactions"] == NUM_REQUESTS * per_request
    assert stats["evicted_tokens"] == stats["compactions"] * BUFFER
    assert stats["requests_compacted"] == NUM_REQUESTS
    assert ours.max_running == (NUM_BLOCKS - 1) // our_peak == 16
    assert mean_running(ours) > 2 * mean_running(stock)


def mean_running(engine) -> float:
    return sum(engine.running_per_step) / len(engine.running_per_step)
