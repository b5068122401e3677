"""A preempted request starts from zero and then follows the rules again."""

import pytest

import rkv_vllm
from rkv_vllm.options import ServerOptions
from tests.engine import Engine, running_engine
from tests.models import random_prompt
from tests.reference import generate_reference

pytestmark = pytest.mark.engine

CONFIG = ServerOptions(budget=64, buffer=32)
OPTIONS = rkv_vllm.engine_args(budget=64, buffer=32)


def assert_all_equal_recomputing_references(engine: Engine, model, requests) -> int:
    """Every output equals the reference that recomputes where this engine preempted."""
    compactions = 0
    for req_id, (prompt, max_tokens) in requests.items():
        restarts = [length for length in engine.preempted_at.get(req_id, []) if length > 0]
        reference = generate_reference(model, prompt, max_tokens, CONFIG, recompute_at=restarts)
        assert engine.outputs[req_id].token_ids == reference.token_ids, req_id
        compactions += len(reference.compactions)
    return compactions


@pytest.mark.parametrize(
    ("runner", "num_requests", "num_tokens", "num_blocks"),
    [("v1", 6, 150, 13), ("v2", 4, 110, 9)],
    indirect=["runner"],
)
def test_a_pool_too_small_preempts_and_everything_finishes_right(
    random_model_dir, runner, num_requests, num_tokens, num_blocks
):
    model = random_model_dir("qwen3", 3)
    requests = {
        f"r{i}": (random_prompt(20 + 9 * i, seed=i), num_tokens - 10 * i)
        for i in range(num_requests)
    }
    # Without vLLM's gate on whole prompts nothing reserves for growth either: requests crowd in.
    options = {**OPTIONS, "max_model_len": 256, "scheduler_reserve_full_isl": False}
    with running_engine(model, num_blocks=num_blocks, **options) as engine:
        for req_id, (prompt, max_tokens) in requests.items():
            engine.add(req_id, prompt, max_tokens)
        engine.run()
        stats = engine.stats()
        engine.assert_pool_is_empty()
    assert engine.preempted_at, "the pool was meant to be too small"
    compacted = assert_all_equal_recomputing_references(engine, model, requests)
    # A preemption may drop a compaction that was booked in the very step before it.
    assert 0 < stats["compactions"] <= compacted + len(engine.preempted_at)
    untouched = [r for r in requests if r not in engine.preempted_at]
    assert untouched, "some request was meant to run through"


@pytest.mark.parametrize(
    ("runner", "num_tokens", "preempt_after", "total"),
    [("v1", 180, 6, 9), ("v2", 110, 3, 6)],
    indirect=["runner"],
)
def test_a_forced_preemption_after_compactions_recomputes_the_whole_text(
    random_model_dir, runner, num_tokens, preempt_after, total
):
    model = random_model_dir("llama", 3)
    requests = {f"r{i}": (random_prompt(30 + i, seed=i), num_tokens) for i in range(3)}
    with running_engine(model, **OPTIONS) as engine:
        for req_id, (prompt, max_tokens) in requests.items():
            engine.add(req_id, prompt, max_tokens)
        while engine.stats()["compactions"] < preempt_after:
            engine.step()
        assert engine.llm.reset_prefix_cache(reset_running_requests=True)
        engine.run()
        stats = engine.stats()
        reports = engine.llm.collective_rpc("kv_compression_requests")[0]
        engine.assert_pool_is_empty()
    assert set(engine.preempted_at) == set(requests)
    compactions = assert_all_equal_recomputing_references(engine, model, requests)
    assert stats["compactions"] == compactions >= total
    assert stats["requests_compacted"] == 3
    assert sum(report["compactions"] for report in reports) == compactions
